"""Apply the options of coupled sets to a model: masked while measuring, cut out once chosen.

If codes are chosen together with channels, they are fitted to the weights that remain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.compressed.bypassed import bypass_, held_by, name_after
from qcompress.compressed.cutting import Cuts, cut_, together
from qcompress.compressed.reconstruction import reconstruct_
from qcompress.compressed.record import CompressedPart, Compression, attach, bypasses_in, install_, record_of
from qcompress.compressed.removal import bypasses_of, cuts_of, mask_
from qcompress.measurement import Measurement
from qcompress.model import layers
from qcompress.model.coupled import CoupledSet
from qcompress.model.parts import Part, weights_of
from qcompress.model.tensors import left_out_bytes, total_bytes
from qcompress.transforms.base import Keep, Transform
from qcompress.transforms.channels import Jointly, RemoveChannels


def remove_chosen_(model: nn.Module, measurement: Measurement, transforms: Sequence[Transform]) -> None:
    """Cut the units removed by a choice out of ``model``, store its layers as chosen, and attach a record.

    Codes are fitted to the inputs of the original's layers without those that are removed.
    """
    cuts = cut_chosen_(model, measurement, transforms)
    if codes := codes_of(measurement, transforms):
        moments = {
            part.path: _left(torch.tensor(measurement.moments[part.path]), part, cuts, model)
            for part in measurement.coded
            if part.path in measurement.moments and not held_by(bypasses_in(model), part.path)
        }
        code_(model, measurement, codes, moments)


def cut_chosen_(model: nn.Module, measurement: Measurement, transforms: Sequence[Transform]) -> Cuts:
    """Cut the units removed by a choice out of ``model``, attach a record of all cuts so far, and return these cuts."""
    removals = [
        transform.removal if isinstance(transform, Jointly) else transform
        for transform in transforms[: len(measurement.sets)]
    ]
    removed = put_channels_(model, measurement.sets, removals, measurement.moments)
    before = record_of(model) or Compression(parts=())
    cuts, bypasses = cuts_of(measurement.sets, removed), bypasses_of(measurement.sets, removed)
    bypass_(model, bypasses)
    cut_(model, cuts)
    earlier = {
        (name, dim): gone for (old, dim), gone in before.cuts.items() if (name := name_after(bypasses, old)) is not None
    }
    record = Compression(
        parts=(),
        payload_bytes=total_bytes(model) - left_out_bytes(model),
        cuts=together(earlier, cuts, model),
        bypasses=(*before.bypasses, *bypasses),
    )
    attach(model, record)
    return cuts


def codes_of(measurement: Measurement, transforms: Sequence[Transform]) -> dict[str, Transform]:
    """Return the transform of every coded layer (by name) in a choice."""
    chosen: dict[str, Transform] = {part.name: Keep() for part in measurement.coded}
    num_sets = len(measurement.sets)
    for transform in transforms[:num_sets]:
        if isinstance(transform, Jointly):
            chosen |= dict(zip(transform.layers, transform.codes, strict=True))
    for part, transform in zip(measurement.parts[num_sets:], transforms[num_sets:], strict=True):
        chosen[part.path] = transform
    return chosen


def code_(
    model: nn.Module, measurement: Measurement, codes: Mapping[str, Transform], moments: Mapping[str, Tensor]
) -> None:
    """Store layers of a network whose channels are cut, in place.

    Args:
        model: result of `cut_chosen_`.
        measurement: the measurement.
        codes: transform of every coded layer, by name.
        moments: second moments of the inputs of these layers in ``model``, by path; codes of layers without moments are
            rounded to nearest.
    """
    parts = coded_parts_in(model, measurement)
    stored = []
    for part, weight in zip(parts, weights_of(model, parts, moments, measurement.num_inputs), strict=True):
        transform = codes[part.name]
        if transform.needs_moments(part.target) and part.path not in moments:
            transform = transform.nearest
        arrays = {} if isinstance(transform, Keep) else transform.encode(weight)
        stored.append(CompressedPart(part=part, transform=transform, stored=arrays))
    rest = total_bytes(model) - left_out_bytes(model) - sum(part.target.dense_bytes for part in parts)
    payload_bytes = rest + sum(item.transform.size_bytes(item.part.target) for item in stored)
    install_(model, stored)
    attach(model, Compression(parts=tuple(stored), payload_bytes=payload_bytes))


def coded_parts_in(model: nn.Module, measurement: Measurement) -> list[Part]:
    """Return the layers with codes on offer that are left in ``model``."""
    there = [part for part in measurement.coded if not held_by(bypasses_in(model), part.path)]
    return [part for part in (part_in(model, item) for item in there) if part.target.num_weights]


def part_in(model: nn.Module, part: Part) -> Part:
    """Return a whole layer of the original as a part of ``model``, where it may have fewer channels."""
    site = part.site(model)
    groups = int(getattr(site.module, "groups", 1)) if part.target.input_groups > 1 else 1
    channels, per_channel = site.rows.shape
    return replace(part, target=part.target.of_shape(channels, per_channel, groups))


def _left(moments: Tensor, part: Part, cuts: Cuts, model: nn.Module) -> Tensor:
    """Return the second moments of a layer's remaining inputs."""
    module, weight = part.site(model).module, part.site(model).weight
    shape = [size + len(cuts.get((part.state_name, dim), ())) for dim, size in enumerate(weight.shape)]
    stays = torch.ones(shape)
    for dim in range(len(shape)):
        stays.index_fill_(dim, torch.tensor(cuts.get((part.state_name, dim), ()), dtype=torch.int64), 0.0)
    rows = layers.to_rows(module, stays, len(moments) if moments.ndim == 3 else None)
    kept, columns = rows.any(dim=1).nonzero()[:, 0], rows.any(dim=0).nonzero()[:, 0]
    if moments.ndim == 1:
        return moments[kept]
    if moments.ndim == 2:
        return moments[columns][:, columns]
    groups = np.unique((kept // (len(rows) // len(moments))).numpy())
    return moments[torch.from_numpy(groups)][:, columns][:, :, columns]


def put_channels_(
    model: nn.Module,
    sets: Sequence[CoupledSet],
    transforms: Sequence[Transform],
    moments: Mapping[str, NDArray[np.float32]],
) -> dict[str, NDArray[np.int64]]:
    """Mask the units that options remove, in place, and return them by set.

    If an option says so, the remaining units compensate for the removed ones.
    """
    going = [transform if isinstance(transform, RemoveChannels) else None for transform in transforms]
    removed = {
        item.name: np.array(removal.removed, dtype=np.int64)
        for item, removal in zip(sets, going, strict=True)
        if removal is not None
    }
    reconstructed = {
        item.name: removed[item.name]
        for item, removal in zip(sets, going, strict=True)
        if removal and removal.reconstructed
    }
    reconstruct_(model, sets, reconstructed, moments)
    mask_(model, sets, removed)
    return removed
