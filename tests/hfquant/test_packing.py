"""Dense packing against Python's big integers, least significant bit first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.packing import pack_bits, packed_width, unpack_bits


def oracle(codes: list[int], bits: int) -> list[int]:
    """One row as one big number: code i at bit i * bits, written out byte by byte."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], int]:
    bits = draw(st.integers(2, 8))
    return draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=70)), bits


@given(rows())
def test_packing_is_one_big_number(row: tuple[list[int], int]) -> None:
    codes, bits = row
    packed = pack_bits(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8 and packed.tolist() == oracle(codes, bits)
    assert packed.numel() == packed_width(len(codes), bits)


@given(rows())
def test_unpacking_reads_the_big_number(row: tuple[list[int], int]) -> None:
    codes, bits = row
    stored = torch.tensor(oracle(codes, bits), dtype=torch.uint8)
    assert unpack_bits(stored, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 64, 100])
def test_unpack_inverts_pack_with_any_leading_axes(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 2, count), generator=torch.Generator().manual_seed(count)).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert torch.equal(unpack_bits(packed, bits, count), codes)
    assert torch.equal(packed[1, 0], pack_bits(codes[1, 0], bits))
    assert packed.is_contiguous() and unpack_bits(packed, bits, count).is_contiguous()


@pytest.mark.parametrize("bits", range(2, 9))
def test_padding_bits_are_zero(bits: int) -> None:
    full = pack_bits(torch.full((5,), 2**bits - 1, dtype=torch.uint8), bits)
    assert int.from_bytes(bytes(full.tolist()), "little") == 2 ** (5 * bits) - 1


@pytest.mark.parametrize("bits", range(2, 9))
def test_shapes_are_known_without_values(bits: int) -> None:
    real = pack_bits(torch.zeros(4, 37, dtype=torch.uint8), bits)
    meta = pack_bits(torch.empty(4, 37, dtype=torch.uint8, device="meta"), bits)
    assert meta.is_meta and meta.shape == real.shape and meta.dtype == real.dtype
    assert unpack_bits(meta, bits, 37).shape == (4, 37)
