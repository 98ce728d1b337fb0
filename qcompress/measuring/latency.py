"""Latency as a resource: the seconds that a batch spends in every layer, and in each alternative to the layer.

Multiply-accumulates predict time poorly: they miss channel counts that do not fill a vector, 1×1 layers that wait for
memory, and the cost of an extra call. So the time is measured. It is additive like every resource, because a layer's
time hardly depends on its neighbours: each call reads and writes plain tensors.

The time of the whole model is split at the beginnings and ends of its layers. A factored layer gets the time of its
dense layer within the model, multiplied by the ratio of the two on the actual inputs of the layer. Every time is the
median of several runs. Layers of the same kind and size with inputs of the same shape are timed as one.

Invariants: the times of all layers and the rest add up to ``original``; only `time_options` reads a clock. Its times
vary from run to run, but they are stored in the measurement, and everything after that is as reproducible as with
bytes.
"""

from collections.abc import Callable, Hashable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from formulations import FileFormatError
from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from formulations.resource_pairs import arrays_of, matrix_from
from qcompress.budgets import LATENCY
from qcompress.compressed.apply import require_measured
from qcompress.compressed.factored import factored
from qcompress.measurement import Measurement, require_measurement
from qcompress.measuring import stopwatch
from qcompress.measuring.channel_latency import channels_timed
from qcompress.measuring.stopwatch import TimingProgress
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.batches import own, require_samples
from qcompress.model.composed import composed
from qcompress.model.steady import kept_state
from qcompress.scalars import as_whole, require_kinds
from qcompress.transforms.base import Target, Transform

FILE_KIND = FileKind("qcompress latency", version=1)
REPEATS = 15
TOGETHER = "together"  # name of arrays in a file


def time_options(
    model: nn.Module,
    measurement: Measurement,
    batch: Any,
    *,
    forward: forwards.Forward | None = None,
    repeats: int = REPEATS,
    on_progress: Callable[[TimingProgress], None] | None = None,
) -> Measurement:
    """Return the measurement with an additional resource, ``latency_s``: seconds for a forward pass of ``batch``.

    The time is measured in evaluation mode, operation by operation, on the model's device, with PyTorch's current
    number of threads: use a batch like those in production, and set ``torch.set_num_threads``. On one CPU thread it is
    processor time, so that other programs do not count; otherwise it is wall time, and the machine should be idle.

    Options that change a layer's weight but keep the layer get the layer's own time; a block of channels gets its
    share of the rows. Removals of channels are timed on the whole network (`qcompress.measuring.channel_latency`).
    Everything that is in no part (activations, normalisation, Python) is in ``fixed``.

    Args:
        model: the model that was measured; it is not modified.
        measurement: the result of `measure`. An existing ``latency_s`` is replaced.
        batch: one batch, in the form that `measure` accepts.
        forward: ``(model, batch) -> output tensor`` where the default does not fit.
        repeats: number of runs whose median is taken.
        on_progress: called once the unmodified layers have been timed, and after every group of equal layers.

    Raises:
        ModelError: the model is not the measured one, or calls its layers in a different order from run to run.
        OptionsError: ``repeats`` is not a whole number from 1, or times of channels do not add up.
        DataError: the model does not accept the batch, or it holds no sample.

    >>> from qcompress import formulate, low_rank, measure
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> batch = torch.randn(32, 64)
    >>> timed = time_options(model, measure(model, [batch], low_rank(ratios=(0.1, 0.3)), loss="mse"), batch)
    >>> list(formulate(timed, {"latency_s": 0.8, "bytes": 0.5}).budgets)
    ['latency_s', 'bytes']
    """
    require_measurement(measurement)
    require_measured(model, measurement.model_fingerprint)
    repeats = as_whole(repeats, "repeats", least=1)
    require_kinds({"on_progress": on_progress})
    timed = channels_timed if measurement.sets else _layers_timed
    with composed(model), kept_state(model), forwards.evaluating(model), torch.no_grad():
        with forwards.first_pass(batch, "the batch"):
            require_samples(batch, "the batch")
            (forward or forwards.default_forward)(model, own(batch))
        return with_times(measurement, *timed(model, measurement, batch, forward, repeats, on_progress))


def save_times(timed: Measurement, path: AnyPath) -> None:
    """Write only what `time_options` added, as one ``.npz`` file."""
    header = {"fixed": timed.fixed[LATENCY], "original": timed.original[LATENCY]}
    arrays = {"use": timed.resources[LATENCY]}
    if (together := timed.resource_pairs.get(LATENCY)) is not None:
        arrays |= arrays_of(together, TOGETHER)
    FILE_KIND.write_arrays(path, header, arrays)


def load_times(measurement: Measurement, path: AnyPath) -> Measurement:
    """Return ``measurement`` with the times that `save_times` wrote.

    Raises:
        FileFormatError: the file is incomplete or belongs to another measurement.
    """
    header, arrays = FILE_KIND.read_arrays(path)
    if arrays["use"].shape != measurement.cost.shape:
        raise FileFormatError(f"{path} holds times of {len(arrays['use'])} options, not of {len(measurement.cost)}")
    together = matrix_from(arrays, TOGETHER, len(arrays["use"])) if f"{TOGETHER}_data" in arrays else None
    return with_times(measurement, arrays["use"], header["fixed"], header["original"], together)


