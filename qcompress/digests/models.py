"""Parts of modules: classes, attributes, settings and hooks, parameters and buffers."""

import random
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.digests import ownership
from qcompress.digests.code import CodeWords
from qcompress.digests.ownership import is_own
from qcompress.digests.words import Parts

_OF_SETTINGS = ("name_or_path", "_name_or_path", "transformers_version", "architectures")
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
        self._writes |= ownership.written_in_passes(modules.values())
        for path, module in modules.items():
            self._put("submodule", path)
            yield type(module), name
            yield from self._of_attributes(type(module), vars(module), f"{name}.{path}" if path else name)
            self._put("not saved", sorted(module._non_persistent_buffers_set))
            yield from self._of_hooks(module, name)
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    yield from self._of_attached(tensor, f"{name}.{path}.{key}" if path else f"{name}.{key}")
            if isinstance(module, torch.fx.GraphModule):
                self._put("graph", module.code)

    def _of_hooks(self, module: nn.Module, name: str) -> Parts:
        hooks = ownership.hooks_of(module)
        full = bool(module._backward_hooks) and module._is_full_backward_hook
        self._put("hooks", full, [kind for kind, _ in hooks])
        for _, hook in hooks:
            yield hook, name

    def _of_attached(self, value: Any, name: str) -> Parts:
        """Yield what a tensor or an array has besides its values: class, attributes, hooks and mask."""
        hooks = ownership.hooks_on(value) if isinstance(value, Tensor) else []
        if hooks or is_own(type(value)) or (isinstance(value, Tensor) and ownership.attached_to(value)):
            if not self._is_new(value):  # it may hold itself
                self._put("seen", self._seen[id(value)][0])
            else:
                yield from self._of_kind(value, name)
                yield from self._of_items("hooks", hooks, name)
        else:
            self._put("kind", type(value).__module__, type(value).__qualname__)
        if isinstance(value, np.ma.MaskedArray):
            yield from self._of_items("masked", (np.ma.getmaskarray(value), value.fill_value), name)

    def _of_attributes(self, kind: type, attributes: Mapping[str, Any], name: str) -> Parts:
        """Yield the attributes of a module or of settings; of those that libraries assign, what they do not cache."""
        made = ownership.assigned_by_libraries(kind)
        for key, item in sorted(attributes.items()):
            if ownership.is_of_library(key, kind):
                continue
            written = self._writes.to(key, item) and not isinstance(item, _FUNCTIONS)
            if key not in made and (written or isinstance(item, _RANDOM)):
                self._add_written(item, f"{name}.{key}")
            elif key not in made or ownership.is_simple(item) or callable(item) or ownership.is_settings(item):
                self._put(key)
                yield item, f"{name}.{key}"

    def _of_settings(self, item: Any, name: str) -> Parts:
        """Yield the attributes of an object without inner state."""
        self._put("settings", type(item).__qualname__)
        if is_own(type(item)):
            yield type(item), name
        labels = _OF_SETTINGS if ownership.is_configuration(item) else ()
        held = {key: each for key, each in ownership.attached_to(item).items() if key not in labels}
        yield from self._of_attributes(type(item), held, name)
