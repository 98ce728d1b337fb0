"""A clock for ONNX Runtime: applies options to the graph of a model, and times graphs that take turns.

With one thread the times are processor time, so that other programs hardly matter; each is the minimum of several runs.
"""

import copy
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from qcompress.compressed.factored import factored, replace_
from qcompress.engines import onnx_graph, onnx_integer, onnx_tracing
from qcompress.engines.integer_codes import IntegerCodes, Scheme, scheme_of
from qcompress.engines.onnx_graph import Encoding
from qcompress.engines.onnx_integer import IntegerLayer
from qcompress.model.parts import Part
from qcompress.transforms.base import Keep, Target, Transform
from qcompress.transforms.low_rank.factors import LowRank
from qcompress.transforms.quantize.integer import BITS, IntegerProduct

if TYPE_CHECKING:
    from qcompress.engines.onnxruntime import OnnxRuntime

ROUNDS = 20
LEAST_S = 2e-3  # minimum duration of a measured interval: short runs are repeated
LONG_S = 0.5  # time to measure a whole model for, over more rounds: other programs disturb it for a while
MOST_BYTES = 2**31  # of graphs that take turns

Kind = tuple[Hashable, ...]
"""The properties that an option's time depends on, within one layer; () for the dense layer."""


def kind_of(transform: Transform, target: Target, *, linear: bool) -> Kind:
    """Return what an option's time depends on; () if the weight is expanded when the file is loaded, or only looked up.

    Args:
        transform: the option.
        target: the weight.
        linear: whether it is the weight of a Linear layer.
    """
    if isinstance(transform, IntegerProduct):
        narrow = () if transform.bits == max(BITS) else (transform.bits,)
        return "integer", transform.dynamic, *narrow
    if isinstance(transform, LowRank):
        factors = transform.factor_targets(target).values()
        shapes = [(factor.channels, factor.per_channel) for factor in factors]
        then = (kind_of(transform.then, factor, linear=factor.layer == "Linear") for factor in factors)
        return ("factors", *shapes, *then)
    scheme = None if isinstance(transform, Keep) else scheme_of(transform, target)
    if scheme is None or not linear or not onnx_graph.takes_blocks(scheme):
        return ()
    return "bits", scheme.bits, scheme.group_size, scheme.symmetric, scheme.scale_type == torch.float16


