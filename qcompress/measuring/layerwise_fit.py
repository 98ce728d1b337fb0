"""Fit the layers of a smaller network, one after the other, to the outputs of the original's layers.

Each option is compensated separately, on the inputs of the original network. When many sets are cut at once, every
layer gets other inputs than it was fitted to. Therefore the layers are visited in the order in which they run, and each
is fitted by least squares to the outputs of the original's layer, on the inputs it receives in the smaller network
(channel pruning by reconstruction, arXiv 1707.06168). The fit of one layer is described in
`qcompress.measuring.least_squares`.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.compressed.cutting import beyond
from qcompress.compressed.reconstruction import FOLDS
from qcompress.compressed.record import Compression, record_of
from qcompress.errors import ModelError
from qcompress.measuring.inputs.moments import input_rows
from qcompress.measuring.least_squares import LayerSums, fitted
from qcompress.measuring.methods.products import wide
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.composed import composed
from qcompress.model.modes import outside_modes
from qcompress.model.padding import real_inputs
from qcompress.model.steady import kept_state
from qcompress.model.tensors import held_tensors, overlapping

CONVOLVING = (*layers.CONVOLUTIONS, *layers.TRANSPOSED)

SAME = 1e-3
"""Tolerated difference between a layer's outputs and its inputs times its weight: sums round differently."""

MAX_INPUTS = 16384
"""Largest number of weights per channel for which a layer is fitted (2 GB of sums)."""


class _EnoughError(Exception):
    """Raised to stop a run once the requested layer has been called."""


@forwards.layer_by_layer()
@outside_modes
def fit_in_turn_(
    smaller: nn.Module,
    original: nn.Module,
    data: Iterable[Any],
    forward: forwards.Forward | None = None,
    *,
    unchanged: Collection[str] = (),
) -> nn.Module:
    """Fit the linear and convolutional layers of ``smaller``, in place and in the order in which they run.

    Args:
        smaller: the model that `qcompress.apply` made from ``original`` by removing channels.
        original: the original model; it is not modified.
        data: re-iterable batches. One batch is run once, and every layer is fitted when its inputs arrive; of several
            batches each layer needs one pass, which stops at the layer.
        forward: how to run a batch.
        unchanged: paths of layers that are left as they are.

    The fit is to these samples; few of them may make the network worse for others. `compress` keeps the fitted network
    only if it loses less on held-out samples.

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
    with (
        composed(original), kept_state(smaller), kept_state(original),
        forwards.evaluating(smaller), forwards.evaluating(original), torch.no_grad(),
    ):  # fmt: skip
        kept = _kept_rows(original, record)
        paths = _in_order(smaller, data, forward)
        if len(list(islice(data, 2))) == 1:
            _fit_on_the_way(smaller, original, paths, unchanged, kept, forwards.first_batch(data), forward)
            return smaller
        for path in (path for path in paths if path not in unchanged):
            given = _inputs_and_goals(smaller, original, path, data, forward)
            _fit(smaller.get_submodule(path), kept.get(path), given, last=path == paths[-1])
    return smaller


def _fit_on_the_way(
    smaller: nn.Module,
    original: nn.Module,
    paths: Sequence[str],
    unchanged: Collection[str],
    kept: Mapping[str, NDArray[np.int64]],
    batch: Any,
    forward: forwards.Forward | None,
) -> None:
    """Fit the layers during one run of a batch: all layers before are fitted when the inputs of a layer arrive."""
    wanted: dict[str, Tensor] = {}

    def keep(_: nn.Module, __: Any, output: Tensor, path: str) -> None:
        wanted[path] = output.clone()  # the code that follows may overwrite it

    def fit(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        _fit(module, kept.get(path), [(given, wanted.pop(path), batch)], last=path == paths[-1])

    hooks = [original.get_submodule(path).register_forward_hook(partial(keep, path=path)) for path in paths]
    try:
        forwards.run(original, batch, forward)
        hooks += [
            smaller.get_submodule(path).register_forward_pre_hook(partial(fit, path=path), with_kwargs=True)
            for path in paths
            if path not in unchanged
        ]
        forwards.run(smaller, batch, forward)
    finally:
        for hook in hooks:
            hook.remove()


def _kept_rows(original: nn.Module, record: Compression) -> dict[str, NDArray[np.int64]]:
    """Return the kept output channels of each layer that lost some, numbered as in the original.

    The original may itself be the result of an earlier removal.
    """
    before, parameters = record_of(original), dict(original.named_parameters())
    stays: dict[str, Tensor] = {}
    for (name, dim), gone in (record.cuts if before is None else beyond(record.cuts, before.cuts, original)).items():
        path, _, kind = name.rpartition(".")
        if kind == "weight" and name in parameters:
            mask = stays.setdefault(path, torch.ones(parameters[name].shape, dtype=torch.bool))
            mask.index_fill_(dim, torch.tensor(gone, dtype=torch.int64), False)
    rows = {path: layers.to_rows(original.get_submodule(path), mask) for path, mask in stays.items()}
    return {path: mask.any(dim=1).nonzero()[:, 0].numpy() for path, mask in rows.items()}


def _in_order(model: nn.Module, data: Iterable[Any], forward: forwards.Forward | None) -> list[str]:
    """Return the paths of the layers that can be fitted and are called exactly once, in the order of their calls.

    A weight that several layers hold cannot be fitted to one of them.
    """
    called: list[str] = []
    fitting: dict[str, bool] = {}
    held = held_tensors(model)
    holders = Counter(id(item.tensor) for item in held)
    shared = {*overlapping(held), *(tensor for tensor, count in holders.items() if count > 1)}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, path: str) -> None:
        called.append(path)
        fitting[path] = _is_product(module, args[0] if args else next(iter(kwargs.values())), output)

    hooks = [
        module.register_forward_hook(partial(note, path=path), with_kwargs=True)
        for path, module in model.named_modules()
        if _may_fit(module) and id(layers.weight_of(module)) not in shared
    ]
    try:
        first = forwards.first_batch(data)
        with forwards.first_pass(first):
            forwards.run(model, first, forward)
    finally:
        for hook in hooks:
            hook.remove()
    return [path for path in dict.fromkeys(called) if called.count(path) == 1 and fitting[path]]


def _may_fit(module: nn.Module) -> bool:
    """Whether the layer is of a kind that can be fitted, has weights, and its sums fit into memory."""
    kinds = (nn.Linear, *layers.CONVOLUTIONS, *(layers.TRANSPOSED if _groups(module) == 1 else ()))
    if not (isinstance(module, kinds) or layers.has_inputs_first(module)) or "weight" not in module._parameters:
        return False
    weight = layers.weight_of(module)
    return weight.numel() > 0 and _groups(module) * layers.to_rows(module, weight).shape[1] ** 2 <= MAX_INPUTS**2


def _groups(module: nn.Module) -> int:
    return int(getattr(module, "groups", 1))


def _is_product(module: nn.Module, given: Tensor, output: Any) -> bool:
    """Whether the output for the first sample is the layer's rows of inputs times its weight, plus its bias."""
    size = 2 + len(module.kernel_size) if isinstance(module, CONVOLVING) else max(2, given.ndim)
    if given.ndim != size or not len(given) or not isinstance(output, Tensor) or output.ndim != size:
        return False
    weight, bias = layers.weight_of(module), getattr(module, "bias", None)
    rows = torch.cat([_grouped(module, chunk) for chunk in input_rows(module, given[:1])], dim=1)
    found = wide(_rows_of_outputs(module, output[:1]))
    product = (rows @ _by_group(module, layers.to_rows(module, wide(weight))).mT).movedim(0, 1).flatten(1)
    expected = product if bias is None else product + bias
    tolerance = max(SAME, 4 * torch.finfo(output.dtype).eps)
    return expected.shape == found.shape and bool(((expected - found).abs() <= tolerance * found.abs().max()).all())


