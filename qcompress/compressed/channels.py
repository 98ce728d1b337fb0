"""Apply the options of coupled sets to a model: masked while measuring, cut out once chosen."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from qcompress.compressed.cutting import cut_, together
from qcompress.compressed.reconstruction import reconstruct_
from qcompress.compressed.record import Compression, attach, record_of
from qcompress.compressed.removal import cuts_of, mask_
from qcompress.measurement import Measurement
from qcompress.model.coupled import CoupledSet
from qcompress.model.tensors import left_out_bytes, total_bytes
from qcompress.transforms.base import Transform
from qcompress.transforms.channels import RemoveChannels


def remove_chosen_(model: nn.Module, measurement: Measurement, transforms: Sequence[Transform]) -> None:
    """Cut the units removed by a choice out of ``model``, and attach a record of the cuts."""
    removed = put_channels_(model, measurement.sets, transforms, measurement.moments)
    before, cuts = record_of(model), cuts_of(measurement.sets, removed)
    cut_(model, cuts)
    if before is not None and before.cuts:
        cuts = together(before.cuts, cuts, model)
    attach(model, Compression(parts=(), payload_bytes=total_bytes(model) - left_out_bytes(model), cuts=cuts))


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
    made_up = {
        item.name: removed[item.name]
        for item, removal in zip(sets, going, strict=True)
        if removal and removal.reconstructed
    }
    reconstruct_(model, sets, made_up, moments)
    mask_(model, sets, removed)
    return removed
