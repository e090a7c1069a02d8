"""Ranges: absmax, percentile, MSE and KL against closed forms and slow implementations by the book."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hfquant  # noqa: F401  registers the tables of the core
from hfquant.blocks import Blocks
from hfquant.errors import SpecError
from hfquant.grids import Grid, grid
from hfquant.quantize import quantize_linear
from hfquant.ranges import absmax, kl, kl_threshold, mse, percentile
from hfquant.recipe import Recipe, Step
from hfquant.spec import Scheme, TensorSpec
from hfquant.stats import Stats

WHOLE = Blocks(-1, -1)
SPECS = [
    TensorSpec("int4", Blocks(1, 16)),
    TensorSpec("uint4", Blocks(1, 16), True, "bfloat16"),
    TensorSpec("nf4", Blocks(1, -1), scale="float16"),
    TensorSpec("e2m1", Blocks(4, 8)),
]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.grid)


def heavy(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Values with heavy tails, for which clipping pays."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (1 + 4 * (torch.rand(shape, generator=generator) > 0.98))


def losses(w: Tensor, spec: TensorSpec, step: Step, norm: float = 2.0) -> Tensor:
    """Sum of |error|^norm of each block [R, C] after quantizing by `step`."""
    error = quantize_linear(w, Recipe(Scheme(spec), step)).dequantize().double() - w.double()
    (total,) = spec.blocks.reduce(error.abs().pow(norm), lambda x: (x.sum(1),))
    return total


# Absmax and percentile


@each_spec
def test_percentile_100_is_absmax(spec: TensorSpec) -> None:
    w = heavy((8, 40))
    one, other = absmax(w, spec, Stats()), percentile(w, spec, Stats(), 100)
    assert torch.equal(one.scale, other.scale)
    assert one.zero is None or torch.equal(one.zero, other.zero)


@pytest.mark.parametrize("share", [60.0, 90.0, 99.0, 99.9])
def test_percentile_is_the_quantile_of_magnitudes(share: float) -> None:
    w, spec = heavy((6, 333)), TensorSpec("int8", Blocks(1, -1))
    bound = torch.quantile(w.abs().double(), share / 100, dim=1)
    torch.testing.assert_close(percentile(w, spec, Stats(), share).scale[:, 0].double() * 127, bound, rtol=1e-5, atol=0)


def test_percentile_takes_both_tails_when_asymmetric() -> None:
    w, spec = heavy((6, 333)) + 0.5, TensorSpec("uint8", Blocks(1, -1), True)
    tails = torch.quantile(w.double(), torch.tensor([0.02, 0.98], dtype=torch.float64), dim=1)
    found = percentile(w, spec, Stats(), 98.0)
    torch.testing.assert_close(found.scale[:, 0].double() * 255, tails[1] - tails[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("share", [50.0, 100.1, 0.0, -1.0])
def test_percentile_refuses_other_shares(share: float) -> None:
    with pytest.raises(SpecError, match="above 50 and at most 100"):
        percentile(torch.ones(2, 2), SPECS[0], Stats(), share)


@pytest.mark.parametrize("name", ["absmax", "percentile", "mse"])
@each_spec
def test_parameters_are_the_values_as_stored(spec: TensorSpec, name: str) -> None:
    params = {"absmax": absmax, "percentile": percentile, "mse": mse}[name](heavy((8, 40)), spec, Stats())
    assert isinstance(params.stored, Tensor) and params.stored.dtype == spec.scale_dtype
    assert torch.equal(params.scale, params.stored.float())


# MSE


@each_spec
@pytest.mark.parametrize("norm", [2.0, 2.4, 1.0])
@settings(max_examples=8)
@given(seed=st.integers(0, 1000))
def test_mse_is_never_worse_than_absmax_in_its_own_metric(spec: TensorSpec, norm: float, seed: int) -> None:
    w = heavy((8, 40), seed)
    searched = losses(w, spec, Step("mse", {"norm": norm}), norm)
    assert (searched <= losses(w, spec, Step("absmax"), norm) * (1 + 1e-5)).all()


@each_spec
def test_mse_finds_the_best_of_its_candidates(spec: TensorSpec) -> None:
    w = heavy((8, 40))
    found = losses(w, spec, Step("mse", {"steps": 33, "shrink": 0.8}))
    assert bool((found < 0.99 * losses(w, spec, Step("absmax"))).any())
    for factor in np.linspace(1, 0.2, 33):
        # Clipping w to a share of each block's bounds and using absmax is that candidate.
        low, high = spec.blocks.reduce(w, lambda x: (x.amin(1), x.amax(1)))
        spread = [spec.blocks.expand(bound * float(factor), (8, 40)).expand(8, 40) for bound in (low, high)]
        clipped = w.clamp(*spread)
        error = quantize_linear(clipped, Recipe(Scheme(spec))).dequantize() - w
        (loss,) = spec.blocks.reduce(error.square(), lambda x: (x.sum(1),))
        assert (found <= loss * (1 + 1e-4)).all()


@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 2.5}, {"shrink": 0.0}, {"shrink": 1.0}, {"norm": 0}])
def test_mse_refuses_senseless_searches(options: dict[str, float]) -> None:
    with pytest.raises(SpecError, match="steps >= 2, 0 < shrink < 1 and norm > 0"):
        mse(torch.ones(2, 2), SPECS[0], Stats(), **options)


def test_mse_cannot_search_a_fitted_grid() -> None:
    with pytest.raises(SpecError, match=r"fitted to the data \(quantile4\): use 'absmax'"):
        mse(torch.ones(2, 2), TensorSpec("quantile4", WHOLE), Stats())


# A Gaussian in closed form


def gaussian_error(levels: Tensor) -> float:
    """Mean squared error of rounding a standard normal variable to `levels`, by integrating over each cell."""
    x = levels.double()
    edges = torch.cat([torch.tensor([-40.0]), (x[:-1] + x[1:]) / 2, torch.tensor([40.0])]).double()
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    mass = torch.special.ndtr(edges).diff()
    first = -density.diff()
    second = mass - (edges * density).diff()
    return float((second - 2 * x * first + x.square() * mass).sum())


def best_scale(numbers: Grid) -> tuple[float, float]:
    """Smallest Gaussian error over all scales, and the scale."""
    scales = torch.linspace(0.5, 6, 1100, dtype=torch.float64) / numbers.top
    errors = [gaussian_error(numbers.levels().double() * float(scale)) for scale in scales]
    best = int(np.argmin(errors))
    return errors[best], float(scales[best])


@cache
def lloyd_max(count: int) -> float:
    """Smallest error of any `count` levels: each moves to the centre of its cell until none moves."""
    x = 3**0.5 * torch.special.ndtri((torch.arange(count).double() + 0.5) / count)  # near the solution
    for _ in range(1000):
        edges = torch.cat([torch.tensor([-40.0]), (x[:-1] + x[1:]) / 2, torch.tensor([40.0])]).double()
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        x = -density.diff() / torch.special.ndtr(edges).diff()
    return gaussian_error(x)


GAUSSIAN = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["int4", "int4n", "nf4", "e2m1", "int3", "fp4"])
def test_mse_reaches_the_closed_form_on_gaussian_weights(name: str) -> None:
    error, scale = best_scale(grid(name))
    q = quantize_linear(GAUSSIAN, Recipe(Scheme(TensorSpec(name, WHOLE)), Step("mse", {"shrink": 0.7, "steps": 50})))
    measured = float((q.dequantize() - GAUSSIAN).square().mean() / GAUSSIAN.square().mean())
    assert measured == pytest.approx(error, rel=0.01)
    assert float(q.scale_values()) == pytest.approx(scale, rel=0.03)
    assert measured > 0.99 * lloyd_max(2 ** grid(name).bits)


def test_the_closed_form_gives_the_known_constants() -> None:
    # Max (1960), tables I and II: sixteen levels with the best spacing 0.3352 have error 0.01154, freely placed 0.0095.
    uniform = torch.arange(-7.5, 8)
    assert gaussian_error(uniform * 0.3352) == pytest.approx(0.01154, abs=1e-5)
    assert min(gaussian_error(uniform * step) for step in (0.32, 0.35)) > gaussian_error(uniform * 0.3352)
    assert lloyd_max(16) == pytest.approx(0.0095, abs=5e-6)
    assert lloyd_max(2) == pytest.approx(1 - 2 / math.pi, abs=1e-12)  # one bit: the means of the halves


def test_the_best_four_bit_clip_of_a_gaussian() -> None:
    error, scale = best_scale(grid("int4"))
    assert 2.5 < 7.5 * scale < 2.6  # 7 steps above zero, 8 below
    # A level at zero costs 3 % over sixteen levels that lie symmetrically around it.
    assert 0.01154 < error < 1.03 * 0.01154


# KL


def kl_by_the_book(counts: list[float], levels: int) -> int:
    """TensorRT's entropy calibration in plain loops; how many bins to keep."""
    counts = [0.0, *counts[1:]]
    best, best_loss = 0, math.inf
    for kept in range(levels, len(counts) + 1):
        p = counts[:kept]
        p[-1] += sum(counts[kept:])  # clipped values pile up in the last bin of P
        members: list[list[int]] = [[] for _ in range(levels)]
        for i in range(kept):
            members[i * levels // kept].append(i)
        q = [0.0] * kept
        for level in members:
            mass = sum(counts[i] for i in level)  # Q never sees the clipped values
            present = [i for i in level if p[i] > 0]
            for i in present:
                q[i] = mass / len(present)
        if sum(q) == 0:
            continue
        sum_p, sum_q = sum(p), sum(q)
        loss = 0.0
        for a, b in zip(p, q, strict=True):
            if a > 0:
                loss += a / sum_p * math.log(a / sum_p / max(b / sum_q, 1e-12))
        if loss < best_loss - 1e-12:
            best, best_loss = kept, loss
    return best


@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(9, 60), st.floats(0.0, 0.8))
def test_kl_threshold_is_the_one_by_the_book(seed: int, levels: int, bins: int, empty: float) -> None:
    random = np.random.default_rng(seed)
    counts = np.floor(1000 * random.random(bins) * np.exp(-np.arange(bins) / random.uniform(2, 30)))
    counts[random.random(bins) < empty] = 0
    counts[-1] = 1  # the largest magnitude is always in the last bin
    assert kl_threshold(counts, levels) == kl_by_the_book(counts.tolist(), levels)


