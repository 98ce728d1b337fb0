"""Read and write the scales and offsets in the blocks of ggml's formats, so that they can be chosen here.

A weight is ``unit·step·code + low_unit·low``. A block has a float16 unit (two with offsets); every group of its weights
has an integer step and, in formats with offsets, an integer low. In the small formats the group is the whole block, and
step and low are 1. Source of the layouts: ``ggml-common.h`` of https://github.com/ggml-org/ggml.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scales:
    """The scales and offsets of blocks, in float32.

    Attributes:
        units: ``(blocks,)``.
        steps: ``(blocks, groups)`` whole numbers.
        low_units, lows: the same for the offsets, or None.
    """

    units: Floats
    steps: Floats
    low_units: Floats | None = None
    lows: Floats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a block stores scales and offsets.

    Attributes:
        steps, lows: smallest and largest value; ``lows`` is None for formats without offsets.
        read: function from blocks ``(blocks, bytes of a block)`` to scales.
        write: function that writes scales into blocks, in place.
        powers: whether units are powers of two in one byte instead of float16.
    """

    read: Callable[[Bytes], Scales]
    write: Callable[[Bytes, Scales], None]
    steps: tuple[int, int] = (1, 1)
    lows: tuple[int, int] | None = None
    powers: bool = False


def _half(blocks: Bytes, place: int) -> Floats:
    return np.ascontiguousarray(blocks[:, place : place + 2]).view(np.float16)[:, 0].astype(np.float32)


def _put_half(blocks: Bytes, place: int, numbers: Floats) -> None:
    blocks[:, place : place + 2] = numbers.astype(np.float16)[:, None].view(np.uint8)


def _ones(blocks: Bytes) -> Floats:
    return np.ones((len(blocks), 1), np.float32)


def _whole(numbers: Floats | None) -> Bytes:
    assert numbers is not None  # noqa: S101
    return numbers.astype(np.int16).astype(np.uint8)  # negative numbers keep their lowest eight bits


def _read_one(blocks: Bytes) -> Scales:
    return Scales(units=_half(blocks, 0), steps=_ones(blocks))


def _write_one(blocks: Bytes, scales: Scales) -> None:
    _put_half(blocks, 0, scales.units)


def _read_two(blocks: Bytes) -> Scales:
    return Scales(units=_half(blocks, 0), steps=_ones(blocks), low_units=_half(blocks, 2), lows=_ones(blocks))


def _write_two(blocks: Bytes, scales: Scales) -> None:
    assert scales.low_units is not None  # noqa: S101
    _put_half(blocks, 0, scales.units)
    _put_half(blocks, 2, scales.low_units)


def _read_power(blocks: Bytes) -> Scales:
    return Scales(units=np.ldexp(np.float32(1), blocks[:, 0].astype(np.int32) - 128), steps=_ones(blocks))


def _write_power(blocks: Bytes, scales: Scales) -> None:
    blocks[:, 0] = np.frexp(scales.units)[1] + 127


def _read_q2_k(blocks: Bytes) -> Scales:
    steps, lows = (part.astype(np.float32) for part in (blocks[:, :16] & 15, blocks[:, :16] >> 4))
    return Scales(units=_half(blocks, 80), steps=steps, low_units=-_half(blocks, 82), lows=lows)


def _write_q2_k(blocks: Bytes, scales: Scales) -> None:
    assert scales.low_units is not None  # noqa: S101
    blocks[:, :16] = _whole(scales.steps) | _whole(scales.lows) << 4
    _put_half(blocks, 80, scales.units)
    _put_half(blocks, 82, -scales.low_units)


def _read_q3_k(blocks: Bytes) -> Scales:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    fours = np.concatenate([low & 15, low >> 4], axis=1)
    twos = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    return Scales(units=_half(blocks, 108), steps=(fours | twos << 4).astype(np.float32) - 32)


def _write_q3_k(blocks: Bytes, scales: Scales) -> None:
    raised = _whole(scales.steps + 32)
    blocks[:, 96:104] = raised[:, :8] & 15 | (raised[:, 8:] & 15) << 4
    high = (raised >> 4).reshape(-1, 4, 4)
    blocks[:, 104:108] = (high << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(1, dtype=np.uint8)
    _put_half(blocks, 108, scales.units)


def _read_sixes(blocks: Bytes) -> Scales:
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    steps = np.concatenate([first & 63, rest & 15 | first >> 6 << 4], axis=1).astype(np.float32)
    lows = np.concatenate([second & 63, rest >> 4 | second >> 6 << 4], axis=1).astype(np.float32)
    return Scales(units=_half(blocks, 0), steps=steps, low_units=-_half(blocks, 2), lows=lows)


def _write_sixes(blocks: Bytes, scales: Scales) -> None:
    assert scales.low_units is not None  # noqa: S101
    steps, lows = _whole(scales.steps), _whole(scales.lows)
    blocks[:, 4:8] = steps[:, :4] | steps[:, 4:] >> 4 << 6
    blocks[:, 8:12] = lows[:, :4] | lows[:, 4:] >> 4 << 6
    blocks[:, 12:16] = steps[:, 4:] & 15 | (lows[:, 4:] & 15) << 4
    _put_half(blocks, 0, scales.units)
    _put_half(blocks, 2, -scales.low_units)


def _read_q6_k(blocks: Bytes) -> Scales:
    steps = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return Scales(units=_half(blocks, 208), steps=steps)


def _write_q6_k(blocks: Bytes, scales: Scales) -> None:
    blocks[:, 192:208] = _whole(scales.steps)
    _put_half(blocks, 208, scales.units)


def _read_iq4_xs(blocks: Bytes) -> Scales:
    pairs, low = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16), blocks[:, 4:8]
    twos = (pairs >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
    fours = np.stack([low & 15, low >> 4], axis=2).reshape(-1, 8)
    return Scales(units=_half(blocks, 0), steps=(fours | twos << 4).astype(np.float32) - 32)


def _write_iq4_xs(blocks: Bytes, scales: Scales) -> None:
    raised = _whole(scales.steps + 32)
    twos = (raised >> 4).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)
    blocks[:, 2:4] = twos.sum(1, dtype=np.uint16)[:, None].view(np.uint8)
    blocks[:, 4:8] = raised[:, ::2] & 15 | (raised[:, 1::2] & 15) << 4
    _put_half(blocks, 0, scales.units)


ONE = Layout(read=_read_one, write=_write_one)
TWO = Layout(read=_read_two, write=_write_two, lows=(1, 1))
POWER = Layout(read=_read_power, write=_write_power, powers=True)
Q2_K = Layout(read=_read_q2_k, write=_write_q2_k, steps=(0, 15), lows=(0, 15))
Q3_K = Layout(read=_read_q3_k, write=_write_q3_k, steps=(-32, 31))
SIXES = Layout(read=_read_sixes, write=_write_sixes, steps=(0, 63), lows=(0, 63))
Q6_K = Layout(read=_read_q6_k, write=_write_q6_k, steps=(-128, 127))
IQ4_XS = Layout(read=_read_iq4_xs, write=_write_iq4_xs, steps=(-32, 31))
