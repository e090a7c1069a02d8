"""Codebooks against bitsandbytes, the formulas they come from, and the quantiles of data."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.codebooks import QuantileGrid, dynamic_exponent, fp4, nf4, quantiles
from hfquant.errors import SpecError


def test_nf4_is_the_map_of_bitsandbytes_bit_for_bit() -> None:
    assert torch.equal(nf4().levels(), bnb.get_4bit_type("nf4", device="cpu"))


def test_nf4_follows_from_the_normal_distribution() -> None:
    # QLoRA, appendix E: 8 quantiles above zero and 7 below it, evenly spaced from `offset` to the median.
    offset, ppf = 0.9677083, torch.special.ndtri
    above = ppf(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    below = -ppf(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    derived = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)]) / above[0]
    assert (nf4().levels() - derived).abs().max() < 1.2e-7


def test_fp4_is_the_set_of_bitsandbytes() -> None:
    theirs = bnb.get_4bit_type("fp4", device="cpu").unique()  # 16 codes, two of them zero
    assert theirs.numel() == 15
    torch.testing.assert_close(fp4().levels(), theirs, rtol=2**-23, atol=0)


def test_dyn8_is_the_dynamic_map_of_bitsandbytes() -> None:
    theirs = bnb.create_dynamic_map()
    assert theirs.numel() == 256
    torch.testing.assert_close(dynamic_exponent(8).levels(), theirs, rtol=0, atol=2**-24)  # they sum in float32


@pytest.mark.parametrize("bits", range(3, 9))
def test_dynamic_exponent_has_every_code_and_one_decade_per_leading_zero(bits: int) -> None:
    levels = dynamic_exponent(bits).levels()
    assert levels.numel() == 2**bits and float(levels[-1]) == 1.0
    positive = levels[levels > 0][:-1].double()
    for fraction_bits in range(bits - 1):
        top = 10.0 ** (fraction_bits - bits + 2)
        assert int(((positive > 0.1 * top) & (positive < top)).sum()) == 2**fraction_bits


@pytest.mark.parametrize("bits", [2, 9])
def test_dynamic_exponent_refuses_other_widths(bits: int) -> None:
    with pytest.raises(SpecError, match="3 to 8 bits"):
        dynamic_exponent(bits)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=300), st.integers(1, 8))
def test_quantiles_are_those_of_torch(values: list[float], bits: int) -> None:
    x = torch.tensor(values)
    where = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    torch.testing.assert_close(quantiles(x, bits), torch.quantile(x.double(), where), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", range(2, 9))
def test_fitted_bins_hold_equally_many_values(bits: int) -> None:
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(bits)).mul(0.2).clamp(-1, 1)
    bins = quantiles(x, bits)
    edges = x.double().sort().values[torch.arange(1, 2**bits) * x.numel() // 2**bits]
    assert (torch.searchsorted(edges, bins) == torch.arange(2**bits)).all()  # one level in each bin
    book = QuantileGrid(bits).fit(x)
    assert book.size == 2**bits and float(book.levels().abs().max()) == 1.0


def test_large_tensors_are_sampled_from_every_column() -> None:
    # 2^22 values in rows of 1024: an even stride would see every fourth column only.
    x = torch.zeros(4096, 1024)
    x[:, 1::2] = 1.0
    x[:, 3::4] = -1.0
    assert quantiles(x, 2).tolist() == [-1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("x", [torch.zeros(64), torch.full((64,), 3.0), torch.full((1,), -2.0)])
def test_constant_values_fit_a_codebook_that_holds_them(x: torch.Tensor) -> None:
    scaled = x / x.abs().max().clamp_min(1)
    book = QuantileGrid(4).fit(scaled)
    assert torch.equal(book.decode(book.encode(scaled)), scaled)


def test_a_fitted_grid_has_no_levels_of_its_own() -> None:
    with pytest.raises(SpecError, match="before it is fitted"):
        QuantileGrid(4).levels()