class Clock:
    """Times graphs in one engine, taking turns."""

    def __init__(self, engine: "OnnxRuntime", folder: Path) -> None:
        self._engine, self._folder = engine, folder

    def seconds(self, protos: Iterable[Any], batch: Any) -> list[float]:
        """Return the seconds of graphs for a batch."""
        return in_turn([self._session(proto) for proto in protos], [batch], self._engine.threads)

    def ratios(self, original: Any, protos: Iterable[Any], batch: Any) -> list[float]:
        """Return the seconds of whole models for a batch, divided by the original's; all of them take turns.

        Models that would take much memory together are timed a few at a time.
        """
        ratios: list[float] = []
        group: list[Any] = []
        reference, group_bytes = self._session(original), original.ByteSize()

        def time_group() -> None:
            first, *others = in_turn([reference, *group], [batch], self._engine.threads, long_s=LONG_S)
            ratios.extend(seconds / first for seconds in others)
            group.clear()

        for proto in protos:
            if group and group_bytes + proto.ByteSize() > MOST_BYTES:
                time_group()
                group_bytes = original.ByteSize()
            group.append(self._session(proto))
            group_bytes += proto.ByteSize()
        if group:
            time_group()
        return ratios

    def _session(self, proto: Any) -> Any:
        file = self._folder / "graph.onnx"
        file.write_bytes(proto.SerializeToString())
        return self._engine.session(file)

    def graph_with(
        self, chosen: Mapping[int, Transform], traced: Any, model: nn.Module, parts: Sequence[Part], batch: Any
    ) -> Any:
        """Return the graph of a model with options in place of parts; the values do not matter for the time.

        Args:
            chosen: index of a part → its option.
            traced: graph of the dense model.
            model: the dense model.
            parts: its parts.
            batch: input for tracing.
        """
        coded: list[tuple[tuple[str, ...], Transform, Target]] = []
        low_rank = [(parts[place], option) for place, option in chosen.items() if isinstance(option, LowRank)]
        if low_rank:
            model = copy.deepcopy(model)
            for part, option in low_rank:
                path, targets = part.modules[0], option.factor_targets(part.target)
                means = {
                    name: torch.full((factor.channels, factor.per_channel), 1 / factor.per_channel)
                    for name, factor in targets.items()
                }
                dense = model.get_submodule(path)
                replace_(dense, factored(dense, means))
                coded += [((f"{path}.{name}",), option.then, factor) for name, factor in targets.items()]
            traced = onnx_tracing.trace(model, batch)
        coded += [
            (parts[place].modules, transform, parts[place].target)
            for place, transform in chosen.items()
            if not isinstance(transform, LowRank)
        ]
        return self._encoded(traced, model, coded)

    def _encoded(
        self, traced: Any, model: nn.Module, coded: Sequence[tuple[tuple[str, ...], Transform, Target]]
    ) -> Any:
        """Return a copy of the graph with the weights of these layers in codes."""
        proto = onnx_graph.copied(traced)
        tensors = {item.name for item in proto.graph.initializer}
        encodings, integers = [], []
        for paths, transform, target in coded:
            modules = [model.get_submodule(path) for path in paths]
            name = onnx_graph.initializer_of(model, paths[0], tensors)
            if name is None or not kind_of(transform, target, linear=any(map(onnx_graph.is_linear, modules))):
                continue
            if isinstance(transform, IntegerProduct):
                integers.append(IntegerLayer(name=name, transform=transform, target=target))
            else:
                encodings.append(_in_codes(proto, name, modules, transform, target))
        onnx_graph.replace(proto, encodings, self._engine.accuracy_level)
        onnx_integer.put_(proto, integers)
        return proto


def _in_codes(
    proto: Any, name: str, modules: Sequence[nn.Module], transform: Transform, target: Target
) -> tuple[Encoding, IntegerCodes]:
    """Encode a weight with all codes equal to the middle one."""
    scheme: Scheme | None = scheme_of(transform, target)
    assert scheme is not None  # noqa: S101
    groups, middle = scheme.num_groups(target), 2 ** (scheme.bits - 1)
    codes = IntegerCodes(
        codes=torch.full((target.channels, target.per_channel), middle, dtype=torch.int32),
        scales=torch.ones(target.channels, groups, dtype=scheme.scale_type),
        zeros=torch.full((target.channels, groups), middle, dtype=torch.int32),
    )
    return onnx_graph.encoding(proto, name, modules, scheme, target), codes


def in_turn(
    sessions: Sequence[Any], batches: Iterable[Any], threads: int, rounds: int = ROUNDS, long_s: float = 0.0
) -> list[float]:
    """Minimum seconds of every session for all the batches; sessions take turns, in a different order each round.

    An earlier session leaves the caches full of its data, so each measured interval follows a run of the same session.
    There are at least ``rounds``, and as many as it takes to measure the first session for ``long_s`` seconds.
    """
    feeds = [[onnx_tracing.feed_of(session, batch) for batch in batches] for session in sessions]
    now = time.thread_time if threads == 1 else time.perf_counter

    def run(place: int) -> None:
        for feed in feeds[place]:
            sessions[place].run(None, feed)

    def seconds(place: int, count: int) -> float:
        run(place)
        begun = now()
        for _ in range(count):
            run(place)
        return max(now() - begun, 1e-6) / count

    places, order = range(len(sessions)), np.random.default_rng(0)
    once = [seconds(place, 1) for place in places]
    counts = [max(1, round(LEAST_S / run_s)) for run_s in once]
    rounds = max(rounds, round(long_s / (counts[0] * once[0])))
    least = [float("inf")] * len(sessions)
    for _ in range(rounds):
        for place in order.permutation(places).tolist():
            least[place] = min(least[place], seconds(place, counts[place]))
    return least
