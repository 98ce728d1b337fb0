"""Where ggml's linear formats keep the code of each weight in a block, so that codes can be chosen by others than ggml.

Linear are the formats whose weights are ``offset + scale·code`` with an offset and a scale a group. `put` writes codes
into blocks and leaves everything else; what offsets and scales are is asked of the decoder (`lines`). Source of the
layouts: ``ggml-common.h`` of https://github.com/ggml-org/ggml.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcompress.transforms.ggml import library
from qcompress.transforms.ggml.types import TYPES

Bytes = NDArray[np.uint8]
LOW, HALF = np.uint8(15), np.uint8(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """How a format codes.

    Attributes:
        levels: codes from 0 to below this.
        group: weights that share offset and scale.
        zero: the code that stands for 0, or None where the offset is free.
        free: whether a block begins with its only scale, in float16.
        put: writes codes ``(blocks, weights of a block)`` into ``(blocks, bytes of a block)``.
    """

    levels: int
    group: int
    zero: int | None
    free: bool
    put: Callable[[Bytes, Bytes], None]


def _nibbles(codes: Bytes) -> Bytes:
    """Of 32 codes the low four bits: the first half of the weights low, the second high."""
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
    """Two bits of four runs of 32 weights in a byte each, for both halves of a block."""
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
    """The low four bits of two runs of 32 weights in a byte each."""
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


FORMATS = {
    "Q4_0": Linear(levels=16, group=32, zero=8, free=True, put=_put_small(2, high=False)),
    "Q4_1": Linear(levels=16, group=32, zero=None, free=True, put=_put_small(4, high=False)),
    "Q5_0": Linear(levels=32, group=32, zero=16, free=True, put=_put_small(2, high=True)),
    "Q5_1": Linear(levels=32, group=32, zero=None, free=True, put=_put_small(4, high=True)),
    "Q8_0": Linear(levels=256, group=32, zero=128, free=True, put=_put_bytes),
    "Q2_K": Linear(levels=4, group=16, zero=None, free=False, put=_put_q2_k),
    "Q3_K": Linear(levels=8, group=16, zero=4, free=False, put=_put_q3_k),
    "Q4_K": Linear(levels=16, group=32, zero=None, free=False, put=_put_q4_k),
    "Q5_K": Linear(levels=32, group=32, zero=None, free=False, put=_put_q5_k),
    "Q6_K": Linear(levels=64, group=16, zero=32, free=False, put=_put_q6_k),
}


def put(name: str, blocks: Bytes, codes: Bytes) -> Bytes:
    """Blocks ``(channels, bytes of a row)`` with other codes ``(channels, n)``.

    >>> blocks = library.encode("Q4_0", np.arange(32, dtype=np.float32)[None])
    >>> library.decode("Q4_0", put("Q4_0", blocks, np.full((1, 32), 8, np.uint8)), 32).tolist() == [[0.0] * 32]
    True
    """
    kind = TYPES[name]
    changed = blocks.reshape(-1, kind.block_bytes).copy()
    FORMATS[name].put(changed, codes.reshape(-1, kind.block))
    return changed.reshape(blocks.shape)


def lines(name: str, blocks: Bytes, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Offset ``(channels, n)`` of the code 0, and scale ``(channels, groups)``."""
    shape = len(blocks), length
    offset, above = (library.decode(name, put(name, blocks, np.full(shape, code, np.uint8)), length) for code in (0, 1))
    return offset, np.ascontiguousarray((above - offset)[:, :: FORMATS[name].group])


def with_scales(name: str, blocks: Bytes, scales: NDArray[np.float32]) -> Bytes:
    """Blocks of a format with a free scale, with other ones ``(channels, groups)``."""
    kind = TYPES[name]
    changed = blocks.reshape(-1, kind.block_bytes).copy()
    changed[:, :2] = scales.astype(np.float16).reshape(-1, 1).view(np.uint8)
    return changed.reshape(blocks.shape)
