"""The removals on offer: which sets have a choice, in which order their units go, and the options of each set."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from qcompress.compressed.reconstruction import readers
from qcompress.errors import NoChannelsError
from qcompress.measuring.inputs.moments import forecast_bytes, second_moments
from qcompress.measuring.memory import require_memory
from qcompress.measuring.options_by_layer import Offered
from qcompress.measuring.shrinkage import shrunk
from qcompress.model import forward as forwards
from qcompress.model.calibration import Calibration
from qcompress.model.coupled import CoupledSet
from qcompress.model.parts import Part
from qcompress.model.tensors import held_tensors
from qcompress.structure.find import find_sets
from qcompress.structure.scores import by_weight, elimination_order, sensitivity
from qcompress.transforms.base import Keep, Target, Transform
from qcompress.transforms.channels import KeepChannels, RemoveChannels
from qcompress.transforms.column_blocks import MAX_INPUTS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Removals:
    """The removals on offer for a model.

    Attributes:
        sets: the coupled sets that have a choice.
        transforms: options of each set; all units stay first.
        kept: name of each layer whose channels stay → the reason.
        moments: second moments of layers' inputs, by path of the layer.
        num_inputs: number of inputs that the moments are averaged over.
    """

    sets: tuple[CoupledSet, ...]
    transforms: tuple[tuple[Transform, ...], ...]
    kept: dict[str, str]
    moments: dict[str, Tensor]
    num_inputs: dict[str, int]


def find_removals(
    calibration: Calibration, run: forwards.Forward, offered: Offered, parts: Sequence[Part], coded: Sequence[Part]
) -> Removals:
    """Find the removals on offer.

    Args:
        calibration: model, data, forward, loss and seed.
        run: how to run a batch.
        offered: options by layer.
        parts: all parts of the model, for the moments of their inputs.
        coded: parts whose codes need moments.

    Raises:
        NoChannelsError: no channel of the model can be removed.
        OptionsError: the moments do not fit into the available memory.
    """
    model = calibration.model
    sets, kept = on_offer(model, calibration.data, calibration.forward, offered)
    offers = {item.name: _offers(offered, _makers(model, item)) for item in sets}
    moments, num_inputs = _moments(calibration, run, parts, sets, offers, coded)
    orders = _orders(calibration, run, sets, offers, moments)
    options = {item.name: _options(item, offers[item.name], orders[item.name]) for item in sets}
    transforms = tuple(options[item.name] for item in sets)
    return Removals(sets=sets, transforms=transforms, kept=kept, moments=moments, num_inputs=num_inputs)


def on_offer(
    model: nn.Module, data: Iterable[Any], forward: forwards.Forward | None, offered: Offered
) -> tuple[tuple[CoupledSet, ...], dict[str, str]]:
    """Return the coupled sets that have a choice, and why the channels of other layers stay.

    Raises:
        NoChannelsError: no channel of the model can be removed.
    """
    structure = find_sets(model, data, forward)
    kept, sets = dict(structure.kept), []
    for item in structure.sets:
        makers = _makers(model, item)
        if why := _left_out(item, makers, offered):
            kept[item.name] = why
        elif not _counts(item, _offers(offered, makers)):
            several = f" for all of {', '.join(map(repr, makers))}" if len(makers) > 1 else ""
            kept[item.name] = f"nothing on offer{several} removes one of its {item.num_units} channels"
        else:
            sets.append(item)
    if not sets:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:5])
        raise NoChannelsError(f"no channel of the model can be removed ({reasons})")
    return tuple(sets), kept


def kept_units(item: CoupledSet, options: Iterable[Transform]) -> list[int]:
    """Return the number of units that each option of a set keeps."""
    return [item.num_units - len(option.removed) if isinstance(option, RemoveChannels) else item.num_units
            for option in options]  # fmt: skip


def parts_of_sets(model: nn.Module, sets: Sequence[CoupledSet]) -> tuple[Part, ...]:
    """Return sets as parts; their modules are the layers that read the set, where changes take effect."""
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
        parameter = reading[0].tensor.rpartition(".")[2]
        parts.append(Part(name=item.name, modules=paths, rows=None, target=target, parameter=parameter))
    return tuple(parts)


Makers = Mapping[str, tuple[str, ...]]
"""Path of a layer that makes a set's channels → the names that patterns may give it."""


