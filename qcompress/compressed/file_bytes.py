"""The size of the whole file as a resource: the arrays, plus a reserve for everything around them.

The index around the arrays is compressed, so its size is only approximately additive. Therefore some bytes are
reserved for it, and the size of the resulting file is checked (`compressed_size`). If it is too large after all, the
caller asks for a larger reserve (``more``).
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
"""Bytes of a part's entry in excess of the entry of a kept part."""


def with_file_bytes(
    model: nn.Module, measurement: Measurement, *, more: float = 0.0, tight: bool = False
) -> Measurement:
    """Return the measurement with the additional resource ``file_bytes``.

    Args:
        model: the model that was measured; it is not modified.
        measurement: measurement of ``model``.
        more: bytes to reserve around the arrays in addition to the usual ones.
        tight: whether to reserve nothing for the parts' entries, so that the stated use is a lower bound for every
            file.
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
