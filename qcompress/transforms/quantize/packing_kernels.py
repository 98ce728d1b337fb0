"""Kernels of `packing`: eight codes at a time, which fill as many bytes as a code has bits (at most 8)."""

import numpy as np

from solvers.kernels.compiled import compiled


@compiled
def pack_eights(codes, bits, packed):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Pack codes ``(8·n,)``, of any dtype, into bytes ``(bits·n,)``."""
    for group in range(len(codes) // 8):
        word = np.uint64(0)
        for place in range(8):
            word |= np.uint64(codes[8 * group + place]) << np.uint64(bits * place)
        for byte in range(bits):
            packed[bits * group + byte] = (word >> np.uint64(8 * byte)) & np.uint64(255)


@compiled
def unpack_eights(packed, bits, codes):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Undo `pack_eights`; codes are of any dtype."""
    mask = np.uint64(2**bits - 1)
    for group in range(len(codes) // 8):
        word = np.uint64(0)
        for byte in range(bits):
            word |= np.uint64(packed[bits * group + byte]) << np.uint64(8 * byte)
        for place in range(8):
            codes[8 * group + place] = (word >> np.uint64(bits * place)) & mask
