"""Find the layers that smaller ones can replace: the network uses nothing that the smaller ones lack.

A network may read a layer's attributes, check its class, or use its weight without calling the layer. So before
anything is measured, one batch is run with modules in place of the layers that compute exactly the same, while the
original weights are zero.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.compressed.factored import factored, replace_
from qcompress.measurement import Measurement, has_choice
from qcompress.model import forward as forwards
from qcompress.model.composed import put_back
from qcompress.model.layers import weight_of
from qcompress.model.parts import Part, Survey
from qcompress.model.plain_state import plain_tensors
from qcompress.model.sites import Site
from qcompress.model.steady import SAME, Steady, relative_difference
from qcompress.model.tensors import Held, held_tensors, overlapping
from qcompress.options import Options
from qcompress.transforms.base import Transform

_NOTED, _ALONE = ": not replaced by smaller layers, ", "it cannot be replaced by smaller layers: "


def tried_out(model: nn.Module, inventory: Survey, options: Mapping[str, Options], batch: Any, run: Steady) -> Survey:
    """Return the survey, with the replaceable layers that the network needs as they are.

    Args:
        model: the model, in evaluation mode; it is as before afterwards.
        inventory: its parts.
        options: options by part name.
        batch: the batch that is run.
        run: how to run it.
    """
    needed = _irreplaceable(model, inventory.parts, options, batch, run)
    parts = tuple(
        replace(part, target=replace(part.target, replaceable=False, window=None, lookups=0.0))
        if part.name in needed
        else part
        for part in inventory.parts
    )
    return replace(inventory, parts=parts, needed=needed)


def _irreplaceable(
    model: nn.Module, parts: Sequence[Part], options: Mapping[str, Options], batch: Any, run: Steady
) -> dict[str, str]:
    sites = {
        part.name: part.site(model)
        for part in parts
        if any(offer.replaces_layer(part.target) for offer in options[part.name].offers)
    }
    if not sites:
        return {}
    found = _held_elsewhere(model, sites)
    found |= {name: why for name, site in sites.items() if (why := _why_more(site.module))}
    left = {name: site.module for name, site in sites.items() if name not in found}
    with torch.no_grad():
        expected = forwards.run(model, batch, run)
        at_fault = _at_fault(left, lambda layers: _why_not(model, layers, batch, run, expected))
        rest = {name: layer for name, layer in left.items() if name not in at_fault}
        if at_fault and (why := _why_not(model, rest.values(), batch, run, expected)):
            at_fault |= dict.fromkeys(rest, why)
    return found | at_fault


def _at_fault(layers: Mapping[str, nn.Module], why_not: Callable[[Iterable[nn.Module]], str]) -> dict[str, str]:
    """Return the layers that cannot be replaced, found by bisection; if some fail only together, all of them."""
    why = why_not(layers.values())
    if not why or len(layers) == 1:
        return dict.fromkeys(layers, why) if why else {}
    names = list(layers)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    found = [_at_fault({name: layers[name] for name in half}, why_not) for half in halves]
    return found[0] | found[1] or dict.fromkeys(layers, why)


def not_replaced(measured: Survey | Measurement, message: str, most: int = 3) -> str:
    """Say which layers smaller ones cannot replace and why, most frequent reason first; empty without such layers.

    Args:
        measured: where the parts come from.
        message: the message so far; reasons in it are not repeated.
        most: maximum number of reasons, and of layers with each.
    """
    if isinstance(measured, Survey):
        needed = measured.needed
    else:
        noted = [note.partition(_NOTED) for note in measured.notes]
        needed = {name: why for name, _, why in noted if why}
        needed |= {name: why.removeprefix(_ALONE) for name, why in measured.no_choice.items() if why.startswith(_ALONE)}
    names: dict[str, list[str]] = {}
    for name, why in needed.items():
        if why not in message:
            names.setdefault(why, []).append(name)
    return "".join(
        f". Smaller layers cannot replace {', '.join(map(repr, own[:most]))}"
        f"{f' and {len(own) - most} more' if len(own) > most else ''}: {why}"
        for why, own in sorted(names.items(), key=lambda item: -len(item[1]))[:most]
    )


def reasons_and_notes(inventory: Survey, transforms: Sequence[Sequence[Transform]]) -> tuple[dict[str, str], list[str]]:
    """Return why parts have no choice, and notes on those that have other options."""
    no_choice, notes = {}, []
    for part, options in zip(inventory.parts, transforms, strict=True):
        why = inventory.needed.get(part.name)
        if why is not None and has_choice(options):
            notes.append(f"{part.name}{_NOTED}{why}")
        elif why is not None:
            no_choice[part.name] = f"{_ALONE}{why}"
    return no_choice, notes


def _held_elsewhere(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, str]:
    """Return name → what else refers to the weight, for weights that something else refers to."""
    names = {id(site.weight): name for name, site in sites.items()}
    own = [Held(name=name, tensor=site.weight, module=site.module, key="") for name, site in sites.items()]
    plain = [Held(name=name, tensor=tensor, module=model, key="") for name, tensor in plain_tensors(model).items()]
    found = {
        names[id(item.tensor)]: item.name
        for item in [*held_tensors(model), *plain]
        if id(item.tensor) in names and item.module is not sites[names[id(item.tensor)]].module
    }
    found |= {names[key]: other for key, other in overlapping([*own, *plain]).items() if key in names}
    return {name: f"{other!r} refers to its weight" for name, other in found.items()}


def _why_more(layer: nn.Module) -> str:
    """Return what a layer has that a smaller one would not keep, or an empty string."""
    if layer._modules:
        return "it holds modules of its own"
    return "its class has extra state" if type(layer).get_extra_state is not nn.Module.get_extra_state else ""


def _why_not(model: nn.Module, layers: Iterable[nn.Module], batch: Any, run: Steady, expected: Tensor) -> str:
    """Return why the model gives other outputs with modules in place of layers, or an empty string."""
    try:
        with _replaced(layers):
            output = forwards.run(model, batch, run)
    except Exception as error:  # the model's own code may raise anything
        if forwards.is_out_of_memory(error):
            raise
        return f"the network needs the layer itself ({type(error).__name__}: {error})"
    if relative_difference(expected, output) > SAME:
        return "the network uses it other than by calling it, and gives another output with a module in its place"
    return ""


@contextlib.contextmanager
def _replaced(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Replace layers by factored ones that compute the same, with zero weights; restore the layers on exit."""
    layers = list(layers)
    weights = [(weight, weight.data) for weight in map(weight_of, layers)]
    try:
        with put_back(layers):
            for layer in layers:
                _replace_by_equal(layer)
            for weight, data in weights:
                weight.data = data.new_zeros(()).expand(data.shape)
            yield
    finally:
        for weight, data in weights:
            weight.data = data


def _replace_by_equal(layer: nn.Module) -> None:
    """Replace a layer by a factored one that hands its input to a copy of the layer without hooks."""
    dense = object.__new__(type(layer))
    vars(dense).update({name: dict(value) if isinstance(value, dict) else value for name, value in vars(layer).items()})
    dense._parameters["weight"] = nn.Parameter(weight_of(layer).data, requires_grad=False)
    rows, columns = Site(layer).rows.shape
    names = ("basis", "codes") if isinstance(layer, nn.Embedding) else ("reduce", "expand")
    narrow = torch.zeros(1, columns), torch.zeros(rows, 1)
    other = factored(layer, dict(zip(names, narrow, strict=True)))

    def forward(self: nn.Module, input: Tensor) -> Any:  # noqa: A002, ARG001
        return dense.forward(input)

    other.__class__ = type(
        type(other).__name__,
        (type(other),),
        {"forward": forward, "to_dense": lambda self: dense},  # noqa: ARG005
    )
    replace_(layer, other)
