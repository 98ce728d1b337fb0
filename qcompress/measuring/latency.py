"""Latency as a resource: the seconds that a batch spends in every layer as it is, and in what could stand for it.

Macs are a poor stand-in for time: channel counts that do not fill a vector, 1×1 layers that wait for memory, and the
price of one more call are not in them. So the time is taken. It adds up as every resource does: what a layer takes
hardly depends on its neighbours, because each call reads and writes plain tensors.

The time of the whole model is cut where its layers begin and end. A factored layer takes the time of its dense layer
within the model, times the ratio of the two on the very inputs that the layer had. Every time is the median of several
runs. Layers of one kind and size with inputs of one shape are timed as one.

What always holds: the times of all layers and the rest add up to ``original``; only `time_options` looks at a clock.
Its times are not the same twice, but they are stored in the measurement, and everything after that is as reproducible
as with bytes.
"""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from formulations import FileFormatError
from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from qcompress.compressed.apply import require_measured
from qcompress.compressed.factored import factored
from qcompress.errors import ModelError, OptionsError
from qcompress.measurement import Measurement
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.transforms.base import Target, Transform

LATENCY = "latency_s"
FILE_KIND = FileKind("qcompress latency", version=1)
REPEATS = 15
MICROSECOND = 1e-6
OUTSIDE = -1  # in place of a layer's number: in none


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingProgress:
    """How many of the layers have their options timed."""

    layers: int
    total_layers: int


def time_options(
    model: nn.Module,
    measurement: Measurement,
    batch: Any,
    *,
    forward: forwards.Forward | None = None,
    repeats: int = REPEATS,
    on_progress: Callable[[TimingProgress], None] | None = None,
) -> Measurement:
    """The same measurement with one more resource, ``latency_s``: seconds for a forward pass of ``batch``.

    It is the time in evaluation mode, operation by operation, on the model's device, with the number of threads that
    PyTorch is set to: take a batch as it will be in use, and ``torch.set_num_threads``. On one thread of a CPU it is
    processor time, so that other programs do not count; else it is wall time, and the machine should be idle.

    Options that change a layer's weight and leave the layer take the layer's own time; a block of channels takes its
    share of the rows. What is in no part (activations, normalisation, Python) is in ``fixed``.

    Args:
        model: the model that was measured; left as it is.
        measurement: what `measure` gave. A ``latency_s`` that it has is replaced.
        batch: one batch, as `measure` takes them.
        forward: ``(model, batch) -> output tensor`` where the default does not fit.
        repeats: how many runs each time is the median of.
        on_progress: called when the layers as they are have been timed, and after every layer and those like it.

    Raises:
        ModelError: another model than measured, or one that calls its layers in another order from run to run.
        OptionsError: no repeats.

    >>> from qcompress import formulate, low_rank, measure
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> batch = torch.randn(32, 64)
    >>> timed = time_options(model, measure(model, [batch], low_rank(ratios=(0.1, 0.3)), loss="mse"), batch)
    >>> list(formulate(timed, {"latency_s": 0.8, "bytes": 0.5}).budgets)
    ['latency_s', 'bytes']
    """
    require_measured(model, measurement.model_fingerprint)
    if not (isinstance(repeats, int) and repeats >= 1):
        raise OptionsError(f"repeats must be a whole number from 1, found {repeats!r}")
    # what is no layer's weight takes the same time whatever its option: its module's time is the rest's
    paths = tuple(dict.fromkeys(part.modules for part in measurement.parts if part.site(model).is_layer))
    number = {modules: i for i, modules in enumerate(paths)}
    modules_of_layers = [model.get_submodule(modules[0]) for modules in paths]
    shapes = [
        [_shape(transform, part.target) for transform in options]
        for part, options in zip(measurement.parts, measurement.transforms, strict=True)
    ]
    with forwards.evaluating(model), torch.no_grad():
        stopwatch = _Stopwatch(model, paths)

        def run() -> None:
            (forward or forwards.default_forward)(model, batch)

        def tell(done: int) -> None:
            if on_progress is not None:
                on_progress(TimingProgress(layers=done, total_layers=len(paths)))

        calls = stopwatch.calls(run)
        seconds, rest = stopwatch.times(run, repeats)
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
    return with_times(measurement, np.array(use), rest, rest + float(seconds.sum()))


def save_times(timed: Measurement, path: AnyPath) -> None:
    """Write only what `time_options` added, as one ``.npz`` file."""
    header = {"fixed": timed.fixed[LATENCY], "original": timed.original[LATENCY]}
    arrays = {"use": timed.resources[LATENCY]}
    FILE_KIND.write_arrays(path, header, arrays)


def load_times(measurement: Measurement, path: AnyPath) -> Measurement:
    """``measurement`` with the times that `save_times` wrote.

    Raises:
        FileFormatError: the file is not whole, or of another measurement.
    """
    header, arrays = FILE_KIND.read_arrays(path)
    if arrays["use"].shape != measurement.cost.shape:
        raise FileFormatError(f"{path} holds times of {len(arrays['use'])} options, not of {len(measurement.cost)}")
    return with_times(measurement, arrays["use"], header["fixed"], header["original"])