def test_kl_does_not_change_the_histogram_it_is_given() -> None:
    counts = np.arange(40.0)
    kl_threshold(counts, 4)
    assert np.array_equal(counts, np.arange(40.0))


def test_kl_ignores_how_many_zeros_there_are() -> None:
    counts = np.exp(-np.arange(300) / 20.0) * 1e5
    flooded = counts.copy()
    flooded[0] = 1e12
    assert kl_threshold(counts, 16) == kl_threshold(flooded, 16)


def test_kl_keeps_everything_when_nothing_is_lost() -> None:
    # As many levels as bins: only the whole histogram is a candidate.
    assert kl_threshold(np.ones(128), 128) == 128
    # Two far values and nothing in between: every other candidate loses all mass of Q or piles up the tail.
    alone = np.zeros(64)
    alone[63] = 1
    assert kl_threshold(alone, 8) == 64


def test_kl_cuts_a_few_far_outliers_off() -> None:
    w = torch.randn(1, 1 << 16, generator=torch.Generator().manual_seed(0))
    w[0, :3] = 40.0
    spec = TensorSpec("int8", WHOLE)
    assert 3.0 < float(kl(w, spec, Stats()).scale) * 127 < 12.0
    assert float(absmax(w, spec, Stats()).scale) * 127 == pytest.approx(40.0)


def test_kl_counts_beyond_what_float32_can(monkeypatch: pytest.MonkeyPatch) -> None:
    # Eight equal values a bin, counted by a histogram that stops growing at 8 per call: parts must add up.
    real = torch.histc
    monkeypatch.setattr(torch, "histc", lambda x, **bins: real(x, **bins).clamp_max(1 << 22))
    x = torch.full((1, 3 << 22), 1.0)
    x[0, : 1 << 22] = 0.5
    seen: list[np.ndarray] = []
    monkeypatch.setattr("hfquant.ranges.kl_threshold", lambda counts: seen.append(counts) or 2048.0)
    kl(x, TensorSpec("int8", WHOLE), Stats())
    assert seen[0][1024] == 1 << 22 and seen[0][2047] == 2 << 22


@pytest.mark.parametrize(
    ("spec", "width", "message"),
    [
        (TensorSpec("uint4", WHOLE, True), 4096, "symmetric grid"),
        (TensorSpec("int4", Blocks(1, 64)), 4096, "at least 2048 values, found 64 in layers.0.q.*'mse'"),
    ],
)
def test_kl_refuses_what_it_cannot_do(spec: TensorSpec, width: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        kl(torch.ones(1, width), spec, Stats("layers.0.q"))
