"""What goes into a digest of a model: classes, attributes, hooks, parameters and buffers of its modules."""

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qcompress.digests.hashing import Digest, Parts, of_items, of_named
from qcompress.digests.libraries import is_own
from qcompress.digests.tensors import of_tensor

LABELS = {
    "name_or_path", "_name_or_path", "_commit_hash", "_original_object_hash", "transformers_version", "architectures",
}  # fmt: skip
"""Attributes of models and configurations of transformers on which no output depends."""

_HOOKS = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_backward_hooks": (),
    "_backward_pre_hooks": (),
}
"""Where a module keeps its hooks, and the numbers of those that were registered with a flag."""

_CAPTURING = "transformers.utils.output_capturing"
_COMPILED = ("torch._dynamo.eval_frame", "OptimizedModule")
"""Module and name of the class that `torch.compile` returns."""

_MODULE = frozenset(vars(nn.Module())) | {"_is_full_backward_hook", "_compiled_call_impl"}
"""Attributes that PyTorch keeps in every module."""


def of_model(digest: Digest, value: nn.Module, name: str) -> Parts:
    """Yield a model; a weight that several modules share is known by the first of its paths."""
    tensors = [*value.named_parameters(remove_duplicate=False), *value.named_buffers(remove_duplicate=False)]
    first = {id(tensor): path for path, tensor in reversed(tensors)}
    values = [(path, tensor) for path, tensor in tensors if first[id(tensor)] == path]
    for path, tensor in values:
        digest.put("weight", path)
        if digest.place_of(tensor) is None:
            yield from of_tensor(digest, tensor.detach(), f"{name}.{path}")
    digest.hold(tensor for _, tensor in values)
    yield from of_layers(digest, value, name)


def of_layers(digest: Digest, value: nn.Module, name: str) -> Parts:
    """Yield what a model does with its parameters and buffers, which are held."""
    everywhere = list(value.named_modules(remove_duplicate=False))
    first = {id(module): path for path, module in reversed(everywhere)}
    digest.put("modules", [(path, first[id(module)]) for path, module in everywhere])
    is_whole = digest.order_of(value) == 0  # the identified model runs in evaluation mode, others in their own
    modules = [(path, module) for path, module in everywhere if first[id(module)] == path]
    for _, module in modules:  # before attributes that refer to them
        digest.is_new(module)
    for path, module in modules:
        digest.put("module", path, is_whole or module.training)
        own = f"{name}.{path}" if path else name
        yield type(module), own
        yield from of_named(digest, _attributes(module), own)
        digest.put("not saved", sorted(module._non_persistent_buffers_set))
        hooks = hooks_of(module)
        digest.put("hooks", [words for words, _ in hooks])
        yield from of_items(digest, "hooks", [hook for _, hook in hooks], own)
        yield from of_named(digest, {**module._parameters, **module._buffers}, own)
        if isinstance(module, torch.fx.GraphModule):
            digest.put("graph", module.code)


def hooks_of(module: nn.Module) -> list[tuple[tuple[Any, ...], Any]]:
    """Return what runs before and after a module's passes, each hook with its kind and flags.

    Left out is what transformers registers in passes to store outputs.
    """
    return [
        ((kind, *(number in getattr(module, flag) for flag in flags)), hook)
        for kind, flags in _HOOKS.items()
        for number, hook in getattr(module, kind).items()
        if not (type(hook) is types.FunctionType and hook.__module__ == _CAPTURING)
    ]


def _attributes(module: nn.Module) -> Mapping[str, Any]:
    """Return what users and libraries have put into a module; not what `torch.compile` and tracing keep there."""
    kind = type(module)
    if (kind.__module__, kind.__name__) == _COMPILED:  # attributes that are set there go to the module inside
        return {}
    left_out = _MODULE if is_own(kind) else _MODULE | LABELS
    traced = isinstance(module, torch.fx.GraphModule)
    return {key: item for key, item in vars(module).items() if key not in left_out and not (traced and key[0] == "_")}
