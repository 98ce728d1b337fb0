"""Seconds of every option in ONNX Runtime, as a resource: differences from the dense layer.

Each layer is put into its own graph, with the input it has for the batch, and timed in turn with its alternatives;
layers of the same kind, size and input are timed once. Such a graph is too favourable: its weight stays in the cache,
and it pays for conversions that consecutive layers save. So each kind of option is then put everywhere at once, and the
difference between that model's time and the prediction is distributed over its layers in proportion to their changes
of time.

Invariants: ``fixed`` and the dense layers add up to ``original``, the time of the float32 file. Times are valid for one
machine, batch and number of threads; with one thread they are processor time, so that other programs hardly matter.
Weights that ONNX Runtime expands when it loads the file get the time of the dense layer.
"""

import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.compressed.factored import factored
from qcompress.engines import onnx_graph, onnx_integer
from qcompress.engines.integer_codes import IntegerCodes, Scheme, scheme_of
from qcompress.engines.onnx_graph import Encoding
from qcompress.engines.onnx_integer import IntegerLayer
from qcompress.measurement import Measurement
from qcompress.measuring.latency import TimingProgress, with_times
from qcompress.model import forward as forwards
from qcompress.model.parts import Part
from qcompress.transforms.base import Keep, Target, Transform
from qcompress.transforms.low_rank.factors import LowRank
from qcompress.transforms.quantize.integer import IntegerProduct

if TYPE_CHECKING:
    from qcompress.engines.onnxruntime import OnnxRuntime

ROUNDS = 25
TINY = 1e-12
LEAST_S = 2e-4  # minimum duration of a measured interval: short runs are repeated

Kind = tuple[Hashable, ...]
"""The properties that an option's time depends on, within one layer; () for the dense layer."""