def with_times(
    measurement: Measurement, use: NDArray[np.float64], fixed: float, original: float, together: Any = None
) -> Measurement:
    """Return the measurement with ``(V,)`` seconds of its options, of everything else, and of the original.

    ``together`` are the ``(V, V)`` seconds that two options take in addition to their own, if any.
    """
    pairs = {name: terms for name, terms in measurement.resource_pairs.items() if name != LATENCY}
    if together is not None and together.nnz:
        pairs[LATENCY] = together
    return replace(
        measurement,
        resources=MappingProxyType({**measurement.resources, LATENCY: use}),
        fixed=MappingProxyType({**measurement.fixed, LATENCY: fixed}),
        original=MappingProxyType({**measurement.original, LATENCY: original}),
        resource_pairs=MappingProxyType(pairs),
    )


Shape = tuple[tuple[str, int, int], ...]  # name, rows and columns of every factor; () if the layer stays


def _shape(transform: Transform, target: Target) -> Shape:
    return tuple(
        (name, factor.channels, factor.per_channel) for name, factor in transform.factor_targets(target).items()
    )


def _layers_timed(
    model: nn.Module,
    measurement: Measurement,
    batch: Any,
    forward: forwards.Forward | None,
    repeats: int,
    on_progress: Callable[[TimingProgress], None] | None,
) -> tuple[NDArray[np.float64], float, float]:
    """Return the ``(V,)`` seconds of options that leave or replace layers, of everything else, and of the original."""
    # a weight outside a layer takes the same time whatever its option: its module's time counts as the rest
    paths = tuple(dict.fromkeys(part.modules for part in measurement.parts if part.site(model).is_layer))
    number = {modules: i for i, modules in enumerate(paths)}
    modules_of_layers = [model.get_submodule(modules[0]) for modules in paths]
    shapes = [
        [_shape(transform, part.target) for transform in options]
        for part, options in zip(measurement.parts, measurement.transforms, strict=True)
    ]
    watch = stopwatch.Stopwatch(model, paths)

    given = own(batch)  # its tensors once: copying is not part of the model's time

    def run() -> None:
        (forward or forwards.default_forward)(model, own(given, tensors=False))

    def tell(done: int) -> None:
        if on_progress is not None:
            on_progress(TimingProgress(layers=done, total_layers=len(paths)))

    calls = watch.calls(run)
    seconds, rest = watch.times(run, repeats)
    tell(done := 0)
    alike: dict[Hashable, list[int]] = {}
    for layer, module in enumerate(modules_of_layers):
        alike.setdefault(_likeness(module, calls[layer]), []).append(layer)
    ratios: list[dict[Shape, float]] = [{} for _ in paths]
    for group in alike.values():
        seconds[group] = np.median(seconds[group])
        wanted = {
            shape: None
            for part, options in zip(measurement.parts, shapes, strict=True)
            if number.get(part.modules) in group
            for shape in options
            if shape
        }
        layer_ratios = _ratios(modules_of_layers[group[0]], list(wanted), calls[group[0]], repeats)
        for layer in group:
            ratios[layer] = layer_ratios
        tell(done := done + len(group))
    use = []
    for part, options in zip(measurement.parts, shapes, strict=True):
        if part.modules not in number or not part.site(model).is_layer:
            use += [0.0 for _ in options]
            continue
        layer = number[part.modules]
        dense = seconds[layer] * part.target.channels / layers.num_channels(modules_of_layers[layer])
        use += [dense * ratios[layer].get(shape, 1.0) for shape in options]
    return np.array(use), rest, rest + float(seconds.sum())


def _likeness(module: nn.Module, calls: list[stopwatch.TimedCall]) -> Hashable:
    """Return a key that is equal for layers that do the same work. A layer of a custom type equals no other."""
    if type(module) not in layers.SUPPORTED:
        return id(module)
    weight = layers.weight_of(module)
    return (repr(module), weight.dtype, weight.stride(), weight.device, *stopwatch.shapes_in(calls))


def _ratios(
    module: nn.Module, shapes: list[Shape], calls: list[stopwatch.TimedCall], repeats: int
) -> dict[Shape, float]:
    """Return the time of factors of the given shapes in place of ``module``, relative to the module's own time.

    All candidates are run in turn, in a different order every time, so that disturbances affect them equally. The
    values in the factors do not matter for the time, so constants are used.
    """
    if not (shapes and calls):
        return {}
    means = [{name: torch.full(size, 1 / size[1]) for name, *size in shape} for shape in shapes]
    candidates = [module, *(factored(module, factors) for factors in means)]
    turns, now = np.random.default_rng(0), stopwatch.clock_of(module)
    seconds = np.empty((repeats + 1, len(candidates)))
    for turn in range(repeats + 1):
        for place in turns.permutation(len(candidates)):
            candidate = candidates[place]
            begun = now()
            for call in calls:
                candidate(*call.args, **call.kwargs)
            seconds[turn, place] = now() - begun
    dense_s, *others = np.median(seconds[1:], axis=0).tolist()  # the first turn is a warm-up
    return {shape: other / dense_s for shape, other in zip(shapes, others, strict=True)}
