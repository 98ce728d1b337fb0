"""Measure how many channels of every coupled set should stay: parts are sets, options are counts.

Removing channels is a large change, so every option is evaluated directly: the weights that read a set are replaced by
those of the smaller network, the rest of the network is run again, and the true loss is computed. The units that an
option removes are fixed beforehand, by their scores.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from formulations.files import AnyPath
from qcompress.compressed.channels import put_channels_
from qcompress.compressed.reconstruction import readers
from qcompress.errors import DataError, ModelError, OptionsError
from qcompress.measurement import Measurement
from qcompress.measuring.candidates import Candidates
from qcompress.measuring.inputs.moments import second_moments
from qcompress.measuring.options_by_layer import Offered
from qcompress.measuring.progress import MeasureProgress
from qcompress.model.calibration import Calibration
from qcompress.model.counting import count
from qcompress.model.coupled import CoupledSet
from qcompress.model.parts import Part, survey
from qcompress.model.steady import steady
from qcompress.model.tensors import held_tensors, size_bytes
from qcompress.model.weights import Skipped, layer_names
from qcompress.structure.find import find_sets
from qcompress.structure.scores import by_weight, elimination_order, sensitivity
from qcompress.structure.uses import Uses, uses_of
from qcompress.transforms.base import Keep, Target, Transform
from qcompress.transforms.channels import KeepChannels, RemoveChannels
from qcompress.transforms.column_blocks import MAX_INPUTS

Accumulate = Callable[..., Any]
"""`qcompress.measuring.measure.accumulate`."""


def offers_channels(offered: Offered) -> bool:
    """Whether channels are on offer.

    Raises:
        OptionsError: channels are offered together with other options.
    """
    kinds = {isinstance(offer, KeepChannels) for options in offered.by_pattern.values() for offer in options.offers}
    if kinds == {True, False}:
        raise OptionsError(
            "channel removal cannot be combined with other options: compress with prune_channels(), then compress "
            "the smaller model with prune_quantize() or low_rank()"
        )
    return kinds == {True}


def measure_channels(
    calibration: Calibration,
    offered: Offered,
    accumulate: Accumulate,
    *,
    method: str,
    cache: AnyPath | None = None,
    on_progress: Callable[[MeasureProgress], None] | None = None,
) -> Measurement:
    """`qcompress.measure` for options that remove channels.

    Args:
        calibration: model, data, forward, loss and seed.
        offered: `qcompress.prune_channels` by pattern.
        accumulate: function that sums costs and effects over the data.
        method: same as in `qcompress.measure`; options are always evaluated directly, but ``"sampled"`` is refused.
        cache: same as in `qcompress.measure`.
        on_progress: same as in `qcompress.measure`.

    Raises:
        ModelError: no channel of the model can be removed.
        OptionsError: the method is ``"sampled"``.
    """
    if method == "sampled":
        raise OptionsError("options of channels are tried one by one: method='sampled' has no gradient for them")
    model, data, loss = calibration.model, calibration.data, calibration.loss
    run = steady(calibration.forward, calibration.seed)
    offered.require_known(layer_names(model))
    fingerprint = Measurement.fingerprint_of(model)
    inventory = survey(model, data, run, loss=loss)
    structure = find_sets(model, data, calibration.forward)
    left_out = {item.name: why for item in structure.sets if (why := offered.left_out(_pattern_name(item)))}
    sets = tuple(item for item in structure.sets if item.name not in left_out)
    kept = {**structure.kept, **left_out}
    if not sets:
        raise _nothing(kept)
    offers = {item.name: _offers(offered, item) for item in sets}
    moments, num_inputs = _moments(model, data, run, inventory.parts, sets, offers)
    orders = _orders(calibration, run, sets, offers, moments)
    transforms = tuple(_options(item, offers[item.name], orders[item.name]) for item in sets)
    for item in (item for item, options in zip(sets, transforms, strict=True) if len(options) < 2):
        kept[item.name] = f"nothing on offer removes one of its {item.num_units} channels"
    sets = tuple(item for item in sets if item.name not in kept)
    transforms = tuple(options for options in transforms if len(options) > 1)
    if not sets:
        raise _nothing(kept)
    uses = uses_of(model, sets, count(model, data, run, loss))
    candidates = ChannelCandidates(model, sets, transforms, moments, uses, _parts(model, sets))
    settings = [fingerprint, "channels", None if cache is None else calibration.digests()]
    sums = accumulate(
        model, data, candidates, loss, "direct", calibration.seed, run, settings, cache=cache, on_progress=on_progress
    )
    if sums.num_batches != inventory.num_batches:
        raise DataError("the data differs from pass to pass")
    return Measurement(
        parts=candidates.parts,
        transforms=transforms,
        cost=sums.mean_cost(),
        factor=sums.factor(),
        error=np.full(candidates.num_options, np.nan),
        original=MappingProxyType(inventory.original),
        skipped=_skipped(model, kept),
        num_samples=sums.num_samples,
        method="direct",
        loss=loss.name,
        seed=calibration.seed,
        model_fingerprint=fingerprint,
        standing=(0,) * len(sets),
        moments=MappingProxyType({path: table.numpy() for path, table in moments.items()}),
        num_inputs=MappingProxyType(num_inputs),
        sets=sets,
        **_use_tables(uses, transforms),
    )


def _use_tables(uses: Uses, transforms: Sequence[Sequence[Transform]]) -> dict[str, Any]:
    """The measurement's fields on resource use: fixed, by single option, and by pairs of options."""
    tables = {name: uses.tables(name, [_counts(options) for options in transforms]) for name in ("bytes", "macs")}
    return {
        "fixed": MappingProxyType({name: table[0] for name, table in tables.items()}),
        "resources": MappingProxyType({name: table[1] for name, table in tables.items()}),
        "resource_pairs": MappingProxyType({name: table[2] for name, table in tables.items() if table[2].nnz}),
    }


