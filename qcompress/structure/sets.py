"""Coupled sets: equivalent channels, each with everything that must be removed together with it.

A **unit** is the smallest thing that can be removed: a channel with the filter that produces it, its parameters in
normalisation layers, and the weights that read it; the same channel in all layers whose outputs are added; or a whole
attention head with its queries, keys and values. A **set** is the units that lie along the same dimensions of the same
tensors, such as the channels of one layer. A set is subject to one decision: how many of its units stay.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.batches import own
from qcompress.model.coupled import Axis, CoupledSet
from qcompress.model.tensors import held_tensors, overlapping, unregistered_modules
from qcompress.structure.constraints import settle
from qcompress.structure.nodes import Nodes, NodeSet
from qcompress.structure.rules import rule_of
from qcompress.structure.tracing import Tracer, compacted, distinct


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Structure:
    """The removable parts of a model.

    Attributes:
        sets: coupled sets, ordered by the first layer of each.
        kept: for each layer that keeps all output channels (by name) the reason.
    """

    sets: tuple[CoupledSet, ...]
    kept: dict[str, str]


def trace(model: nn.Module, batch: Any, forward: forwards.Forward | None = None) -> Structure:
    """Find the coupled sets of ``model`` by tracing one batch; see `qcompress.structure.find.find_sets`."""
    held = held_tensors(model)
    nodes = NodeSet(held)
    tracer = Tracer(nodes, held, rule_of)
    given = own(batch)
    with forwards.evaluating(model), forwards.layer_by_layer(), torch.no_grad(), tracer:
        output = (forward or forwards.default_forward)(model, given)
    labels = tracer.labels(output)
    if labels is not None:
        nodes.block(distinct(labels), "it reaches the output")
    shared = overlapping(held)
    unseen = tuple(unregistered_modules(model))
    for item in held:
        if id(item.tensor) in shared:
            tracer.block(item.tensor, f"it shares memory with {shared[id(item.tensor)]!r}")
        elif unseen and item.name.startswith(unseen):
            tracer.block(item.tensor, "in a plain list or dict, where PyTorch does not see it")
    roots, reasons = settle(tracer)
    outputs_second = {
        f"{path}.weight".lstrip(".") for path, module in model.named_modules() if layers.makes_second_dimension(module)
    }
    return _grouped(tracer, roots, reasons, outputs_second)


def _grouped(tracer: Tracer, roots: Nodes, reasons: dict[int, str], outputs_second: set[str]) -> Structure:
    """Group units along the same dimensions, and collect the layers whose channels stay.

    Args:
        tracer: what was seen.
        roots: root of every node.
        reasons: reasons of blocked roots.
        outputs_second: weights whose outputs are along dimension 1.
    """
    nodes = tracer.nodes
    members: dict[int, dict[tuple[str, int], list[int]]] = {}
    kept: dict[str, str] = {}
    for (name, dim), start in nodes.starts.items():
        dim_roots = roots[start : start + nodes.sizes[name, dim]].tolist()
        if (
            dim == (name in outputs_second)
            and name.endswith("weight")
            and dim_roots[0] in reasons
            and nodes.sizes[name, dim] > 1
        ):
            kept.setdefault(name.rpartition(".")[0], reasons[dim_roots[0]])
        for index, root in enumerate(dim_roots):
            if root not in reasons:
                members.setdefault(root, {}).setdefault((name, dim), []).append(index)
    alike: dict[tuple[Any, ...], list[dict[tuple[str, int], list[int]]]] = {}
    for unit in members.values():
        if any(place in tracer.reads for place in unit) and len(unit) > 1:
            signature = tuple((place, len(indices)) for place, indices in unit.items())
            alike.setdefault(signature, []).append(unit)
    work = _work(tracer, roots)
    sets: list[CoupledSet] = []
    for signature, units in alike.items():
        if len(units) < 2:
            kept.setdefault(_layer(signature[0][0][0]), "all its channels are coupled")
            continue
        axes = tuple(
            Axis(
                tensor=place[0],
                dim=place[1],
                reads=place in tracer.reads,
                indices=np.array([unit[place] for unit in units], dtype=np.int64),
            )
            for place, _ in signature
        )
        root = int(roots[nodes.starts[signature[0][0]] + units[0][signature[0][0]][0]])
        mixed = {name: shares[root] for name, shares in work.items() if name and root in shares}
        name, share = _name(axes, [item.name for item in sets]), work.get("", {}).get(root, 0.0)
        sets.append(CoupledSet(name=name, axes=axes, work=share, mixed=mixed))
    made = {_layer(axis.tensor) for item in sets for axis in item.axes if not axis.reads}
    with_choice = made | {item.name for item in sets}
    return Structure(sets=tuple(sets), kept={layer: why for layer, why in kept.items() if layer not in with_choice})


def _work(tracer: Tracer, roots: Nodes) -> dict[str, dict[int, float]]:
    """Map each parameter, or "" for products of activations, to the share of each root in its products."""
    shares: dict[str, dict[int, float]] = {}
    totals: dict[str, float] = {}
    for labels, each, source in tracer.work:
        whole, inside, of_source = labels.numel() * each, compacted(labels), shares.setdefault(source, {})
        totals[source] = totals.get(source, 0.0) + whole
        distinct, counts = np.unique(roots[inside], return_counts=True)
        for root, count in zip(distinct.tolist(), counts.tolist(), strict=True):
            of_source[root] = of_source.get(root, 0.0) + whole * count / inside.size
    return {
        source: {root: share / totals[source] for root, share in of_source.items()}
        for source, of_source in shares.items()
        if totals[source]
    }


def _layer(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor


def _name(axes: tuple[Axis, ...], taken: list[str]) -> str:
    """Return the first layer that produces the units; with a number after it if several sets begin there."""
    making = [axis for axis in axes if not axis.reads] or list(axes)
    name, count = _layer(making[0].tensor), 1
    while (candidate := name if count == 1 else f"{name} ({count})") in taken:
        count += 1
    return candidate
