"""Codes of a few bits each, packed without gaps.

Code ``i`` takes the bits ``i·b … i·b + b - 1`` of the stream, least significant bit first; byte ``k`` of the result
holds the stream's bits ``8k … 8k + 7`` in the same order. So ``n`` codes take exactly ``ceil(n·b / 8)`` bytes, and a
bitmap is the case ``b = 1``.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from qcompress.transforms.threads import over_rows

MAX_BITS = 16
_CHUNK = 1 << 20  # codes processed at once: bounds the memory beside input and output
_CHUNK_THERE = 1 << 26  # the same on an accelerator, where few large operations are fast
_OF_KERNELS = (torch.int32, torch.float32)  # codes of other dtypes would compile them once more


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack whole numbers of ``0 … 2**bits - 1``.

    Args:
        codes: ``(n,)``, any dtype.
        bits: bits per code, 1 to 16.

    Returns:
        ``(ceil(n·bits / 8),)`` uint8.

    >>> pack(torch.tensor([1, 2, 3]), bits=4)
    tensor([33,  3], dtype=torch.uint8)
    """
    if bits == 1:
        return torch.from_numpy(np.packbits(codes.to(torch.bool).numpy(), bitorder="little"))
    packed = torch.empty(packed_bytes(len(codes), bits), dtype=torch.uint8)
    if bits <= 8:
        _pack_by_kernel(codes if codes.dtype in _OF_KERNELS else codes.to(torch.int32), bits, packed)
        return packed
    for start in range(0, len(codes), _CHUNK):
        chunk = codes[start : start + _CHUNK].to(torch.int32)
        eights = torch.nn.functional.pad(chunk, (0, -len(chunk) % 8)).view(-1, 8)  # eight codes fill `bits` bytes
        filled = torch.zeros(len(eights), bits, dtype=torch.int32)
        for code, byte, shift in _overlaps(bits):
            part = eights[:, code] << shift if shift >= 0 else eights[:, code] >> -shift
            filled[:, byte] |= part & 0xFF
        first = packed_bytes(start, bits)
        count = packed_bytes(len(chunk), bits)
        packed[first : first + count] = filled.view(-1)[:count].to(torch.uint8)
    return packed


def unpack(packed: Tensor, bits: int, count: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Undo `pack`.

    Args:
        packed: ``(ceil(count·bits / 8),)`` uint8, on any device.
        bits: bits per code, 1 to 16.
        count: number of codes.
        dtype: dtype of the result.

    Returns:
        ``(count,)``, of ``dtype``, on the same device.

    >>> unpack(pack(torch.tensor([1, 2, 3]), bits=4), bits=4, count=3)
    tensor([1, 2, 3], dtype=torch.int32)
    """
    near = packed.device.type == "cpu"
    if bits == 1 and near:
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little")).to(dtype)
    codes, step = packed.new_empty(count, dtype=dtype), _CHUNK if near else _CHUNK_THERE
    if bits <= 8 and near and dtype in _OF_KERNELS:
        _unpack_by_kernel(packed, bits, codes)
        return codes
    for start in range(0, count, step):
        stop = min(start + step, count)
        chunk = packed[packed_bytes(start, bits) : packed_bytes(stop, bits)].to(torch.int32)
        filled = torch.nn.functional.pad(chunk, (0, -len(chunk) % bits)).view(-1, bits)
        eights = filled.new_zeros(len(filled), 8)
        for code, byte, shift in _overlaps(bits):
            eights[:, code] |= filled[:, byte] >> shift if shift >= 0 else filled[:, byte] << -shift
        codes[start:stop] = (eights & ((1 << bits) - 1)).view(-1)[: stop - start]
    return codes


def _pack_by_kernel(codes: Tensor, bits: int, packed: Tensor) -> None:
    from qcompress.transforms.quantize.packing_kernels import pack_eights  # here: numba is slow to import

    def work(start: int, stop: int) -> None:
        pack_eights(codes[8 * start : 8 * stop].numpy(), bits, packed[bits * start : bits * stop].numpy())

    whole = len(codes) // 8
    over_rows(work, whole, 8)
    if len(codes) % 8:
        last, filled = codes.new_zeros(8), packed.new_empty(bits)
        last[: len(codes) % 8] = codes[8 * whole :]
        pack_eights(last.numpy(), bits, filled.numpy())
        packed[bits * whole :] = filled[: len(packed) - bits * whole]


def _unpack_by_kernel(packed: Tensor, bits: int, codes: Tensor) -> None:
    from qcompress.transforms.quantize.packing_kernels import unpack_eights  # here: numba is slow to import

    def work(start: int, stop: int) -> None:
        unpack_eights(packed[bits * start : bits * stop].numpy(), bits, codes[8 * start : 8 * stop].numpy())

    whole = len(codes) // 8
    over_rows(work, whole, 8)
    if len(codes) % 8:
        last, filled = codes.new_empty(8), packed.new_zeros(bits)
        filled[: len(packed) - bits * whole] = packed[bits * whole :]
        unpack_eights(filled.numpy(), bits, last.numpy())
        codes[8 * whole :] = last[: len(codes) % 8]


def _overlaps(bits: int) -> Iterator[tuple[int, int, int]]:
    """Which of eight codes overlap which of ``bits`` bytes, and the left shift of the code from the byte's start."""
    for code in range(8):
        first, last = code * bits, code * bits + bits - 1
        for byte in range(first // 8, last // 8 + 1):
            yield code, byte, first - 8 * byte
