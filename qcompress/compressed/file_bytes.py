"""The bytes of the whole file as a resource: the arrays, and room for what is written around them.

What is around the arrays is packed, so it adds up only nearly: some room is left for it, and the file that comes out
is weighed (`compressed_size`). Where it is too large after all, there is to be `more` room.
"""

from dataclasses import replace
from types import MappingProxyType

from torch import nn

from qcompress.budgets import FILE_BYTES
from qcompress.compressed.copying import own_copy
from qcompress.compressed.file import compressed_size
from qcompress.compressed.record import CompressedPart, Compression, attach
from qcompress.measurement import Measurement
from qcompress.transforms.base import Keep

ROOM_PER_PART = 24
"""Bytes for a part's entry beyond those of a part that is kept as it is."""


def with_file_bytes(
    model: nn.Module, measurement: Measurement, *, more: float = 0.0, tight: bool = False
) -> Measurement:
    """The measurement with one more resource, ``file_bytes``.

    Args:
        model: the one that was measured; left as it is.
        measurement: of it.
        more: bytes of room for what is around the arrays, besides those that are left anyway.
        tight: leave no room for the parts' entries, so that no file takes less than is said.
    """
    kept = own_copy(model)
    parts = tuple(CompressedPart(part=part, transform=Keep(), stored={}) for part in measurement.parts)
    attach(kept, Compression(parts=() if tight else parts))
    original = compressed_size(kept).file_bytes
    around = original - measurement.original["bytes"] + (0 if tight else ROOM_PER_PART * len(parts)) + more
    return replace(
        measurement,
        resources=MappingProxyType({**measurement.resources, FILE_BYTES: measurement.resources["bytes"]}),
        fixed=MappingProxyType({**measurement.fixed, FILE_BYTES: measurement.fixed["bytes"] + around}),
        original=MappingProxyType({**measurement.original, FILE_BYTES: float(original)}),
    )