def time_options(
    engine: "OnnxRuntime",
    model: nn.Module,
    measurement: Measurement,
    batch: Any,
    on_progress: Callable[[TimingProgress], None] | None = None,
) -> Measurement:
    """Return the measurement with ``latency_s`` of every option in the engine; see `Engine.time_options`."""
    kinds = [
        [_kind(transform, part.target) for transform in options]
        for part, options in zip(measurement.parts, measurement.transforms, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        clock = _Clock(engine, Path(folder))
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
            seconds = clock.layer(measurement.parts[group[0]], layers[group[0]], wanted)
            for place in group:
                dense[place] = seconds[()]
                change[place] = {kind: option_s - seconds[()] for kind, option_s in seconds.items()}
            done += len(group)
            if on_progress is not None:
                on_progress(TimingProgress(layers=done, total_layers=len(layers)))
        whole = clock.whole(model, measurement, batch, kinds, dense, change)
    dense, change = with_room(dense, change, whole)
    use = [
        max(dense[place] + change[place].get(kind, 0.0), 0.0)
        for place, part_kinds in enumerate(kinds)
        for kind in part_kinds
    ]
    return with_times(measurement, np.array(use), max(whole - float(dense.sum()), 0.0), whole)


def with_room(
    dense: NDArray[np.float64], change: list[dict[Kind, float]], whole: float
) -> tuple[NDArray[np.float64], list[dict[Kind, float]]]:
    """Adjust layer times so that they are at least what their options save, and at most the whole in total.

    What an option saves in the whole model is known more accurately than the time of its layer there: weights that are
    read from memory each time are faster in a graph of their own.

    >>> dense, change = with_room(np.array([1.0, 2.0]), [{("a",): -3.0}, {("a",): 1.0}], 10.0)
    >>> dense.tolist(), change
    ([3.0, 2.0], [{('a',): -3.0}, {('a',): 1.0}])
    >>> with_room(np.array([1.0, 2.0]), [{("a",): -3.0}, {}], 4.0)[0].tolist()
    [2.4000000000000004, 1.6]
    """
    wide = np.maximum(dense, [max((-change_s for change_s in changes.values()), default=0.0) for changes in change])
    scale = min(1.0, whole / max(float(wide.sum()), TINY))
    return scale * wide, [{kind: scale * change_s for kind, change_s in changes.items()} for changes in change]


def _kind(transform: Transform, target: Target) -> Kind:
    """What an option's time depends on; () if the weight is expanded when the file is loaded."""
    if isinstance(transform, IntegerProduct):
        return "integer", transform.dynamic
    if isinstance(transform, LowRank):
        shapes = [(factor.channels, factor.per_channel) for factor in transform.factor_targets(target).values()]
        return (
            "factors",
            *shapes,
            *[_kind(transform.then, factor) for factor in transform.factor_targets(target).values()],
        )
    scheme = None if isinstance(transform, Keep) else scheme_of(transform, target)
    if scheme is None or target.layer != "Linear" or not onnx_graph.takes_products(scheme):
        return ()
    return "bits", scheme.bits, scheme.group_size, scheme.symmetric, scheme.scale_type == torch.float16


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


class _Clock:
    """Times graphs in one engine, taking turns."""

    def __init__(self, engine: "OnnxRuntime", folder: Path) -> None:
        self._engine, self._folder = engine, folder

    def layer(self, part: Part, layer: _Layer, wanted: dict[Kind, Transform]) -> dict[Kind, float]:
        """Seconds of a layer and of its alternatives, over all its calls, without the overhead of a call."""
        total = dict.fromkeys([(), *wanted], 0.0)
        for shape in dict.fromkeys(tensor.shape for tensor in layer.inputs):
            calls = [tensor for tensor in layer.inputs if tensor.shape == shape]
            dense = onnx_graph.trace(_Alone(layer.module), calls[0])
            protos: dict[Kind, Any] = {(): dense}
            for kind, transform in wanted.items():
                if kind:
                    protos[kind] = self._with(dense, layer.module, part, transform, calls[0])
            seconds = in_turn([self._session(proto) for proto in protos.values()], [calls[0]], self._engine.threads)
            nothing = in_turn([self._session(_empty(dense))], [calls[0]], self._engine.threads)[0]
            for kind, median_s in zip(protos, seconds, strict=True):
                total[kind] += len(calls) * max(median_s - nothing, 0.0)
        return total

    def whole(
        self,
        model: nn.Module,
        measurement: Measurement,
        batch: Any,
        kinds: list[list[Kind]],
        dense: NDArray[np.float64],
        change: list[dict[Kind, float]],
    ) -> float:
        """Seconds of the whole dense model; scales the times of the layers so that they do not exceed it.

        ``change`` is corrected so that putting each kind everywhere gives the measured time of that model; each layer
        is corrected in proportion.
        """
        traced = onnx_graph.trace(model, batch)
        plain = self._session(traced)
        seconds = in_turn([plain], [batch], self._engine.threads)[0]
        scale = min(1.0, seconds / max(float(dense.sum()), TINY))
        dense *= scale
        for own_changes in change:
            own_changes.update({kind: scale * change_s for kind, change_s in own_changes.items()})
        everywhere = dict.fromkeys(kind for part_kinds in kinds for kind in part_kinds if kind and kind[0] != "factors")
        for kind in everywhere:
            places = [place for place, part_kinds in enumerate(kinds) if kind in part_kinds and dense[place] > 0]
            if not places:
                continue
            chosen = {place: measurement.transforms[place][kinds[place].index(kind)] for place in places}
            proto = self._everywhere(traced, model, measurement.parts, chosen)
            before, after = in_turn([plain, self._session(proto)], [batch], self._engine.threads)
            alone_s = np.array([change[place][kind] for place in places])
            missing = seconds * (after / before - 1) - float(alone_s.sum())
            weights = np.abs(alone_s) + TINY * dense[places]
            for place, share in zip(places, weights / weights.sum(), strict=True):
                change[place][kind] += missing * share
        return seconds

    def _session(self, proto: Any) -> Any:
        file = self._folder / "graph.onnx"
        file.write_bytes(proto.SerializeToString())
        return self._engine.session(file)

    def _everywhere(self, traced: Any, model: nn.Module, parts: Sequence[Part], chosen: dict[int, Transform]) -> Any:
        proto = onnx_graph.copied(traced)
        tensors = {item.name for item in proto.graph.initializer}
        encodings, integers = [], []
        for place, transform in chosen.items():
            part = parts[place]
            name = onnx_graph.initializer_of(model, part.modules[0], tensors)
            if name is None:
                continue
            if isinstance(transform, IntegerProduct):
                integers.append(IntegerLayer(name=name, transform=transform, target=part.target))
            else:
                encodings.append(_encoded(proto, name, model.get_submodule(part.modules[0]), transform, part.target))
        onnx_graph.replace(proto, encodings, self._engine.accuracy_level)
        onnx_integer.put_(proto, integers)
        return proto

    def _with(self, dense: Any, module: nn.Module, part: Part, transform: Transform, given: Tensor) -> Any:
        """The graph of one layer with an option in its place; the values do not matter for the time."""
        if isinstance(transform, LowRank):
            targets = transform.factor_targets(part.target)
            means = {
                name: torch.full((of_factor.channels, of_factor.per_channel), 1 / of_factor.per_channel)
                for name, of_factor in targets.items()
            }
            whole = _Alone(factored(module, means))
            proto = onnx_graph.trace(whole, given)
            tensors = {item.name for item in proto.graph.initializer}
            if isinstance(transform.then, Keep):
                return proto
            encodings = [
                _encoded(proto, name, whole.get_submodule(f"layer.{factor}"), transform.then, factor_target)
                for factor, factor_target in targets.items()
                if (name := onnx_graph.initializer_of(whole, f"layer.{factor}", tensors)) is not None
            ]
            onnx_graph.replace(proto, encodings, self._engine.accuracy_level)
            return proto
        alone = _Alone(module)
        renamed = {0: Part(name="layer", modules=("layer",), rows=None, target=part.target)}
        return self._everywhere(dense, alone, [renamed[0]], {0: transform})


def _encoded(
    proto: Any, name: str, module: nn.Module, transform: Transform, target: Target
) -> tuple[Encoding, IntegerCodes]:
    """Encode a weight with all codes equal to the middle one."""
    scheme: Scheme | None = scheme_of(transform, target)
    assert scheme is not None  # noqa: S101
    products = onnx_graph.products_with(proto, name) if onnx_graph.takes_products(scheme) else ()
    groups, middle = scheme.num_groups(target), 2 ** (scheme.bits - 1)
    codes = IntegerCodes(
        codes=torch.full((target.channels, target.per_channel), middle, dtype=torch.int32),
        scales=torch.ones(target.channels, groups, dtype=scheme.scale_type),
        zeros=torch.full((target.channels, groups), middle, dtype=torch.int32),
    )
    return Encoding(name=name, module=module, scheme=scheme, target=target, products=products), codes


def _empty(proto: Any) -> Any:
    """A graph with the same input that does nothing."""
    from onnx import helper

    empty = onnx_graph.copied(proto)
    given = empty.graph.input[0]
    del empty.graph.node[:], empty.graph.initializer[:], empty.graph.output[:]
    empty.graph.node.append(helper.make_node("Shape", [given.name], ["shape"]))
    empty.graph.output.append(helper.make_tensor_value_info("shape", 7, [len(given.type.tensor_type.shape.dim)]))
    return empty


def in_turn(sessions: Sequence[Any], batches: Iterable[Any], threads: int, rounds: int = ROUNDS) -> list[float]:
    """Minimum seconds of every session for all the batches; sessions take turns, in a different order each round."""
    feeds = [[onnx_graph.feed_of(session, batch) for batch in batches] for session in sessions]
    now = time.thread_time if threads == 1 else time.perf_counter
    order, least, counts = np.random.default_rng(0), [float("inf")] * len(sessions), [1] * len(sessions)
    for turn in range(rounds + 1):
        for place in order.permutation(len(sessions)).tolist():
            begun = now()
            for _ in range(counts[place]):
                for feed in feeds[place]:
                    sessions[place].run(None, feed)
            seconds = (now() - begun) / counts[place]
            if turn == 0:  # the first turn is a warm-up, and tells how often a run must be repeated
                counts[place] = max(1, round(LEAST_S / max(seconds, 1e-6)))
            else:
                least[place] = min(least[place], seconds)
    return least
