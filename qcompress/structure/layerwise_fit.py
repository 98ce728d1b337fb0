"""Fit the layers of a smaller network, one after the other, to the outputs of the original's layers.

Each option is compensated by itself, on the inputs of the original network. When many sets are cut at once, every layer
gets other inputs than it was fitted to. Therefore the layers are visited in the order in which they run, and each is
fitted by least squares to the outputs of the original's layer, on the inputs it receives in the smaller network
(channel pruning by reconstruction, arXiv 1707.06168). A ridge term keeps weights that hardly affect the outputs close
to their values; it is chosen by cross-validation: by what a fit to most of the samples does for the others.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from qcompress.compressed.reconstruction import DAMPINGS, FOLDS
from qcompress.compressed.record import Compression, record_of
from qcompress.errors import ModelError
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.composed import composed
from qcompress.model.modes import outside_modes
from qcompress.model.padding import real_inputs
from qcompress.model.tensors import held_tensors, overlapping

MAX_INPUTS = 16384
"""Largest number of weights per channel for which a layer is fitted (2 GB of sums)."""


class _EnoughError(Exception):
    """Raised to stop a run once the requested layer has been called."""


@forwards.layer_by_layer()
@outside_modes
def fit_in_turn_(
    smaller: nn.Module, original: nn.Module, data: Iterable[Any], forward: forwards.Forward | None = None
) -> nn.Module:
    """Fit the Linear and Conv2d layers of ``smaller``, in place and in the order in which they run.

    Args:
        smaller: the model that `qcompress.apply` made from ``original`` by removing channels.
        original: the original model; it is not modified.
        data: re-iterable batches. One batch is run once, and every layer is fitted when its inputs arrive; of several
            batches each layer needs one pass, which stops at the layer.
        forward: how to run a batch.

    Raises:
        ModelError: ``smaller`` has no record of removed channels.
        DataError: the model does not accept the first batch.

    >>> from qcompress import apply, formulate, measure, mean_loss, prune_channels, solve
    >>> model, data = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), [torch.randn(64, 4)]
    >>> measurement = measure(model, data, prune_channels(keep=(0.5,)), loss="mse")
    >>> smaller = apply(model, measurement, solve(formulate(measurement, {"macs": 0.6}), "brute-force"))
    >>> before = mean_loss(model, smaller, data, loss="mse")
    >>> mean_loss(model, fit_in_turn_(smaller, model, data), data, loss="mse") <= before
    True
    """
    record = record_of(smaller)
    if record is None or not record.smaller:
        raise ModelError("the model has no record of removed channels: give what apply() made by prune_channels()")
    forwards.require_samples_in(data, "data")
    with composed(original), forwards.evaluating(smaller), forwards.evaluating(original), torch.no_grad():
        kept = _kept_rows(original, record)
        paths = _in_order(smaller, data, forward)
        if len(list(islice(data, 2))) == 1:
            _fit_on_the_way(smaller, original, paths, kept, forwards.first_batch(data), forward)
            return smaller
        for path in paths:
            given = (
                (
                    _inputs_and_outputs(smaller, path, batch, forward)[0],
                    _inputs_and_outputs(original, path, batch, forward)[1],
                    batch,
                )
                for batch in data
            )
            _fit(smaller.get_submodule(path), kept.get(path), given)
    return smaller


def _fit_on_the_way(
    smaller: nn.Module,
    original: nn.Module,
    paths: Sequence[str],
    kept: Mapping[str, NDArray[np.int64]],
    batch: Any,
    forward: forwards.Forward | None,
) -> None:
    """Fit the layers during one run of a batch: all layers before are fitted when the inputs of a layer arrive."""
    wanted: dict[str, Tensor] = {}

    def keep(_: nn.Module, __: Any, output: Tensor, path: str) -> None:
        wanted[path] = output.clone()  # the code that follows may overwrite it

    def fit(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> None:
        given = args[0] if args else kwargs["input"]
        _fit(module, kept.get(path), [(given, wanted.pop(path), batch)])

    hooks = [original.get_submodule(path).register_forward_hook(partial(keep, path=path)) for path in paths]
    try:
        forwards.run(original, batch, forward)
        hooks += [
            smaller.get_submodule(path).register_forward_pre_hook(partial(fit, path=path), with_kwargs=True)
            for path in paths
        ]
        forwards.run(smaller, batch, forward)
    finally:
        for hook in hooks:
            hook.remove()


def _kept_rows(original: nn.Module, record: Compression) -> dict[str, NDArray[np.int64]]:
    """Return the kept output channels of each layer that lost some, numbered as in the original.

    The original may itself be the result of an earlier removal.
    """
    before, kept = record_of(original), {}
    parameters = dict(original.named_parameters())
    for (name, dim), gone in record.cuts.items():
        if dim == 0 and name.endswith("weight") and name in parameters:
            earlier = () if before is None else before.cuts.get((name, 0), ())
            present = np.setdiff1d(np.arange(len(parameters[name]) + len(earlier)), earlier)
            kept[name.rpartition(".")[0]] = np.flatnonzero(~np.isin(present, gone))
    return kept


def _in_order(model: nn.Module, data: Iterable[Any], forward: forwards.Forward | None) -> list[str]:
    """Return the paths of the layers that can be fitted and are called exactly once, in the order of their calls."""
    called: list[str] = []
    shared = overlapping(held_tensors(model))
    hooks = [
        module.register_forward_hook(lambda *_, path=path: called.append(path))
        for path, module in model.named_modules()
        if _fits(module) and module.weight.numel() and id(module.weight) not in shared
    ]
    try:
        first = forwards.first_batch(data)
        with forwards.first_pass(first):
            forwards.run(model, first, forward)
    finally:
        for hook in hooks:
            hook.remove()
    return [path for path in dict.fromkeys(called) if called.count(path) == 1]


def _fits(module: nn.Module) -> bool:
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or not layers.is_plain(module):
        return False
    plain = not isinstance(module, nn.Conv2d) or (module.groups == 1 and module.padding_mode == "zeros")
    return plain and module.weight[0].numel() <= MAX_INPUTS and not isinstance(getattr(module, "padding", 0), str)


def _fit(module: nn.Module, kept: NDArray[np.int64] | None, given: Iterable[tuple[Tensor, Tensor, Any]]) -> None:
    """Fit one layer, from its inputs in the smaller network and its outputs in the original, for every batch."""
    folds, seen = [_Sums() for _ in range(FOLDS)], 0
    for inputs, wanted, batch in given:
        real = real_inputs(batch, module, inputs)
        for start in range(min(FOLDS, len(inputs))):
            sums = folds[(seen + start) % FOLDS]  # samples take turns, also from batch to batch
            own, own_wanted = inputs[start::FOLDS], wanted[start::FOLDS]
            if real is not None:
                own, own_wanted = own[real[start::FOLDS]], own_wanted[real[start::FOLDS]]
            rows, goal = _rows(module, own), _rows_of_outputs(module, own_wanted)
            if kept is not None:
                goal = goal[:, torch.from_numpy(kept)]
            bias = getattr(module, "bias", None)
            sums.add(rows, goal if bias is None else goal - bias)
        seen += len(inputs)
    weight = layers.weight_of(module)
    before = layers.to_rows(module, weight.detach()).double()
    after = _fitted(before, folds)
    weight.copy_(layers.from_rows(module, after.to(weight), weight.shape))


@dataclass(slots=True)
class _Sums:
    """Sums over inputs x and wanted outputs y of a layer: ``(n, n)`` of x·xᵀ and ``(channels, n)`` of y·xᵀ."""

    moments: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    cross: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, rows: Tensor, goal: Tensor) -> None:
        """Add the sums over a batch."""
        self.moments = self.moments + (rows.T @ rows).double()
        self.cross = self.cross + (goal.T @ rows).double()

    def without(self, other: "_Sums") -> "_Sums":
        """Return the sums over those of the samples that are not in ``other``."""
        return _Sums(self.moments - other.moments, self.cross - other.cross)

    def ridge(self, before: Tensor, damping: float) -> Tensor:
        """Return the weight of least squares with a ridge term towards ``before``."""
        diagonal = damping * float(self.moments.diagonal().mean()) + 1e-30
        held = self.moments + torch.eye(len(self.moments), dtype=torch.float64) * diagonal
        change: Tensor = torch.linalg.solve(held, (self.cross - before @ self.moments).T).T
        return before + change

    def error(self, weight: Tensor) -> float:
        """Return the squared error of the outputs, up to a constant."""
        return float(((weight @ self.moments - 2 * self.cross) * weight).sum())


def _fitted(before: Tensor, folds: Sequence[_Sums]) -> Tensor:
    """Return the fitted weight, with the ridge term that is best on samples not fitted to; or ``before`` if none is.

    A layer may have more inputs than the data has independent samples: then its own error says little.
    """
    reached = [fold for fold in folds if fold.moments.any()]
    whole = _Sums(sum(fold.moments for fold in reached), sum(fold.cross for fold in reached))  # type: ignore[arg-type]
    if len(reached) < 2:  # a single sample
        return whole.ridge(before, DAMPINGS[0])
    errors = {
        damping: sum(fold.error(whole.without(fold).ridge(before, damping)) for fold in reached) for damping in DAMPINGS
    }
    best = min(DAMPINGS, key=errors.__getitem__)
    return whole.ridge(before, best) if errors[best] < whole.error(before) else before


def _inputs_and_outputs(
    model: nn.Module, path: str, batch: Any, forward: forwards.Forward | None
) -> tuple[Tensor, Tensor]:
    """Run the model up to a layer, and return the layer's input and output."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        calls.append((args[0] if args else kwargs["input"], output))
        raise _EnoughError

    hook = model.get_submodule(path).register_forward_hook(note, with_kwargs=True)
    try:
        forwards.run(model, batch, forward)
    except _EnoughError:
        return calls[0]
    finally:
        hook.remove()
    raise ModelError(f"{path!r} was called by one batch and not by another")


def _rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return inputs as rows, ``(positions, weights per channel)``."""
    if isinstance(module, nn.Conv2d):
        sizes = (module.kernel_size, module.dilation, module.padding, module.stride)
        unfolded = functional.unfold(inputs, *sizes)  # type: ignore[arg-type]
        return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])
    return inputs.reshape(-1, inputs.shape[-1])


def _rows_of_outputs(module: nn.Module, output: Tensor) -> Tensor:
    """Return outputs as rows, ``(positions, channels)``."""
    if isinstance(module, nn.Conv2d):
        return output.flatten(2).transpose(1, 2).reshape(-1, output.shape[1])
    return output.reshape(-1, output.shape[-1])