def _skipped(model: nn.Module, kept: Mapping[str, str]) -> tuple[Skipped, ...]:
    """The layers whose channels stay, with the reasons."""
    sizes = {item.name: size_bytes(item.tensor) for item in held_tensors(model)}
    return tuple(
        Skipped(name=name, size_bytes=sizes.get(f"{name}.weight", 0), reason=why) for name, why in kept.items()
    )


class ChannelCandidates(Candidates):
    """Options of sets in the form that `qcompress.measuring.methods.direct.Direct` evaluates."""

    def __init__(
        self,
        model: nn.Module,
        sets: Sequence[CoupledSet],
        transforms: Sequence[tuple[Transform, ...]],
        moments: Mapping[str, Tensor],
        uses: Uses,
        parts: tuple[Part, ...],
    ) -> None:
        super().__init__(model, parts, transforms, _no_rows, [0] * len(parts))
        self._sets, self._uses = tuple(sets), uses
        self._moments = {path: table.numpy() for path, table in moments.items()}
        self._tensors = {item.name: item.tensor for item in held_tensors(model)}

    @property
    def size_bytes(self) -> NDArray[np.float64]:
        """``(V,)`` bytes of the network with each option alone."""
        whole = [item.num_units for item in self._sets]
        alone = [
            [*whole[:place], kept, *whole[place + 1 :]]
            for place, options in enumerate(self.transforms)
            for kept in _counts(options)
        ]
        return np.array([self._uses.of(kept)["bytes"] for kept in alone])

    @contextlib.contextmanager
    def applied(self, part: int, option: int) -> Iterator[None]:
        """Context manager that masks units of one set as an option says; exactly restored afterwards."""
        item, transform = self._sets[part], self.transforms[part][option]
        assert isinstance(transform, RemoveChannels)  # noqa: S101
        tensors = {axis.tensor: self._tensors[axis.tensor] for axis in item.axes if axis.reads}
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        try:
            put_channels_(self._model, [item], [transform], self._moments)
            yield
        finally:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(before[name])


def _nothing(kept: Mapping[str, str]) -> ModelError:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:5])
    return ModelError(f"no channel of the model can be removed ({reasons})")


