"""Computed weights: parametrizations, weight and spectral normalisation, pruning masks, expanded tensors.

Such a module multiplies with the computed result, so this is what is measured and stored: a plain parameter of the same
name that gives the same outputs. Parameters and buffers whose numbers share memory with each other (`Tensor.expand`)
cannot be written to, so they get memory of their own. `composed` replaces all these temporarily, `compose_`
permanently.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from qcompress.model import forward as forwards
from qcompress.model.tensors import extent_of, held_tensors, size_bytes


def compose_(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Replace computed weights of ``model`` by plain parameters, and expanded tensors by full ones, in place.

    Args:
        model: the model; it computes the same as before, in evaluation mode.
        names: names of parameters in the state dict; modules that compute none of these are left unchanged. None for
            all.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    >>> sorted(dict(layer.named_parameters()))
    ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
    >>> compose_(layer)
    >>> sorted(dict(layer.named_parameters())), type(layer).__name__
    (['bias', 'weight'], 'Linear')
    """
    for tensor in _expanded(model):
        tensor.data = tensor.detach().contiguous()
    composed = [
        module
        for path, module in model.named_modules()
        if (own := computed(module)) and (names is None or any(f"{path}.{name}".lstrip(".") in names for name in own))
    ]
    if not composed:
        return
    with forwards.evaluating(model), torch.no_grad():  # some of them give other results in training mode
        for module in composed:
            _compose_module(module)


@contextlib.contextmanager
def composed(model: nn.Module) -> Iterator[None]:
    """Do the same as `compose_`, inside a ``with`` block."""
    forwards.require_module(model)
    expanded = [(tensor, tensor.data) for tensor in _expanded(model)]
    with put_back(module for module in model.modules() if computed(module)):
        try:
            compose_(model)
            yield
        finally:
            for tensor, data in expanded:
                tensor.data = data


@contextlib.contextmanager
def put_back(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the class and the attributes of modules, hooks included, on exit."""
    before = [(module, type(module), _attributes(module)) for module in modules]
    try:
        yield
    finally:
        for module, kind, attributes in before:
            module.__class__ = kind
            _restore(module, attributes)


def _expanded(model: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers that have more numbers than memory."""
    extents = [(item.tensor, extent_of(item.tensor)) for item in held_tensors(model)]
    return [tensor for tensor, extent in extents if extent and extent[2] - extent[1] < size_bytes(tensor)]


def computed(module: nn.Module) -> list[str]:
    """Return the names of the parameters that a module computes."""
    names = list(module.parametrizations) if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]
    return names + [name for name, _ in _hooks(module)]


def _hooks(module: nn.Module) -> list[tuple[str, Any]]:
    """Return parameter names with the hooks that compute them before every call, as in earlier versions of PyTorch."""
    return [
        (hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name, hook)
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, (WeightNorm, SpectralNorm, prune.BasePruningMethod))
    ]


def _compose_module(module: nn.Module) -> None:
    values = {}
    if parametrize.is_parametrized(module):
        values = {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]  # PyTorch's own removal would break copies, which share the class
    for name, hook in _hooks(module):
        if isinstance(hook, prune.BasePruningMethod):
            values[name] = hook.apply_mask(module)  # type: ignore[no-untyped-call]
            del module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"], vars(module)[name]
        else:
            hook.remove(module)
        for hooks in (module._forward_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks):
            for key in [
                key for key, registered in hooks.items() if hook in (registered, getattr(registered, "fn", None))
            ]:
                del hooks[key]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value.detach().clone()))


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Attribute → its value, and a copy of its content for a dictionary."""
    return {name: (value, value.copy() if isinstance(value, dict) else None) for name, value in vars(module).items()}


def _restore(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    vars(module).clear()
    for name, (value, content) in attributes.items():
        if content is not None:
            value.clear()
            value.update(content)
        vars(module)[name] = value
