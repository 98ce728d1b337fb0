"""Parts of modules: classes, attributes, settings and hooks, parameters and buffers."""

import random
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from qcompress.digests import ownership
from qcompress.digests.code import CodeWords
from qcompress.digests.ownership import is_own, is_plain
from qcompress.digests.words import Parts

_OF_SETTINGS = ("name_or_path", "transformers_version", "architectures")
"""Attributes of the configurations of transformers on which no output depends."""
_FUNCTIONS = (types.FunctionType, types.MethodType)
_RANDOM = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


class ModelWords(CodeWords):
    """HashedWords of modules, besides those of functions and classes."""

    def _of_module(self, value: nn.Module, name: str) -> Parts:
        tensors = [*value.named_parameters(remove_duplicate=False), *value.named_buffers(remove_duplicate=False)]
        order = {id(tensor): index for index, (_, tensor) in reversed(list(enumerate(tensors)))}
        known = {id(tensor) for _, tensor in tensors if self._is_held(tensor)}
        self.hold(tensor for _, tensor in tensors)
        yield from self.of_layers(value, name)
        for index, (path, tensor) in enumerate(tensors):
            self._put("tensor", path, order[id(tensor)])
            if order[id(tensor)] == index:
                parts = self._of_array if id(tensor) in known else self._of_tensor
                yield from parts(tensor, f"{name}.{path}")

    def of_layers(self, value: nn.Module, name: str) -> Parts:
        """Yield what a model does with its parameters and buffers: classes, attributes and hooks of its modules."""
        modules = dict(value.named_modules())
        for module in modules.values():
            self._is_new(module)
        assigned, written = ownership.written_in_passes(modules.values())
        self._assigned |= assigned
        self._written |= written
        for path, module in modules.items():
            self._put("submodule", path)
            yield type(module), name
            without = ("training", *ownership.assigned_by_libraries(type(module)) & {"name_or_path"})
            yield from self._of_attributes(type(module), vars(module), f"{name}.{path}" if path else name, without)
            yield from self._of_items("hooks", ownership.hooks_of(module), name)
            if isinstance(module, torch.fx.GraphModule):
                self._put("graph", module.code)

    def _of_attributes(self, kind: type, attributes: Mapping[str, Any], name: str, without: Sequence[str]) -> Parts:
        """Yield the attributes of a module or of settings that it holds, for example a configuration."""
        made = ownership.assigned_by_libraries(kind)
        for key, item in sorted(attributes.items()):
            if key in without or ownership.is_of_library(key, kind):
                continue
            names = self._assigned if is_plain(item) else self._written  # a plain value cannot be changed
            written = key in names and not isinstance(item, _FUNCTIONS)
            if key not in made and (written or isinstance(item, _RANDOM)):
                self._add_written(item, f"{name}.{key}")
            elif ownership.is_simple(item) or callable(item):
                self._put(key)
                yield item, f"{name}.{key}"
            elif ownership.is_settings(item):
                self._put(key)
                yield from self._of_settings(item, f"{name}.{key}")
            elif key not in made and not isinstance(item, RemovableHandle):  # hooks count, not their numbers
                self._put(key)
                yield item, f"{name}.{key}"

    def _of_settings(self, item: Any, name: str) -> Parts:
        new = self._is_new(item)
        self._put(type(item).__qualname__, self._seen[id(item)][0])
        if not new:
            return
        if is_own(type(item)):
            yield type(item), name
        names = [*getattr(item, "__dict__", ()), *getattr(item, "__dataclass_fields__", ())]
        labels = _OF_SETTINGS if hasattr(item, "transformers_version") else ()
        yield from self._of_attributes(type(item), {key: getattr(item, key, None) for key in names}, name, labels)