def _no_rows(part: int, option: int) -> Tensor:
    raise AssertionError(f"option {option} of set {part} has no rows of its own")


def _pattern_name(item: CoupledSet) -> str:
    return item.name.split(" (")[0]


def _offers(offered: Offered, item: CoupledSet) -> list[KeepChannels]:
    return [offer for offer in offered.options(_pattern_name(item)).offers if isinstance(offer, KeepChannels)]


def _counts(options: Sequence[Transform]) -> list[int]:
    units = next(removal.units for removal in options if isinstance(removal, RemoveChannels))
    return [units - len(removal.removed) if isinstance(removal, RemoveChannels) else units for removal in options]


def _moments(
    model: nn.Module,
    data: Iterable[Any],
    run: Any,
    parts: Sequence[Part],
    sets: Sequence[CoupledSet],
    offers: Mapping[str, list[KeepChannels]],
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Second moments of the layers that read a set, for offers that need them."""
    paths = {
        reader.path
        for item in sets
        if any(offer.reconstructed or offer.scores == "obs" for offer in offers[item.name])
        for reader in readers(model, item)
    }
    fitting = [
        part
        for part in parts
        if part.modules[0] in paths
        and len(part.modules) == 1
        and part.target.common_input
        and part.target.per_channel <= MAX_INPUTS
    ]
    return second_moments(model, fitting, data, run) if fitting else ({}, {})


def _orders(
    calibration: Calibration,
    run: Any,
    sets: Sequence[CoupledSet],
    offers: Mapping[str, list[KeepChannels]],
    moments: Mapping[str, Tensor],
) -> dict[str, dict[str, list[int]]]:
    """Name of a set → kind of score → its units in order of removal."""
    model, orders = calibration.model, {item.name: dict[str, list[int]]() for item in sets}
    asked = {offer.scores for options in offers.values() for offer in options}
    felt = (
        sensitivity(model, calibration.data, sets, calibration.loss, run, calibration.seed) if asked - {"l1"} else None
    )
    for item in sets:
        for scores in {offer.scores for offer in offers[item.name]}:
            order = None
            if scores == "obs" and felt is not None:
                order = elimination_order(model, item, moments, felt.outputs)
            if order is None:
                values = by_weight(model, item) if scores == "l1" or felt is None else felt.fisher[item.name]
                order = np.argsort(values, kind="stable").tolist()
            orders[item.name][scores] = order
    return orders


def _options(
    item: CoupledSet, offers: Sequence[KeepChannels], orders: Mapping[str, list[int]]
) -> tuple[Transform, ...]:
    """Keep all units first, then the offered counts in descending order, each count once."""
    by_count: dict[int, Transform] = {}
    for offer in sorted(offers, key=lambda offer: -offer.keep):
        if (kept := offer.kept(item.num_units)) < item.num_units:
            gone = sorted(orders[offer.scores][: item.num_units - kept])
            by_count.setdefault(kept, RemoveChannels(item.num_units, tuple(gone), offer.reconstructed))
    return (Keep(), *by_count.values())


def _parts(model: nn.Module, sets: Sequence[CoupledSet]) -> tuple[Part, ...]:
    """Sets as parts; their modules are the layers that read the set, because changes take effect from there on."""
    tensors = {item.name: item.tensor for item in held_tensors(model)}
    parts = []
    for item in sets:
        reading = [axis for axis in item.axes if axis.reads]
        making = next((axis for axis in item.axes if not axis.reads), reading[0])
        tensor = tensors[making.tensor]
        target = Target(
            layer="channels",
            channels=item.num_units,
            per_channel=tensor.numel() // tensor.shape[making.dim] * making.indices.shape[1],
            dtype=tensor.dtype,
            macs=0.0,
            replaceable=False,
        )
        paths = tuple(dict.fromkeys(axis.tensor.rpartition(".")[0] for axis in reading))
        parts.append(Part(name=item.name, modules=paths, rows=None, target=target))
    return tuple(parts)
