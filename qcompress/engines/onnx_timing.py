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

import tempfile
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.engines import onnx_conversions, onnx_graph, onnx_tracing
from qcompress.engines.onnx_clock import Clock, Kind, kind_of
from qcompress.engines.onnx_conversions import INTEGER
from qcompress.measurement import Measurement
from qcompress.measuring.latency import LATENCY, TimingProgress, with_times
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
    kinds = [
        [kind_of(transform, part.target) for transform in options]
        for part, options in zip(measurement.parts, measurement.transforms, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock(engine, Path(folder))
        layers = _layers(model, measurement.parts, batch)
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
        graph = _Whole(clock, model, measurement, kinds, batch)
        whole = graph.calibrated(dense, change)
        together = graph.conversions(layers)
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
        protos = [clock.graph_with(chosen, traced, model, measurement.parts, batch) for chosen in options]
        original_s, *seconds = clock.seconds([traced, *protos], batch)
    return [measurement.original[LATENCY] * choice_s / original_s for choice_s in seconds]


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
    """A layer with its inputs for the batch, one per call."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    likeness: Hashable


def _layers(model: nn.Module, parts: Sequence[Part], batch: Any) -> list[_Layer]:
    """The layers of parts; a layer that the batch does not call has no inputs."""
    given: dict[nn.Module, list[Tensor]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.setdefault(module, []).append(args[0] if args else kwargs["input"])

    members = [[model.get_submodule(path) for path in part.modules] for part in parts]
    hooks = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in {module_of_part: None for modules in members for module_of_part in modules}
    ]
    try:
        with forwards.evaluating(model), torch.no_grad():
            forwards.run(model, batch, None)
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for modules in members:
        inputs = tuple(tensor.detach() for module in modules for tensor in given.get(module, []))
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        plain = type(modules[0]).__module__.startswith("torch.")
        likeness = (repr(modules[0]) if plain else id(modules[0]), shapes)
        layers.append(_Layer(module=modules[0], inputs=inputs, likeness=likeness))
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
    """The graph of the whole model, with options in all its layers.

    Args:
        clock: times graphs.
        model: the measured model.
        measurement: restricted to what the engine runs.
        kinds: the kind of every option of every part.
        batch: input of the timed runs.
    """

    def __init__(
        self, clock: Clock, model: nn.Module, measurement: Measurement, kinds: list[list[Kind]], batch: Any
    ) -> None:
        self._clock, self._model, self._measurement, self._kinds = clock, model, measurement, kinds
        self._batch, self._traced = batch, onnx_tracing.trace(model, batch)

    def calibrated(self, dense: NDArray[np.float64], change: list[dict[Kind, float]]) -> float:
        """Seconds of the whole dense model; scales the times of the layers so that they do not exceed it.

        ``change`` is corrected so that putting each kind everywhere gives the measured time of that model; each layer
        is corrected in proportion.
        """
        seconds = self._clock.seconds([self._traced], self._batch)[0]
        scale = min(1.0, seconds / max(float(dense.sum()), TINY))
        dense *= scale
        for changes in change:
            changes.update({kind: scale * change_s for kind, change_s in changes.items()})
        everywhere = [kind for part_kinds in self._kinds for kind in part_kinds if kind and kind[0] != "factors"]
        for kind in dict.fromkeys(everywhere):
            chosen = {place: transform for place, transform in self._all_of(kind).items() if dense[place] > 0}
            if not chosen:
                continue
            before, after = self._clock.seconds([self._traced, self._graph_with(chosen)], self._batch)
            alone_s = np.array([change[place][kind] for place in chosen])
            missing = seconds * (after / before - 1) - float(alone_s.sum())
            weights = np.abs(alone_s) + TINY * dense[list(chosen)]
            for place, share in zip(chosen, weights / weights.sum(), strict=True):
                change[place][kind] += missing * share
        return seconds

    def conversions(self, layers: Sequence[_Layer]) -> Any:
        """Seconds that pairs of options take for conversions, see `onnx_conversions`."""
        integers, names = self._all_of(INTEGER), {item.name for item in self._traced.graph.initializer}
        weights = {
            place: onnx_graph.initializer_of(self._model, self._measurement.parts[place].modules[0], names)
            for place in integers
        }
        links = onnx_conversions.links(
            self._traced,
            {place: name for place, name in weights.items() if name is not None},
            {place: float(sum(tensor.numel() for tensor in layers[place].inputs)) for place in integers},
        )
        seconds = 0.0
        if links:
            halves = onnx_conversions.halves(list(integers))
            chosen = [integers, *({place: integers[place] for place in half} for half in halves)]
            dense_s, integer_s, *halves_s = self._clock.seconds(
                [self._traced, *map(self._graph_with, chosen)], self._batch
            )
            converted = sum(link.size for link in links for half in halves if link.is_mixed(half))
            seconds = max(sum(halves_s) - dense_s - integer_s, 0.0) / max(converted, 1.0)
        return onnx_conversions.pair_terms(links, seconds, self._kinds)

    def _all_of(self, kind: Kind) -> dict[int, Transform]:
        """The option of a kind of every part that has one."""
        return {
            place: self._measurement.transforms[place][part_kinds.index(kind)]
            for place, part_kinds in enumerate(self._kinds)
            if kind in part_kinds
        }

    def _graph_with(self, chosen: dict[int, Transform]) -> Any:
        return self._clock.graph_with(chosen, self._traced, self._model, self._measurement.parts, self._batch)