def _fit(
    module: nn.Module, kept: NDArray[np.int64] | None, given: Iterable[tuple[Tensor, Tensor, Any]], *, last: bool
) -> None:
    """Fit one layer, from its inputs in the smaller network and its outputs in the original, for every batch."""
    folds, seen = [LayerSums() for _ in range(FOLDS)], 0
    for inputs, wanted, batch in given:
        real = real_inputs(batch, module, inputs)
        for start in range(min(FOLDS, len(inputs))):
            sums = folds[(seen + start) % FOLDS]  # samples take turns, also from batch to batch
            own, own_wanted = inputs[start::FOLDS], wanted[start::FOLDS]
            if real is not None:
                own, own_wanted = own[real[start::FOLDS]], own_wanted[real[start::FOLDS]]
            goal = _rows_of_outputs(module, own_wanted)
            if kept is not None:
                goal = goal[:, torch.from_numpy(kept)]
            bias = getattr(module, "bias", None)
            goal = wide(goal if bias is None else goal - bias)
            done = 0
            for chunk in input_rows(module, own):
                rows = _grouped(module, chunk)
                part = goal[done : (done := done + rows.shape[1])]
                sums.add(rows, part.reshape(len(part), len(rows), -1).movedim(1, 0))
        seen += len(inputs)
    weight = layers.weight_of(module)
    before = _by_group(module, layers.to_rows(module, weight.detach()).double())
    after = fitted(before, folds, last=last).flatten(0, 1)
    weight.copy_(layers.from_rows(module, after.to(weight), weight.shape))


def _grouped(module: nn.Module, rows: Tensor) -> Tensor:
    """Return rows of inputs as ``(groups, positions, weights per channel)``."""
    return rows if _groups(module) > 1 else rows[None]


def _by_group(module: nn.Module, rows: Tensor) -> Tensor:
    """Return rows of a weight as ``(groups, channels per group, weights per channel)``."""
    return rows.reshape(_groups(module), -1, rows.shape[1])


def _inputs_and_goals(
    smaller: nn.Module, original: nn.Module, path: str, data: Iterable[Any], forward: forwards.Forward | None
) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """Yield a layer's input in the smaller model, its output in the original, and the batch, if the batch calls it."""
    for batch in data:
        own, wanted = (_called(model, path, batch, forward) for model in (smaller, original))
        if own is not None and wanted is not None:
            yield own[0], wanted[1], batch


def _called(model: nn.Module, path: str, batch: Any, forward: forwards.Forward | None) -> tuple[Tensor, Tensor] | None:
    """Run the model up to a layer, and return the layer's input and output; None if the batch does not call it."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        calls.append((given.clone(), output.clone()))  # they may lie in attributes, which are restored
        raise _EnoughError

    hook = model.get_submodule(path).register_forward_hook(note, with_kwargs=True)
    try:
        forwards.run(model, batch, forward)
    except _EnoughError:
        return calls[0]
    finally:
        hook.remove()
    return None


def _rows_of_outputs(module: nn.Module, output: Tensor) -> Tensor:
    """Return outputs as rows, ``(positions, channels)``."""
    return (output.movedim(1, -1) if isinstance(module, CONVOLVING) else output).flatten(0, -2)
