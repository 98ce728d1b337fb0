"""Seconds of every option in ONNX Runtime, as a resource: differences from the dense layer.

Each layer is put into its own graph, with the input it has for the batch, and timed in turn with its alternatives;
layers of the same kind, size and input are timed once. Such a graph is too favourable: its weight stays in the cache,
and it pays for conversions that consecutive layers save. So each kind of option is then put everywhere at once, and the
difference between that model's time and the prediction is distributed over its layers in proportion to their changes
of time. Conversions between integer and floating-point layers are pair terms, see `onnx_conversions`.

Invariants: ``fixed`` and the dense layers add up to ``original``, the time of the float32 file. Times are valid for one
machine, batch and number of threads; with one thread they are processor time, so that other programs hardly matter.
Weights that ONNX Runtime expands when it loads the file get the time of the dense layer.
"""

import itertools
import tempfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.budgets import LATENCY
from qcompress.engines import onnx_conversions, onnx_graph, onnx_tracing
from qcompress.engines.onnx_clock import Clock, Kind, kind_of
from qcompress.engines.onnx_conversions import INTEGER
from qcompress.measurement import Measurement
from qcompress.measuring.latency import with_times
from qcompress.measuring.stopwatch import Stopwatch, TimingProgress
from qcompress.model import forward as forwards
from qcompress.model.parts import Part
from qcompress.transforms.base import Transform

if TYPE_CHECKING:
    from qcompress.engines.onnxruntime import OnnxRuntime

TINY = 1e-12


