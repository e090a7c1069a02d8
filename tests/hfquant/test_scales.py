"""Scales as stored: positive, finite, never clipping where they get coarse; and double quantization."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hfquant  # noqa: F401  registers the grids of the core
from hfquant.blocks import Blocks
from hfquant.grids import grid
from hfquant.qtensor import QTensor
from hfquant.scales import as_stored, decode, encode, round_to, scale_from_bounds, store_scales, zero_from_bounds
from hfquant.spec import TensorSpec

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
numbers32 = st.floats(-(2.0**66), 2.0**66, width=32, allow_subnormal=False)
bounds = st.tuples(numbers32, numbers32).map(sorted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_scales_are_positive_and_finite(dtype: torch.dtype) -> None:
    every = torch.cat([torch.logspace(-45, 38, 4000), torch.tensor([0.0, 3.4e38, torch.inf])]).float()
    stored = as_stored(every, dtype)
    assert stored.dtype == dtype and stored.isfinite().all() and (stored > 0).all()
    assert torch.equal(as_stored(stored.float(), dtype), stored)  # what is stored is stored as it is


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_rounded_to_nearest_where_the_dtype_is_fine_and_up_where_it_is_coarse(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    fine = torch.logspace(-4, 4, 5000)
    assert torch.equal(as_stored(fine, dtype), fine.to(dtype))
    coarse = limits.smallest_normal * torch.linspace(1e-4, 1, 5000, dtype=torch.float64)
    stored = as_stored(coarse.float(), dtype).double()
    assert (stored >= coarse.float().double()).all()
    step = limits.smallest_normal * limits.eps
    assert dtype != torch.float16 or (stored - coarse < 1.0001 * step).all()  # float16 needs its subnormal numbers


def test_float16_scales_resolve_small_weights() -> None:
    # Groups of 1e-5: a floor at the smallest normal float16, 6.1e-5, would round all of them to 0.
    scale = torch.tensor([1e-5]) / 7
    assert float(as_stored(scale, torch.float16)) == pytest.approx(1e-5 / 7, rel=0.05)


@given(bounds, st.sampled_from(["int4", "int8n", "e2m1", "nf4"]))
def test_symmetric_scales_put_the_largest_magnitude_on_the_top_level(pair: list[float], name: str) -> None:
    low, high = torch.tensor(pair[:1]), torch.tensor(pair[1:])
    numbers = grid(name)
    scale = scale_from_bounds(low, high, numbers, zero=False)
    largest = max(abs(low.item()), abs(high.item()))
    assert float(scale) == pytest.approx(largest / numbers.top if largest else 1.0, rel=1e-6)


@given(bounds, st.integers(2, 8))
def test_asymmetric_ranges_hold_zero_and_both_bounds(pair: list[float], bits: int) -> None:
    low, high = torch.tensor(pair[:1]), torch.tensor(pair[1:])
    numbers = grid(f"uint{bits}")
    scale = as_stored(scale_from_bounds(low, high, numbers, zero=True), torch.float32)
    zero = zero_from_bounds(low, scale, numbers)
    assert 0 <= float(zero) < numbers.size and float(zero) == round(float(zero))
    inside = torch.tensor([0.0, min(pair[0], 0), max(pair[1], 0)])
    back = decode(encode(inside, scale, zero, numbers), scale, zero, numbers)
    assert float(back[0]) == 0.0
    assert ((back - inside).abs() <= 0.5001 * scale).all()


@given(st.integers(2, 8), st.integers(0, 999))
def test_codes_are_nearest_for_real_zero_points(bits: int, seed: int) -> None:
    numbers, generator = grid(f"uint{bits}"), torch.Generator().manual_seed(seed)
    scale = torch.rand(5, 1, generator=generator) + 0.1
    zero = numbers.size * torch.randn(5, 1, generator=generator)
    x = 3 * numbers.size * torch.randn(5, 40, generator=generator)
    codes = encode(x, scale, zero, numbers)
    levels = (torch.arange(numbers.size).double() - zero.double()[..., None]) * scale.double()[..., None]
    best = (levels - x.double()[..., None]).abs().amin(-1)
    back = decode(codes, scale, zero, numbers)
    assert ((back.double() - x.double()).abs() <= best + 1e-6 * x.abs().max()).all()
    assert torch.equal(round_to(x, scale, zero, numbers), back)


@given(st.integers(2, 8), st.integers(0, 999))
def test_whole_zero_points_round_ties_to_an_even_step(bits: int, seed: int) -> None:
    """Steps, not codes, are even: the same weights for every zero point."""
    numbers, generator = grid(f"uint{bits}"), torch.Generator().manual_seed(seed)
    zero = torch.randint(numbers.size, (6, 1), generator=generator).float()
    steps = torch.randint(-2 * numbers.size, 2 * numbers.size, (6, 30), generator=generator) / 2
    expected = (steps.round() + zero).clamp(0, numbers.size - 1)
    assert torch.equal(encode(0.5 * steps, torch.tensor(0.5), zero, numbers).float(), expected)


@pytest.mark.parametrize("zero", [False, True])
def test_nan_is_not_hidden(zero: bool) -> None:
    numbers = grid("uint4" if zero else "int4")
    bad, good = torch.tensor([torch.nan, 1.0]), torch.tensor([2.0, 2.0])
    assert scale_from_bounds(bad, good, numbers, zero).isnan().tolist() == [True, False]
    for dtype in DTYPES:
        assert as_stored(bad, dtype).isnan().tolist() == [True, False]


@pytest.mark.parametrize("outer", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["uint8", "uint4", "e4m3fn"])
@given(st.integers(1, 700), st.integers(0, 40))
def test_quantized_scales_are_never_zero_and_near(name: str, outer: str, count: int, decades: int) -> None:
    generator = torch.Generator().manual_seed(count)
    scale = 10 ** (torch.rand(1, count, generator=generator) * decades - decades)
    spec = TensorSpec(name, Blocks(1, 256), scale=outer)
    stored = store_scales(scale, spec)
    assert isinstance(stored, QTensor) and stored.shape == (1, count)
    values, numbers = stored.dequantize(), grid(name)
    assert (values > 0).all() and values.isfinite().all()
    # Nearest positive multiple of the outer scale, or the smallest one.
    outer_scale = spec.blocks.expand(stored.scale.float(), (1, count)).double()
    options = outer_scale[..., None] * numbers.levels()[numbers.zero_code + 1 :].double()
    best = (options - scale.double()[..., None]).abs().amin(-1)
    assert ((values.double() - scale.double()).abs() <= best + 1e-6 * outer_scale * numbers.top).all()


def test_scales_of_scales_of_scales() -> None:
    spec = TensorSpec("uint8", Blocks(1, 16), scale=TensorSpec("uint8", Blocks(1, 8), scale="float16"))
    scale = torch.rand(8, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    stored = store_scales(scale, spec)
    assert isinstance(stored, QTensor) and isinstance(stored.scale, QTensor)
    assert stored.scale.shape == (1, 16) and stored.scale.scale.shape == (1, 2)
    torch.testing.assert_close(stored.dequantize().reshape(8, 32), scale, rtol=0.02, atol=0)
