"""Seconds that a batch takes with fewer units of a coupled set, such as heads of an attention layer or units of an MLP.

What a removed unit saves is spread over several layers and the operations between them, so it is timed on the whole
network. The sets that do the same work, such as the MLPs of all blocks, are cut equally in one copy, which takes turns
with the original, and each set gets an equal share of the difference. The difference is many times larger than for one
set, so noise hardly matters. The times of sets add up only if no weight lies along two of them (`require_separate`).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from qcompress.compressed.copying import own_copy
from qcompress.compressed.removal import remove_
from qcompress.errors import OptionsError
from qcompress.measurement import Measurement
from qcompress.measuring import stopwatch
from qcompress.measuring.stopwatch import TimingProgress
from qcompress.model import forward as forwards
from qcompress.model.batches import own
from qcompress.model.coupled import CoupledSet
from qcompress.model.tensors import held_tensors
from qcompress.transforms.base import Transform
from qcompress.transforms.channels import Jointly, RemoveChannels
from qcompress.transforms.low_rank.factors import LowRank


def require_separate(sets: Sequence[CoupledSet]) -> None:
    """Check that no weight lies along two sets.

    Raises:
        OptionsError: one does; the message names it.
    """
    owner: dict[str, str] = {}
    for item in sets:
        for axis in item.axes:
            if owner.setdefault(axis.tensor, item.name) != item.name:
                raise OptionsError(
                    f"a budget for latency_s needs channels whose times add up, but {axis.tensor!r} lies along the "
                    f"channels of both {owner[axis.tensor]!r} and {item.name!r}: use a budget for macs"
                )


def factored_in(measurement: Measurement) -> str:
    """Return the name of a layer that options of a measurement with channels replace by factors, or an empty string."""
    for part, options in zip(measurement.parts, measurement.transforms, strict=True):
        for option in options:
            codes = dict(zip(option.layers, option.codes, strict=True)) if isinstance(option, Jointly) else {}
            codes = codes or {part.name: option}
            if name := next((name for name, code in codes.items() if isinstance(code, LowRank)), ""):
                return name
    return ""


def channels_timed(
    model: nn.Module,
    measurement: Measurement,
    batch: Any,
    forward: forwards.Forward | None,
    repeats: int,
    on_progress: Callable[[TimingProgress], None] | None,
) -> tuple[NDArray[np.float64], float, float]:
    """Return the ``(V,)`` seconds of every option, of everything else, and of the original; see `time_options`.

    Raises:
        OptionsError: a weight lies along two sets, or layers are replaced by factors.
    """
    if name := factored_in(measurement):
        raise OptionsError(
            f"factors in place of layers have no times of their own beside channels ({name!r} has some on offer): use "
            "a budget for macs, or offer no low_rank()"
        )
    run, num_sets = forward or forwards.default_forward, len(measurement.sets)
    paths = tuple(dict.fromkeys(path for part in measurement.parts[:num_sets] for path in part.modules))
    shapes = {item.name: item.tensor.shape for item in held_tensors(model)}
    now = stopwatch.clock_of(model)

    def seconds(networks: Sequence[nn.Module]) -> list[float]:
        taken = np.empty((repeats + 1, len(networks)))
        for turn in range(repeats + 1):
            for place, network in enumerate(networks):
                given = own(batch)
                begun = now()
                run(network.eval(), given)
                taken[turn, place] = now() - begun
        return [float(value) for value in np.median(taken[1:], axis=0)]  # the first turn is a warm-up

    def tell(done: int) -> None:
        if on_progress is not None:
            on_progress(TimingProgress(layers=done, total_layers=num_sets))

    watch = stopwatch.Stopwatch(model, tuple((path,) for path in paths))
    calls = dict(zip(paths, watch.calls(partial(run, model, own(batch))), strict=True))
    likeness = [
        (_likeness_of(item, shapes), *(stopwatch.shapes_in(calls[path]) for path in part.modules))
        for item, part in zip(measurement.sets, measurement.parts, strict=False)
    ]
    return _channel_seconds(model, measurement, likeness, seconds, tell)


def _channel_seconds(
    model: nn.Module,
    measurement: Measurement,
    likeness: Sequence[Hashable],
    seconds: Callable[[Sequence[nn.Module]], list[float]],
    on_kind: Callable[[int], None],
) -> tuple[NDArray[np.float64], float, float]:
    """Return the ``(V,)`` seconds of every option, of everything else, and of the original.

    Args:
        model: the measured model, in evaluation mode.
        measurement: a measurement with `Measurement.sets`.
        likeness: for every set, a key that is equal for sets that do the same work.
        seconds: function that times networks in turn.
        on_kind: called with the number of sets done.

    Raises:
        OptionsError: a weight lies along two sets.
    """
    require_separate(measurement.sets)
    kept = [[_kept(item, option) for option in options] for item, options in _of_sets(measurement)]
    alike: dict[Hashable, list[int]] = {}
    for place, key in enumerate(likeness):
        alike.setdefault((key, tuple(sorted(set(kept[place])))), []).append(place)
    saved: list[dict[int, float]] = [{} for _ in measurement.sets]
    whole, done = [], 0
    for places in alike.values():
        sets = [measurement.sets[place] for place in places]
        for count in sorted(set(kept[places[0]]) - {sets[0].num_units}):
            smaller = remove_(own_copy(model), sets, {item.name: range(item.num_units - count) for item in sets})
            dense_s, smaller_s = seconds([model, smaller])
            whole.append(dense_s)
            for place in places:
                saved[place][count] = (1 - smaller_s / dense_s) / len(places)
        on_kind(done := done + len(places))
    original = float(np.median(whole))
    use = [np.zeros(len(options)) for options in measurement.transforms]
    for place, counts in enumerate(kept):
        most = max(0.0, *saved[place].values())
        use[place] = original * (most - np.array([saved[place].get(count, 0.0) for count in counts]))
    flat = np.concatenate(use)
    starts = np.cumsum([0, *map(len, use[:-1])])
    return flat, original - float(flat[starts].sum()), original


def _of_sets(measurement: Measurement) -> list[tuple[CoupledSet, tuple[Transform, ...]]]:
    return list(zip(measurement.sets, measurement.transforms, strict=False))


def _kept(item: CoupledSet, option: Transform) -> int:
    """Return the number of units that stay."""
    removal = option.removal if isinstance(option, Jointly) else option
    return item.num_units - len(removal.removed) if isinstance(removal, RemoveChannels) else item.num_units


def _likeness_of(item: CoupledSet, shapes: Mapping[str, Sequence[int]]) -> Hashable:
    """Return a key that is equal for sets along tensors of the same shapes."""
    axes = tuple((tuple(shapes[axis.tensor]), axis.dim, axis.indices.shape) for axis in item.axes)
    return (axes, len(item.bypasses))
