"""The order in which the units of a set are removed; by ``l1`` if no layer of a known kind reads the set.

- ``l1``: mean absolute value of all weights that produce or read a unit; needs no data.
- ``fisher``: ½ mean square of the linearised change of the outputs when the unit is set to zero, in the curvature of
  the loss: the unit's block of the Fisher information over all its weights (arXiv 1906.10771 uses the sum of squares).
- ``obs``: the loss when the remaining weights compensate for a removed unit. Units are removed one by one: the cheapest
  goes first, then the weights and costs of the others are updated, so that of two equivalent channels only the first
  is cheap (block elimination with the inverse second moments; arXiv 2208.11580, 2302.04089). The outputs of a reader
  are weighted by their mean square gradient.

``fisher`` does not change when channels are scaled and the next layer is scaled back, and ``obs`` does not when all
channels of a layer are scaled alike. Otherwise ``obs`` changes, because moments are damped by a multiple of their mean.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.compressed.reconstruction import damped, readers
from qcompress.function_transforms import in_transform
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.coupled import CoupledSet
from qcompress.model.losses import Loss
from qcompress.model.tensors import held_tensors
from qcompress.structure.elimination import Elimination

READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Floats = NDArray[np.float64]


@dataclass(slots=True)
class Sensitivity:
    """Sensitivity of the outputs to the inputs and outputs of layers, over some data.

    Attributes:
        fisher: for each set (by name) the ``(units,)`` scores.
        outputs: for each layer (by path) the ``(channels,)`` mean square gradient of its outputs, summed over
            positions.
    """

    fisher: dict[str, Floats] = field(default_factory=dict)
    outputs: dict[str, Floats] = field(default_factory=dict)


def by_weight(model: nn.Module, item: CoupledSet) -> Floats:
    """Return the ``l1`` score of every unit."""
    tensors = {held.name: held.tensor for held in held_tensors(model)}
    sums, counts = np.zeros(item.num_units), 0.0
    for axis in item.axes:
        tensor = tensors[axis.tensor]
        if tensor.ndim < 2:
            continue
        others = [dim for dim in range(tensor.ndim) if dim != axis.dim]
        along = tensor.detach().abs().double().sum(dim=others).cpu().numpy()
        sums += along[axis.indices].sum(axis=1)
        counts += tensor.numel() / tensor.shape[axis.dim] * axis.indices.shape[1]
    return sums / max(counts, 1.0)


def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    sets: Sequence[CoupledSet],
    loss: Loss,
    forward: forwards.Forward | None,
    seed: int,
) -> Sensitivity:
    """Compute scores with a few backward passes per batch, from the inputs of the layers that read a set."""
    scores, num_samples = Sensitivity(), 0
    places = _places(model, sets)
    for index, batch in enumerate(data):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        calls, output = _watched(model, list(places), batch, forward)
        probes = loss.probes(output.detach(), batch, generator)
        num_samples += len(output)
        calls = [call for call in calls if call[2].requires_grad]  # others run without gradients
        handles = [tensor for call in calls for tensor in call[1:]]
        per_probe: list[dict[str, Tensor]] = []
        for probe in probes if calls and output.requires_grad else ():
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
                output,
                handles,
                grad_outputs=probe,
                retain_graph=True,
                allow_unused=True,
            )
            shares: dict[str, Tensor] = {}
            for (path, given, _), (back, front) in zip(
                calls, zip(gradients[::2], gradients[1::2], strict=True), strict=True
            ):
                if back is None or front is None:
                    continue
                module = model.get_submodule(path)
                squares = front.square().movedim(_channel_dim(module), -1)
                by_channel = squares.reshape(-1, squares.shape[-1]).sum(0)
                _add(scores.outputs, path, by_channel.double().cpu().numpy())
                share = _read(module, _per_sample(given.detach() * back, _channel_dim(module), len(output)))
                shares[path] = shares[path] + share if path in shares else share
            per_probe.append(shares)
        for item in sets:
            total = np.zeros(item.num_units)
            for shares in per_probe:
                effect = torch.zeros(len(output), item.num_units, dtype=torch.float64)
                for path, indices in places_of(places, item.name):
                    if path in shares:
                        effect += shares[path][:, torch.from_numpy(indices)].sum(-1).double().cpu()
                total += effect.square().sum(0).numpy()
            _add(scores.fisher, item.name, 0.5 * total)
    for table in (scores.fisher, scores.outputs):
        for name in table:
            table[name] /= max(num_samples, 1)
    return scores


def elimination_order(
    model: nn.Module, item: CoupledSet, moments: Mapping[str, Tensor], outputs: Mapping[str, Floats]
) -> list[int] | None:
    """Return the removal order by ``obs`` of all units but the last; None if no reader has known inputs."""
    eliminations = []
    for reader in readers(model, item):
        if reader.path in moments and reader.path in outputs:
            module = model.get_submodule(reader.path)
            rows = layers.to_rows(module, layers.weight_of(module).detach()).cpu().double()
            weight = torch.from_numpy(outputs[reader.path]).clamp(min=0.0).sqrt()
            columns = torch.from_numpy(reader.columns)
            eliminations.append(Elimination(rows * weight[:, None], damped(moments[reader.path]), columns))
    if not eliminations:
        return None
    alive, order = torch.ones(item.num_units, dtype=torch.bool), list[int]()
    for _ in range(item.num_units - 1):
        costs = torch.stack([elimination.costs() for elimination in eliminations]).sum(0)
        unit = int(costs.masked_fill(~alive, torch.inf).argmin())
        for elimination in eliminations:
            elimination.eliminate(unit)
        alive[unit] = False
        order.append(unit)
    return order


def _places(model: nn.Module, sets: Sequence[CoupledSet]) -> dict[str, dict[str, NDArray[np.int64]]]:
    """Return by layer (path) and set (name) the indices ``(units, per unit)`` of the layer's inputs in the set."""
    places: dict[str, dict[str, NDArray[np.int64]]] = {}
    names = {held.name: held.tensor for held in held_tensors(model)}
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, READERS) or layers.has_inputs_first(module):
            owners.setdefault(id(module.weight), []).append(path)
    for item in sets:
        for axis in item.axes:
            for path in owners.get(id(names[axis.tensor]), ()) if axis.reads else ():
                if axis.dim != layers.makes_second_dimension(model.get_submodule(path)):  # or a product turned around
                    places.setdefault(path, {})[item.name] = axis.indices
    return places


