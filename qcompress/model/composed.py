"""Weights that a module computes from others: parametrizations, weight and spectral normalisation, pruning masks.

What such a module multiplies with is what they give, so that is what is measured and stored: a plain parameter of the
same name, with the same outputs. `composed` makes it so for a while, `compose_` for good.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from qcompress.model import forward as forwards

Removal = Callable[[], Any]


def compose_(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Make computed weights of ``model`` plain parameters, in place.

    Args:
        model: computes the same as before, in evaluation mode.
        names: of the weights in the state dict that are to be plain; None for all.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    >>> sorted(dict(layer.named_parameters()))
    ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
    >>> compose_(layer)
    >>> sorted(dict(layer.named_parameters())), type(layer).__name__
    (['bias', 'weight'], 'Linear')
    """
    found = [
        remove
        for path, module in model.named_modules()
        for parameter, remove in _removals(module).items()
        if names is None or f"{path}.{parameter}".lstrip(".") in names
    ]
    if not found:
        return
    with forwards.evaluating(model):  # training mode changes what some of them give
        for remove in found:
            remove()


@contextlib.contextmanager
def composed(model: nn.Module) -> Iterator[None]:
    """While open, computed weights of ``model`` are plain parameters."""
    before = [(module, type(module), _attributes(module)) for module in model.modules() if _removals(module)]
    try:
        compose_(model)
        yield
    finally:
        for module, kind, attributes in before:
            module.__class__ = kind
            _restore(module, attributes)


def _removals(module: nn.Module) -> dict[str, Removal]:
    """Name of a computed parameter → what makes it a plain one."""
    found: dict[str, Removal] = {}
    if parametrize.is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]
            found[name] = _partial(parametrize.remove_parametrizations, module, name)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            found[hook.name] = _partial(remove_weight_norm, module, hook.name)
        elif isinstance(hook, SpectralNorm):
            found[hook.name] = _partial(remove_spectral_norm, module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            found[hook._tensor_name] = _partial(prune.remove, module, hook._tensor_name)
    return found


def _partial(function: Callable[..., Any], module: nn.Module, name: str) -> Removal:
    def remove() -> None:
        function(module, name)
        if name not in module._parameters:  # a frozen one becomes a plain attribute
            value = getattr(module, name).detach()
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))

    return remove


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Attribute → itself, and of a dictionary what it holds."""
    return {name: (value, value.copy() if isinstance(value, dict) else None) for name, value in vars(module).items()}


def _restore(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    vars(module).clear()
    for name, (value, content) in attributes.items():
        if content is not None:
            value.clear()
            value.update(content)
        vars(module)[name] = value