def time_options(
    engine: "OnnxRuntime",
    model: nn.Module,
    measurement: Measurement,
    batch: Any,
    on_progress: Callable[[TimingProgress], None] | None = None,
) -> Measurement:
    """Return the measurement with ``latency_s`` of every option in the engine; see `Engine.time_options`."""
    linear = [
        any(onnx_graph.is_linear(model.get_submodule(path)) for path in part.modules) for part in measurement.parts
    ]
    kinds = [
        [kind_of(transform, part.target, linear=is_linear) for transform in options]
        for part, options, is_linear in zip(measurement.parts, measurement.transforms, linear, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock(engine, Path(folder))
        timed = [any(part_kinds) for part_kinds in kinds]
        layers = _layers(model, measurement.parts, timed, batch)
        alike: dict[Hashable, list[int]] = {}
        for place, layer in enumerate(layers):
            alike.setdefault(layer.likeness, []).append(place)
        dense = np.zeros(len(layers))
        change: list[dict[Kind, float]] = [{} for _ in layers]
        done = 0
        for group in alike.values():
            wanted = {
                kind: transform
                for place in group
                for kind, transform in zip(kinds[place], measurement.transforms[place], strict=True)
            }
            seconds = _of_layer(clock, measurement.parts[group[0]], layers[group[0]], wanted)
            for place in group:
                dense[place] = seconds[()]
                change[place] = {kind: option_s - seconds[()] for kind, option_s in seconds.items()}
            done += len(group)
            if on_progress is not None:
                on_progress(TimingProgress(layers=done, total_layers=len(layers)))
        graph = _Whole(clock, model, measurement, kinds, batch, layers)
        whole = graph.calibrated(dense, change)
        together = graph.conversions()
    dense, change = with_room(dense, change, whole)
    use = [
        max(dense[place] + change[place].get(kind, 0.0), 0.0)
        for place, part_kinds in enumerate(kinds)
        for kind in part_kinds
    ]
    return with_times(measurement, np.array(use), max(whole - float(dense.sum()), 0.0), whole, together)


def seconds_of(
    engine: "OnnxRuntime", model: nn.Module, measurement: Measurement, choices: Sequence[Sequence[int]], batch: Any
) -> list[float]:
    """Seconds of the whole model with each choice; see `Engine.seconds_of`."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock(engine, Path(folder))
        traced = onnx_tracing.trace(model, batch)
        options = [
            dict(enumerate(on_offer[option] for on_offer, option in zip(measurement.transforms, choice, strict=True)))
            for choice in choices
        ]
        protos = (clock.graph_with(chosen, traced, model, measurement.parts, batch) for chosen in options)
        return [measurement.original[LATENCY] * ratio for ratio in clock.ratios(traced, protos, batch)]


def with_room(
    dense: NDArray[np.float64], change: list[dict[Kind, float]], whole: float
) -> tuple[NDArray[np.float64], list[dict[Kind, float]]]:
    """Adjust layer times so that they are at least what their options save, and at most the whole in total.

    What an option saves in the whole model is known more accurately than the time of its layer there: weights that are
    read from memory each time are faster in a graph of their own.

    >>> dense, change = with_room(np.array([1.0, 2.0]), [{("a",): -3.0}, {("a",): 1.0}], 10.0)
    >>> dense.tolist(), change
    ([3.0, 2.0], [{('a',): -3.0}, {('a',): 1.0}])
    >>> with_room(np.array([1.0, 2.0]), [{("a",): -3.0}, {}], 4.0)
    (array([3., 1.]), [{('a',): -3.0}, {}])
    >>> with_room(np.array([1.0, 2.0]), [{("a",): -3.0}, {("a",): -2.0}], 4.0)[0].tolist()
    [2.4000000000000004, 1.6]
    """
    room = np.array([max((-change_s for change_s in changes.values()), default=0.0) for changes in change]).clip(0.0)
    scale = min(1.0, whole / max(float(room.sum()), TINY))
    room *= scale
    more = np.maximum(dense - room, 0.0)
    more *= min(1.0, (whole - float(room.sum())) / max(float(more.sum()), TINY))
    return room + more, [{kind: scale * change_s for kind, change_s in changes.items()} for changes in change]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """A layer with its inputs for the batch, one per call; without any if no option changes its time."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    likeness: Hashable


def _layers(model: nn.Module, parts: Sequence[Part], timed: Sequence[bool], batch: Any) -> list[_Layer]:
    """The layers of parts; one that the batch does not call, or whose options all take the same time, has no inputs.

    If Linear layers share a weight with an embedding, only they are timed: a lookup takes no time compared to a
        product.
    """
    paths = list(dict.fromkeys(path for part in itertools.compress(parts, timed) for path in part.modules))
    watch = Stopwatch(model, [(path,) for path in paths])
    with forwards.evaluating(model), torch.no_grad():
        calls = dict(zip(paths, watch.calls(lambda: forwards.run(model, batch, None)), strict=True))
    layers = []
    for part, has_times in zip(parts, timed, strict=True):
        sharing = {path: model.get_submodule(path) for path in part.modules}
        modules = {path: module for path, module in sharing.items() if onnx_graph.is_linear(module)} or sharing
        module = next(iter(modules.values()))
        inputs = tuple(call.first.detach() for path in modules for call in calls[path]) if has_times else ()
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        plain = type(module).__module__.startswith("torch.")
        layers.append(_Layer(module=module, inputs=inputs, likeness=(repr(module) if plain else id(module), shapes)))
    return layers


class _Alone(nn.Module):
    """A model that consists of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        output: Tensor = self.layer(x)
        return output


def _of_layer(clock: Clock, part: Part, layer: _Layer, wanted: dict[Kind, Transform]) -> dict[Kind, float]:
    """Seconds of a layer and of its alternatives, over all its calls, without the overhead of a call."""
    total = dict.fromkeys([(), *wanted], 0.0)
    alone, only = _Alone(layer.module), Part(name="layer", modules=("layer",), rows=None, target=part.target)
    for shape in dict.fromkeys(tensor.shape for tensor in layer.inputs):
        calls = [tensor for tensor in layer.inputs if tensor.shape == shape]
        dense = onnx_tracing.trace(alone, calls[0])
        protos: dict[Kind, Any] = {(): dense}
        for kind, transform in wanted.items():
            if kind:
                protos[kind] = clock.graph_with({0: transform}, dense, alone, [only], calls[0])
        *seconds, nothing = clock.seconds([*protos.values(), _empty(dense)], calls[0])
        for kind, graph_s in zip(protos, seconds, strict=True):
            total[kind] += len(calls) * max(graph_s - nothing, 0.0)
    return total


def _empty(proto: Any) -> Any:
    """A graph with the same input that does nothing."""
    from onnx import helper

    empty = onnx_graph.copied(proto)
    given = empty.graph.input[0]
    del empty.graph.node[:], empty.graph.initializer[:], empty.graph.output[:]
    empty.graph.node.append(helper.make_node("Shape", [given.name], ["shape"]))
    empty.graph.output.append(helper.make_tensor_value_info("shape", 7, [len(given.type.tensor_type.shape.dim)]))
    return empty


class _Whole:
    """The whole model, timed with the same kind of option in all its layers, and in every second one.

    Args:
        clock: times graphs.
        model: the measured model.
        measurement: restricted to what the engine runs.
        kinds: the kind of every option of every part.
        batch: input of the timed runs.
        layers: the layers of the parts.
    """

    def __init__(
        self,
        clock: Clock,
        model: nn.Module,
        measurement: Measurement,
        kinds: list[list[Kind]],
        batch: Any,
        layers: Sequence[_Layer],
    ) -> None:
        self._clock, self._model, self._measurement, self._kinds = clock, model, measurement, kinds
        self._batch, self._layers, self._traced = batch, layers, onnx_tracing.trace(model, batch)
        self._links = self._linked()
        self._seconds = clock.seconds([self._traced], batch)[0]
        chosen = {kind: options for kind in self._kinds_everywhere() if (options := self._all_of(kind))}
        integers = self._all_of(INTEGER)
        self._halves = onnx_conversions.halves(list(integers)) if self._links and integers else ()
        halves = [{place: integers[place] for place in half} for half in self._halves]
        added_s = self._added([*chosen.values(), *halves])
        self._everywhere = {
            kind: (list(options), option_s) for (kind, options), option_s in zip(chosen.items(), added_s, strict=False)
        }
        self._halves_s = sum(added_s[len(chosen) :])

    def calibrated(self, dense: NDArray[np.float64], change: list[dict[Kind, float]]) -> float:
        """Seconds of the whole dense model; scales the times of the layers so that they do not exceed it.

        ``change`` is corrected so that putting each kind everywhere gives the measured time of that model; each layer
        is corrected in proportion.
        """
        scale = min(1.0, self._seconds / max(float(dense.sum()), TINY))
        dense *= scale
        for changes in change:
            changes.update({kind: scale * change_s for kind, change_s in changes.items()})
        for kind, (places, added_s) in self._everywhere.items():
            alone_s = np.array([change[place][kind] for place in places])
            missing = added_s - float(alone_s.sum())
            weights = np.abs(alone_s) + TINY * dense[places]
            for place, share in zip(places, weights / weights.sum(), strict=True):
                change[place][kind] += missing * share
        return self._seconds

    def conversions(self) -> Any:
        """Seconds that pairs of options take for conversions, see `onnx_conversions`."""
        seconds = 0.0
        if self._halves:
            converted = sum(link.size for link in self._links for half in self._halves if link.is_mixed(half))
            seconds = max(self._halves_s - self._everywhere[INTEGER][1], 0.0) / max(converted, 1.0)
        return onnx_conversions.pair_terms(self._links, seconds, self._kinds)

    def _linked(self) -> list[onnx_conversions.Link]:
        """The parts with integer products whose outputs other such parts read."""
        integers, names = self._all_of(INTEGER), {item.name for item in self._traced.graph.initializer}
        weights = {
            place: onnx_graph.initializer_of(self._model, self._measurement.parts[place].modules[0], names)
            for place in integers
        }
        return onnx_conversions.links(
            self._traced,
            {place: name for place, name in weights.items() if name is not None},
            {place: float(sum(tensor.numel() for tensor in self._layers[place].inputs)) for place in integers},
        )

    def _kinds_everywhere(self) -> Iterator[Kind]:
        """The kinds of options that are put into all layers."""
        yield from dict.fromkeys(
            kind for part_kinds in self._kinds for kind in part_kinds if kind and kind[0] != "factors"
        )

    def _added(self, chosen: Sequence[dict[int, Transform]]) -> list[float]:
        """Seconds that models with these options take more than the dense one."""
        graphs = (self._graph_with(options) for options in chosen)
        return [self._seconds * (ratio - 1) for ratio in self._clock.ratios(self._traced, graphs, self._batch)]

    def _all_of(self, kind: Kind) -> dict[int, Transform]:
        """The option of a kind of every part that has one and that the batch calls."""
        return {
            place: self._measurement.transforms[place][part_kinds.index(kind)]
            for place, part_kinds in enumerate(self._kinds)
            if kind in part_kinds and self._layers[place].inputs
        }

    def _graph_with(self, chosen: dict[int, Transform]) -> Any:
        return self._clock.graph_with(chosen, self._traced, self._model, self._measurement.parts, self._batch)