def places_of(places: Mapping[str, Mapping[str, NDArray[np.int64]]], name: str) -> list[tuple[str, NDArray[np.int64]]]:
    """Return the layers that read a set, with the indices of its units among their inputs."""
    return [(path, by_set[name]) for path, by_set in places.items() if name in by_set]


def _watched(
    model: nn.Module, paths: list[str], batch: Any, forward: forwards.Forward | None
) -> tuple[list[tuple[str, Tensor, Tensor]], Tensor]:
    """Run with gradients; return every call of the layers with its input and output, and the model's output.

    Calls that take or give something else than one tensor, or are inside a function transform, are left out.
    """
    calls: list[tuple[str, Tensor, Tensor]] = []
    given: dict[str, Tensor] = {}
    hooks = []
    for path in paths:
        module = model.get_submodule(path)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> Any:
            own = args[0] if args else kwargs.get("input")
            if not isinstance(own, Tensor) or in_transform():
                return None
            given[path] = own.clone() if own.requires_grad else own.detach().clone().requires_grad_(True)
            return ((given[path], *args[1:]), kwargs) if args else (args, {**kwargs, "input": given[path]})

        def after(_: nn.Module, __: Any, output: Any, path: str = path) -> Tensor | None:
            watched_input = given.pop(path, None)
            if watched_input is None or not isinstance(output, Tensor):
                return None
            calls.append((path, watched_input, output.clone()))
            return calls[-1][2].clone()  # the code that follows may overwrite it

        hooks += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        with torch.enable_grad():
            return calls, forwards.run(model, batch, forward)
    finally:
        for hook in hooks:
            hook.remove()


def _channel_dim(module: Any) -> int:
    """Return the dimension of the channels, counted from the last: inputs may have no dimension for samples."""
    return -1 if isinstance(module, nn.Linear) or layers.has_inputs_first(module) else -1 - len(module.kernel_size)


def _per_sample(values: Tensor, dim: int, samples: int) -> Tensor:
    """Sum over positions, to ``(samples, channels)``.

    Samples are the first dimension, or else the second one, or else flattened with positions, sample by sample and each
    with about as many.
    """
    moved = values[None] if values.ndim == 1 else values.movedim(dim, -1)
    if len(moved) != samples and moved.ndim > 2 and moved.shape[1] == samples:
        moved = moved.movedim(1, 0)
    owner = torch.arange(len(moved), device=moved.device) * samples // len(moved)
    sums = moved.reshape(len(moved), -1, moved.shape[-1]).sum(1)
    return sums.new_zeros(samples, sums.shape[1]).index_add_(0, owner, sums)


def _read(module: nn.Module, shares: Tensor) -> Tensor:
    """Sum shares over the groups of a convolution, which share the weight's reading dimension."""
    groups = getattr(module, "groups", 1)
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    return shares if groups == 1 or transposed else shares.view(len(shares), groups, -1).sum(1)


def _add(table: dict[str, Floats], name: str, values: Floats) -> None:
    table[name] = table[name] + values if name in table else values
