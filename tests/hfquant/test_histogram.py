"""A histogram depends on the values it holds and on nothing else, and its quantiles are those of the values."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hfquant.errors import CalibrationError
from hfquant.histogram import BINS, Histogram

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Everything float32 holds, subnormal numbers and both zeros included, and values that share a scale.
batches = st.lists(st.lists(st.one_of(finite, st.floats(-8, 8, width=32)), max_size=30), min_size=1, max_size=5)


def counted(*parts: Tensor) -> Histogram:
    made = Histogram()
    for part in parts:
        made.add(part)
    return made


def same(one: Histogram, other: Histogram) -> bool:
    bounds = (one.low, one.high, one.exponent) == (other.low, other.high, other.exponent)
    return bounds and torch.equal(one.counts, other.counts)


def drawn(seed: int, size: int = 5000) -> Tensor:
    """Values whose tails are long."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) * torch.randn(size, generator=generator).exp()


@given(batches, st.randoms(use_true_random=False), st.integers(0, 5))
def test_order_and_shares_leave_no_trace(lists: list[list[float]], random, cut: int) -> None:
    parts = [torch.tensor(values) for values in lists]
    whole = counted(torch.cat(parts))
    shuffled = list(parts)
    random.shuffle(shuffled)
    assert same(counted(*shuffled), whole)
    left, right = counted(*shuffled[:cut]), counted(*shuffled[cut:])
    untouched = copy.deepcopy(right)
    left.merge(right)
    assert same(left, whole) and same(right, untouched)


@given(batches)
def test_sums_over_processes_are_merges(lists: list[list[float]]) -> None:
    held = [counted(torch.tensor(values)) for values in lists]
    everyone = torch.stack([part.bounds() for part in held]).amax(0)
    for part in held:
        part.reach(everyone)
    merged = Histogram()
    for part in held:
        merged.merge(part)
    assert all(part.exponent == merged.exponent for part in held)
    assert torch.equal(torch.stack([part.counts for part in held]).sum(0), merged.counts)


@given(batches)
def test_counts_are_those_of_numpy(lists: list[list[float]]) -> None:
    x = torch.tensor([value for values in lists for value in values])
    made = counted(x)
    assert made.total == x.numel() and made.counts.dtype == torch.int64
    if x.numel():
        assert made.low == float(x.min()) and made.high == float(x.max()) and made.absmax == float(x.abs().max())
    for row, values in enumerate((x[x >= 0], -x[x < 0])):
        # In units of a bin, which float64 holds exactly.
        expected, _ = np.histogram(values.double().numpy() / made.width, np.arange(BINS + 1))
        assert made.counts[row].tolist() == expected.tolist()


@given(finite.filter(lambda value: abs(value) >= 2**-126))
def test_the_largest_magnitude_lies_in_the_upper_half_of_the_bins(value: float) -> None:
    made = counted(torch.tensor([0.0, value / 3, value]))
    assert BINS / 2 <= abs(value) / made.width < BINS
    assert made.magnitudes().numel() == 1 + math.floor(abs(value) / made.width)
    assert int(made.magnitudes().sum()) == 3 and int(made.magnitudes()[-1]) == 1


@given(st.integers(0, 1000), st.integers(-60, 60))
def test_powers_of_two_move_the_bins_and_no_count(seed: int, power: int) -> None:
    x = drawn(seed)
    one, other = counted(x), counted(x * 2.0**power)
    assert other.exponent == one.exponent + power and torch.equal(one.counts, other.counts)
    assert other.quantile(0.99) == one.quantile(0.99) * 2.0**power


def test_the_opposite_values_are_the_mirror_image() -> None:
    x = drawn(0)
    assert torch.equal(counted(-x).counts, counted(x).counts.flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_shape_and_dtype_do_not_matter(dtype: torch.dtype) -> None:
    x = drawn(0, 240).to(torch.bfloat16)
    assert same(counted(x.to(dtype).reshape(4, 5, 12).transpose(0, 2)), counted(x.float()))


def test_large_inputs_are_counted_in_full() -> None:
    x = drawn(1, (1 << 20) + 17)
    x[-1] = 1e4  # in the last chunk
    made = counted(x)
    assert made.total == x.numel() and made.high == 1e4 and same(made, counted(*x.split(99_991)))


@given(st.integers(0, 300), st.floats(0, 1), st.integers(1, 400))
def test_quantiles_are_within_one_bin(seed: int, share: float, size: int) -> None:
    x = drawn(seed, size)
    made = counted(x)
    for values, found in ((x, made.quantile(share)), (x.abs(), made.magnitude_quantile(share))):
        expected = float(torch.quantile(values.double(), torch.tensor(share, dtype=torch.float64)))
        assert abs(found - expected) <= made.width


@given(st.integers(0, 300), st.integers(1, 50))
def test_the_ends_are_exact(seed: int, size: int) -> None:
    x = drawn(seed, size)
    made = counted(x)
    assert made.quantile(0.0) == float(x.min()) and made.quantile(1.0) == float(x.max())
    assert made.magnitude_quantile(1.0) == float(x.abs().max())


@given(st.integers(0, 300), st.integers(1, 400))
def test_points_stand_for_the_values(seed: int, size: int) -> None:
    x = drawn(seed, size)
    made = counted(x)
    values, counts = made.points()
    assert int(counts.sum()) == size and (counts > 0).all() and (values.diff() > 0).all()
    assert values[0] >= made.low and values[-1] <= made.high
    stand_ins = values.repeat_interleave(counts)
    assert ((stand_ins - x.sort().values).abs() <= made.width / 2 * (1 + 1e-6)).all()


def test_nothing_and_only_zeros() -> None:
    empty = counted(torch.empty(0, 8))
    assert empty.total == 0 and empty.absmax == 0 and not empty.points()[0].numel()
    with pytest.raises(CalibrationError, match="no quantiles"):
        empty.quantile(0.5)
    zeros = counted(torch.tensor([0.0, -0.0]))
    assert zeros.absmax == 0 and zeros.low == zeros.high == 0 and zeros.quantile(0.5) == 0
    zeros.add(torch.tensor([3.0]))
    assert same(zeros, counted(torch.tensor([0.0, 0.0, 3.0])))
    empty.merge(zeros)
    assert same(empty, zeros)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_values_are_refused_and_leave_nothing_behind(bad: float) -> None:
    made = counted(torch.ones(3))
    before = copy.deepcopy(made)
    made.name = "layers.3.mlp"
    with pytest.raises(CalibrationError, match=r"layers\.3\.mlp holds NaN or infinite values"):
        made.add(torch.tensor([5.0, bad, 2.0]))
    assert same(made, before)