def with_times(measurement: Measurement, use: NDArray[np.float64], fixed: float, original: float) -> Measurement:
    """The measurement with ``(V,)`` seconds of its options, of everything else, and of the original."""
    return replace(
        measurement,
        resources=MappingProxyType({**measurement.resources, LATENCY: use}),
        fixed=MappingProxyType({**measurement.fixed, LATENCY: fixed}),
        original=MappingProxyType({**measurement.original, LATENCY: original}),
    )


Shape = tuple[tuple[str, int, int], ...]  # name, rows and columns of every factor; () of a layer that stays


def _shape(transform: Transform, target: Target) -> Shape:
    return tuple(
        (name, factor.channels, factor.per_channel) for name, factor in transform.factor_targets(target).items()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What a layer was given."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _likeness(module: nn.Module, calls: list[_Call]) -> Hashable:
    """What is equal for layers that do the same work. A layer of a type of its own is like no other."""
    if type(module) not in layers.SUPPORTED:
        return id(module)
    given = [
        (tensor.shape, tensor.stride(), tensor.dtype)
        for call in calls
        for tensor in tree_leaves((call.args, call.kwargs))
        if isinstance(tensor, Tensor)
    ]
    weight = layers.weight_of(module)
    return (repr(module), weight.dtype, weight.stride(), weight.device, *given)


def _ratios(module: nn.Module, shapes: list[Shape], calls: list[_Call], repeats: int) -> dict[Shape, float]:
    """The time of factors of those shapes in the place of ``module``, relative to its own.

    All take turns, in another order every time, so that whatever else goes on hits them alike. The numbers in the
    factors do not matter for the time: they take means.
    """
    if not (shapes and calls):
        return {}
    means = [{name: torch.full(size, 1 / size[1]) for name, *size in shape} for shape in shapes]
    candidates = [module, *(factored(module, factors) for factors in means)]
    turns, now = np.random.default_rng(0), _clock(module)
    seconds = np.empty((repeats + 1, len(candidates)))
    for turn in range(repeats + 1):
        for place in turns.permutation(len(candidates)):
            candidate = candidates[place]
            begun = now()
            for call in calls:
                candidate(*call.args, **call.kwargs)
            seconds[turn, place] = now() - begun
    dense_s, *others = np.median(seconds[1:], axis=0).tolist()  # the first turn warmed up
    return {shape: other / dense_s for shape, other in zip(shapes, others, strict=True)}


class _Stopwatch:
    """Hooks into a model's layers while it runs: what they are given, and when they begin and end.

    Args:
        model: in evaluation mode.
        paths: per layer those of the modules that share its weight.
    """

    def __init__(self, model: nn.Module, paths: tuple[tuple[str, ...], ...]) -> None:
        self._now, self._num_layers = _clock(model), len(paths)
        self._layer_of = {model.get_submodule(path): i for i, layer_paths in enumerate(paths) for path in layer_paths}

    def calls(self, run: Callable[[], None]) -> list[list[_Call]]:
        """Per layer what it is given in one run."""
        calls: list[list[_Call]] = [[] for _ in range(self._num_layers)]

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[self._layer_of[module]].append(_Call(args=args, kwargs=kwargs))

        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in self._layer_of]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        return calls

    def times(self, run: Callable[[], None], repeats: int) -> tuple[NDArray[np.float64], float]:
        """Seconds in every layer, over all its calls, and in none of them.

        A run is a sequence of pieces, from one mark to the next; each piece is the median of all runs.

        Raises:
            ModelError: the layers are called in another order from run to run.
        """
        marks: list[tuple[float, int]] = []  # when, and the layer that goes on from there
        within = [OUTSIDE]

        def begin(module: nn.Module, args: Any) -> None:  # noqa: ARG001
            within.append(self._layer_of[module])
            marks.append((self._now(), within[-1]))

        def end(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            within.pop()
            marks.append((self._now(), within[-1]))

        hooks = [module.register_forward_pre_hook(begin) for module in self._layer_of]
        hooks += [module.register_forward_hook(end) for module in self._layer_of]
        runs = []
        try:
            for _ in range(repeats + 1):
                marks[:] = [(self._now(), OUTSIDE)]
                run()
                runs.append([*marks, (self._now(), OUTSIDE)])
        finally:
            for hook in hooks:
                hook.remove()
        orders = {tuple(layer for _, layer in marked) for marked in runs}
        if len(orders) > 1:
            raise ModelError("the model calls its layers in a different order each time, so they cannot be timed")
        moments = [[moment for moment, _ in marked] for marked in runs[1:]]  # the first one warmed up
        pieces = np.median(np.diff(moments), axis=0)
        seconds = np.zeros(self._num_layers + 1)  # the last one is OUTSIDE
        np.add.at(seconds, list(orders.pop()[:-1]), pieces)
        return seconds[:-1], float(seconds[-1])


def _clock(model: nn.Module) -> Callable[[], float]:
    """Seconds: on one thread of a CPU the processor's, else the wall clock's, once the device has done its work."""
    device = forwards.device_of(model)
    if device.type == "cpu":
        fine = time.get_clock_info("process_time").resolution <= MICROSECOND
        return time.process_time if torch.get_num_threads() == 1 and fine else time.perf_counter

    def synchronised() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return synchronised
