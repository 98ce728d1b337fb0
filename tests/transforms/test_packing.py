"""Packed codes come back, take exactly the promised bytes and lie where the module's page says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompress.transforms.quantize.packing import _CHUNK, MAX_BITS, pack, packed_bytes, unpack


@st.composite
def coded(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.integers(1, MAX_BITS))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))


@settings(max_examples=80, deadline=None)
@given(coded())
def test_codes_come_back_from_exactly_the_bytes_they_need(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack(torch.tensor(codes, dtype=torch.int32), bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-len(codes) * bits // 8) == packed_bytes(len(codes), bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes


@settings(max_examples=80, deadline=None)
@given(coded())
def test_the_stream_is_little_endian_without_gaps(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    stream = sum(code << (bits * place) for place, code in enumerate(codes))
    expected = stream.to_bytes(packed_bytes(len(codes), bits), "little")
    assert bytes(pack(torch.tensor(codes, dtype=torch.int32), bits).tolist()) == expected


@pytest.mark.parametrize("bits", [1, 3, 16])
@pytest.mark.parametrize("extra", [0, 1, 13])
def test_more_codes_than_one_chunk_come_back(bits: int, extra: int) -> None:
    codes = torch.randint(2**bits, (_CHUNK + extra,), generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert len(packed) == packed_bytes(len(codes), bits)
    assert torch.equal(unpack(packed, bits, len(codes)).long(), codes)


def test_a_bitmap_is_packed_from_booleans() -> None:
    mask = torch.tensor([True, False, False, True, False, False, False, True, True])
    assert pack(mask, 1).tolist() == [0b10001001, 1]
    assert unpack(pack(mask, 1), 1, 9).bool().tolist() == mask.tolist()