def _makers(model: nn.Module, item: CoupledSet) -> Makers:
    """Return the layers that make a set's channels; norms and depthwise convolutions only pass them on."""
    made = [axis.tensor for axis in item.axes if not axis.reads] or [item.axes[0].tensor]
    flat = {held.name for held in held_tensors(model) if held.tensor.ndim < 2 or held.key in held.module._buffers}
    modules = dict(model.named_modules())
    making = [name for name in made if name not in flat and not _is_depthwise(modules.get(_path(name)))]
    return {_path(name): _names(name) for name in making or made[:1]}


def _is_depthwise(module: nn.Module | None) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups == module.in_channels


def _left_out(item: CoupledSet, makers: Makers, offered: Offered) -> str:
    """Return why a set is not on offer: a layer along it must not change, or one that makes it is left out; or ""."""
    for axis in item.axes:
        if why := offered.skipped(*_names(axis.tensor)):
            return _because(why, _path(axis.tensor), item, "would change with them")
    for path, names in makers.items():
        if why := offered.left_out(*names):
            return _because(why, path, item, "makes them as well")
    return ""


def _because(why: str, path: str, item: CoupledSet, what: str) -> str:
    return why if path == item.name.split(" (")[0] else f"{why} ({path!r}, which {what})"


def _path(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor


def _names(tensor: str) -> tuple[str, ...]:
    return _path(tensor), tensor.removesuffix(".weight")


def _offers(offered: Offered, makers: Makers) -> list[KeepChannels]:
    """Return what is on offer for every layer that makes a set's channels."""
    first, *others = (offered.options(*names).offers for names in makers.values())
    return [offer for offer in first if isinstance(offer, KeepChannels) and all(offer in other for other in others)]


def _moments(
    calibration: Calibration,
    run: forwards.Forward,
    parts: Sequence[Part],
    sets: Sequence[CoupledSet],
    offers: Mapping[str, list[KeepChannels]],
    coded: Sequence[Part],
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the second moments of the layers that read a set and of those with codes, for offers that need them."""
    model = calibration.model
    paths = {
        reader.path
        for item in sets
        if any(offer.reconstructed or offer.scores == "obs" for offer in offers[item.name])
        for reader in readers(model, item)
    }
    reading = [
        part
        for part in parts
        if part.modules[0] in paths
        and len(part.modules) == 1
        and part.target.common_input
        and part.target.per_channel <= MAX_INPUTS
    ]
    fitting = list({part.name: part for part in (*reading, *coded)}.values())
    if not fitting:
        return {}, {}
    require_memory(forecast_bytes(fitting))
    moments, num_inputs = second_moments(model, fitting, calibration.data, run)
    return {**moments, **shrunk(calibration, run, reading, sets, moments, num_inputs)}, num_inputs


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
                if not values.any():  # no layer of a known kind reads the set
                    values = by_weight(model, item)
                order = np.argsort(values, kind="stable").tolist()
            orders[item.name][scores] = order
    return orders


def _options(
    item: CoupledSet, offers: Sequence[KeepChannels], orders: Mapping[str, list[int]]
) -> tuple[Transform, ...]:
    """Keep all units first, then the offered counts in descending order, each count once."""
    by_count = {}
    for kept, offer in _counts(item, offers).items():
        gone = sorted(orders[offer.scores][: item.num_units - kept]) if kept else range(item.num_units)
        by_count[kept] = RemoveChannels(item.num_units, tuple(gone), offer.reconstructed)
    return (Keep(), *by_count.values())


def _counts(item: CoupledSet, offers: Sequence[KeepChannels]) -> dict[int, KeepChannels]:
    """Return how many units of a set can be kept instead of all, in descending order, each with its offer."""
    counts: dict[int, KeepChannels] = {}
    for offer in sorted(offers, key=lambda offer: -offer.keep):
        if (kept := offer.kept(item.num_units)) < item.num_units and (kept or item.bypasses):
            counts.setdefault(kept, offer)
    return counts
