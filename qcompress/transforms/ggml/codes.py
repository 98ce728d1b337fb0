"""Read and write the codes of ggml formats in which a weight is an offset plus a scale times a table value.

`put` writes codes into blocks and leaves everything else unchanged; `qcompress.transforms.ggml.scales` does the same
for scales and offsets. Source of the layouts: ``ggml-common.h`` of https://github.com/ggml-org/ggml.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qcompress.transforms.ggml import scales
from qcompress.transforms.ggml.scales import Bytes, Layout, Scales
from qcompress.transforms.ggml.types import TYPES

LOW, HALF = np.uint8(15), np.uint8(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a ggml type stores codes.

    Attributes:
        numbers: the value of each code, to be multiplied by its group's scale.
        group: number of weights that share scale and offset.
        scales: where the block keeps scales and offsets.
        put: function that writes codes ``(blocks, weights of a block)`` into ``(blocks, bytes of a block)``.
    """

    numbers: tuple[int, ...]
    group: int
    scales: Layout
    put: Callable[[Bytes, Bytes], None]


def _nibbles(codes: Bytes) -> Bytes:
    """Pack the low four bits of 32 codes: the first half of the weights into low nibbles, the second into high ones."""
    packed: Bytes = (codes[:, :16] & LOW) | (codes[:, 16:] & LOW) << HALF
    return packed


def _put_small(start: int, high: bool) -> Callable[[Bytes, Bytes], None]:
    def put(blocks: Bytes, codes: Bytes) -> None:
        if high:
            blocks[:, start : start + 4] = np.packbits(codes >> 4, axis=1, bitorder="little")
        blocks[:, start + 4 * high : start + 4 * high + 16] = _nibbles(codes)

    return put


def _put_bytes(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 2:34] = codes ^ 128


def _quarters(codes: Bytes) -> Bytes:
    """Pack two bits of four runs of 32 weights into one byte each, for both halves of a block."""
    runs = codes.reshape(len(codes), 2, 4, 32) & 3
    packed: Bytes = (runs << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(2, dtype=np.uint8)
    return packed.reshape(len(codes), 64)


def _put_q2_k(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 16:80] = _quarters(codes)


def _put_q3_k(blocks: Bytes, codes: Bytes) -> None:
    runs = codes.reshape(len(codes), 8, 32) >> 2
    blocks[:, :32] = (runs << np.arange(8, dtype=np.uint8)[:, None]).sum(1, dtype=np.uint8)
    blocks[:, 32:96] = _quarters(codes)


def _halves(codes: Bytes) -> Bytes:
    """Pack the low four bits of two runs of 32 weights into one byte each."""
    runs: Bytes = codes.reshape(len(codes), 4, 2, 32) & LOW
    packed: Bytes = (runs[:, :, 0] | runs[:, :, 1] << HALF).reshape(len(codes), 128)
    return packed


def _put_q4_k(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 16:144] = _halves(codes)


def _put_q5_k(blocks: Bytes, codes: Bytes) -> None:
    runs = codes.reshape(len(codes), 8, 32) >> 4
    blocks[:, 16:48] = (runs << np.arange(8, dtype=np.uint8)[:, None]).sum(1, dtype=np.uint8)
    blocks[:, 48:176] = _halves(codes)


def _put_q6_k(blocks: Bytes, codes: Bytes) -> None:
    runs = codes.reshape(len(codes), 2, 4, 32)
    low: Bytes = runs & LOW
    blocks[:, :128] = (low[:, :, :2] | low[:, :, 2:] << HALF).reshape(len(codes), 128)
    blocks[:, 128:192] = _quarters((codes >> 4).astype(np.uint8))


def _put_iq4_xs(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 8:136] = _nibbles(codes.reshape(-1, 32)).reshape(len(codes), 128)


def _signed(levels: int) -> tuple[int, ...]:
    return tuple(range(-levels // 2, levels // 2))


def _small(numbers: tuple[int, ...], layout: Layout, put: Callable[[Bytes, Bytes], None]) -> Format:
    return Format(numbers=numbers, group=32, scales=layout, put=put)


UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FLOATS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
FORMATS = {
    "Q4_0": _small(_signed(16), scales.ONE, _put_small(2, high=False)),
    "Q4_1": _small(tuple(range(16)), scales.TWO, _put_small(4, high=False)),
    "Q5_0": _small(_signed(32), scales.ONE, _put_small(2, high=True)),
    "Q5_1": _small(tuple(range(32)), scales.TWO, _put_small(4, high=True)),
    "Q8_0": _small(_signed(256), scales.ONE, _put_bytes),
    "IQ4_NL": _small(UNEVEN, scales.ONE, _put_small(2, high=False)),
    "MXFP4": _small(FLOATS, scales.POWER, _put_small(1, high=False)),
    "Q2_K": Format(numbers=tuple(range(4)), group=16, scales=scales.Q2_K, put=_put_q2_k),
    "Q3_K": Format(numbers=_signed(8), group=16, scales=scales.Q3_K, put=_put_q3_k),
    "Q4_K": Format(numbers=tuple(range(16)), group=32, scales=scales.SIXES, put=_put_q4_k),
    "Q5_K": Format(numbers=tuple(range(32)), group=32, scales=scales.SIXES, put=_put_q5_k),
    "Q6_K": Format(numbers=_signed(64), group=16, scales=scales.Q6_K, put=_put_q6_k),
    "IQ4_XS": Format(numbers=UNEVEN, group=32, scales=scales.IQ4_XS, put=_put_iq4_xs),
}


def put(name: str, blocks: Bytes, codes: Bytes, chosen: Scales) -> Bytes:
    """Return blocks ``(channels, bytes of a row)`` with new codes ``(channels, n)``, scales and offsets.

    >>> from qcompress.transforms.ggml import library
    >>> blocks = library.encode("Q4_0", np.arange(32, dtype=np.float32)[None])
    >>> found = put("Q4_0", blocks, np.full((1, 32), 9, np.uint8), scales_of("Q4_0", blocks))
    >>> library.decode("Q4_0", found, 32)[0, :2] == scales_of("Q4_0", blocks).units
    array([ True,  True])
    """
    kind = TYPES[name]
    changed = blocks.reshape(-1, kind.block_bytes).copy()
    FORMATS[name].put(changed, codes.reshape(-1, kind.block))
    FORMATS[name].scales.write(changed, chosen)
    return changed.reshape(blocks.shape)


def scales_of(name: str, blocks: Bytes) -> Scales:
    """Read the scales and offsets of blocks ``(channels, bytes of a row)``, row after row."""
    return FORMATS[name].scales.read(blocks.reshape(-1, TYPES[name].block_bytes))
