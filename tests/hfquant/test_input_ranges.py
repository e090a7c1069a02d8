"""Ranges from a histogram: what a batch would get by itself, the quantiles of its values, the least error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hfquant  # noqa: F401  registers the tables of the core
from hfquant import reference
from hfquant.blocks import Blocks
from hfquant.errors import CalibrationError, SpecError
from hfquant.histogram import Histogram
from hfquant.input_ranges import (
    INPUT_RANGES,
    SeenInput,
    absmax,
    input_params,
    kl,
    kl_counts,
    mse,
    percentile,
    squared_error,
)
from hfquant.qtensor import InputParams
from hfquant.ranges import kl_threshold
from hfquant.spec import InputSpec, TensorSpec

TENSOR = Blocks(-1, -1)
INT8, UINT8 = TensorSpec("int8", TENSOR), TensorSpec("uint8", TENSOR, zero=True)
SYMMETRIC = ["int8", "int8n", "int4", "uint8", "e4m3fn", "e5m2ieee", "nf4"]
specs = st.one_of(
    st.builds(TensorSpec, st.sampled_from(SYMMETRIC), st.just(TENSOR), scale=st.sampled_from(["float32", "bfloat16"])),
    st.builds(TensorSpec, st.sampled_from(["uint8", "uint4"]), st.just(TENSOR), st.just(True)),
)
seeds = st.integers(0, 10**6)
KINDS = ["normal", "long tails", "positive", "shifted", "zeros"]


def drawn(kind: str, seed: int, *shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return {
        "normal": x,
        "long tails": x**5,
        "positive": x.relu(),
        "shifted": x + 3,
        "zeros": torch.zeros(shape),
    }[kind]


def histogram(x: Tensor) -> Histogram:
    made = Histogram()
    made.add(x)
    return made


def top(params: InputParams, spec: TensorSpec) -> float:
    """The largest magnitude that a symmetric grid reaches."""
    return float(params.scale) * spec.numbers().top


@given(specs, st.sampled_from(KINDS), seeds)
def test_absmax_of_a_batch_is_its_own_dynamic_range(spec: TensorSpec, kind: str, seed: int) -> None:
    x = drawn(kind, seed, 7, 33)
    params = absmax(histogram(x), spec, "layer")
    assert params.scale.shape == (1,) and params.scale.dtype == torch.float32
    assert (params.zero is not None) is spec.zero
    static = reference.quantize_input(x, InputSpec(spec, dynamic=False), None, params)
    assert torch.equal(static, reference.quantize_input(x, InputSpec(spec), None))


@given(st.sampled_from(KINDS), seeds, st.floats(50.1, 100), st.integers(1, 2000))
def test_percentile_is_the_quantile_within_one_bin(kind: str, seed: int, percent: float, size: int) -> None:
    x = drawn(kind, seed, size)
    hist, share = histogram(x), torch.tensor(percent / 100, dtype=torch.float64)
    symmetric = percentile(hist, INT8, "layer", percentile=percent)
    expected = float(torch.quantile(x.abs().double(), share))
    if expected > hist.width:  # else the scale may be the one of all-zero blocks
        assert abs(top(symmetric, INT8) - expected) <= hist.width + 1e-6 * expected
    high, low = (float(torch.quantile(x.double(), q)) for q in (share, 1 - share))
    span = max(high, 0) - min(low, 0)
    if span > 2 * hist.width:
        asymmetric = percentile(hist, UINT8, "layer", percentile=percent)
        assert abs(float(asymmetric.scale) * 255 - span) <= 2 * hist.width + 1e-6 * span


@given(specs, st.sampled_from(KINDS), seeds)
def test_the_hundredth_percentile_is_absmax(spec: TensorSpec, kind: str, seed: int) -> None:
    hist = histogram(drawn(kind, seed, 500))
    assert percentile(hist, spec, "layer", percentile=100) == absmax(hist, spec, "layer")


def error(hist: Histogram, spec: TensorSpec, params: InputParams) -> float:
    return squared_error(hist.points(), spec, params)


@settings(max_examples=25)
@given(specs, st.sampled_from(KINDS), seeds)
def test_mse_is_never_worse_than_any_range_it_knows(spec: TensorSpec, kind: str, seed: int) -> None:
    hist = histogram(drawn(kind, seed, 1000))
    least = error(hist, spec, mse(hist, spec, "layer", steps=20))
    assert least <= error(hist, spec, absmax(hist, spec, "layer"))
    low, high = (hist.low, hist.high) if spec.zero else (-hist.absmax, hist.absmax)
    for step in range(1, 21):  # both bounds by the same share
        assert least <= error(hist, spec, input_params(low * step / 20, high * step / 20, spec))


def test_its_own_metric_is_the_error_of_the_values() -> None:
    x = drawn("normal", 0, 5000)
    hist = histogram(x)
    for spec in (TensorSpec("int4", TENSOR), TensorSpec("uint4", TENSOR, True), TensorSpec("e2m1", TENSOR)):
        params = mse(hist, spec, "layer", steps=20)
        seen = reference.static_round_trip(x, spec, params)
        exact = float((seen.double() - x.double()).square().sum())
        # A step is more than a hundred bins wide.
        assert error(hist, spec, params) == pytest.approx(exact, rel=1e-3)


def test_mse_finds_the_best_clip_of_a_normal_distribution() -> None:
    """The oracle is the integral over the density: no sample, no histogram."""
    spec, sigma = TensorSpec("int4", TENSOR), 1.7
    t = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    density = torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi) * (t[1] - t[0])

    def expected(clip: float) -> float:
        step = clip / 7
        return float(((t / step).round().clamp(-8, 7) * step - t).square().mul(density).sum())

    best = min(expected(clip) for clip in np.arange(2.0, 3.5, 0.01))
    chosen = top(mse(histogram(drawn("normal", 0, 1 << 18) * sigma), spec, "layer"), spec)
    assert expected(chosen / sigma) <= 1.002 * best
    assert expected(chosen / sigma) < 0.8 * expected(4.9)  # what absmax would take


@pytest.mark.parametrize("kind", ["normal", "shifted", "one outlier"])
def test_two_bounds_are_about_as_good_as_the_best_pair(kind: str) -> None:
    x = drawn("normal" if kind == "one outlier" else kind, 0, 20000)
    if kind == "one outlier":
        x[0] = 40.0
    hist, spec = histogram(x), TensorSpec("uint4", TENSOR, True)
    pairs = [(hist.low * i / 20, hist.high * j / 20) for i in range(1, 21) for j in range(1, 21)]
    losses = [error(hist, spec, input_params(low, high, spec)) for low, high in pairs]
    found = error(hist, spec, mse(hist, spec, "layer", steps=20))
    assert found <= 1.03 * min(losses)
    if kind == "one outlier":  # giving up both bounds alike is far worse: the lower one is where it should be
        assert found < 0.8 * min(loss for i, loss in enumerate(losses) if i // 20 == i % 20)


@given(st.sampled_from(["normal", "long tails", "positive"]), seeds)
@settings(max_examples=6)
def test_kl_is_the_threshold_of_the_same_counts(kind: str, seed: int) -> None:
    x = drawn(kind, seed, 4000)
    hist = histogram(x)
    bins = math.floor(hist.absmax / hist.width) + 1
    merged = math.ceil(bins / 2048) * hist.width  # as few as it takes to have at most 2048
    count = math.floor(hist.absmax / merged) + 1
    counts, _ = np.histogram(x.abs().double().numpy() / merged, np.arange(count + 1))
    clip = min(kl_threshold(counts.astype(np.float64)) * merged, hist.absmax)
    assert torch.equal(kl(hist, INT8, "layer").scale, input_params(-clip, clip, INT8).scale)
    assert 1024 < count <= 2048 and kl_counts(hist)[0].tolist() == counts.tolist()


def test_kl_ignores_zeros_and_uses_all_levels_of_one_side() -> None:
    x = drawn("long tails", 1, 4000)
    padded = histogram(torch.cat([x, torch.zeros(100_000)]))
    assert kl(padded, INT8, "layer") == kl(histogram(x), INT8, "layer")
    positive = histogram(x.abs())
    counts, factor = kl_counts(positive)
    params = kl(positive, UINT8, "layer")
    clip = min(kl_threshold(counts.numpy(), 256) * factor * positive.width, positive.absmax)
    assert params == input_params(0.0, clip, UINT8) and int(params.zero) == 0


def test_kl_of_values_that_reach_further_up_than_down() -> None:
    x = drawn("long tails", 2, 4000).clamp(min=-0.5)
    params = kl(histogram(x), UINT8, "layer")
    assert -float(params.zero * params.scale) == pytest.approx(-0.5, abs=float(params.scale))


@given(st.sampled_from(["normal", "long tails", "positive", "shifted"]), seeds, st.integers(-40, 40))
@settings(max_examples=6)
@pytest.mark.parametrize("name", ["absmax", "percentile", "mse", "kl"])
def test_powers_of_two_scale_the_range_exactly(name: str, kind: str, seed: int, power: int) -> None:
    x = drawn(kind, seed, 2100)
    for spec in (INT8, UINT8):
        one, other = (found(name, histogram(v), spec) for v in (x, x * 2.0**power))
        assert torch.equal(other.scale, one.scale * 2.0**power) and torch.equal(*(zero(p) for p in (one, other)))


def found(name: str, hist: Histogram, spec: TensorSpec, layer: str = "layer") -> InputParams:
    """What an input range finds that a recipe names."""
    seen = SeenInput(layer, hist, torch.zeros(0, 4), hist.absmax)
    choice = INPUT_RANGES.get(name)(seen, InputSpec(spec, dynamic=False))
    assert choice.tensor == spec and choice.params is not None
    return choice.params


def zero(params: InputParams) -> Tensor:
    return torch.zeros(0) if params.zero is None else params.zero


@pytest.mark.parametrize("name", ["absmax", "percentile", "mse", "kl"])
def test_an_input_that_is_always_zero_stays_zero(name: str) -> None:
    for spec in (INT8, UINT8):
        params = found(name, histogram(torch.zeros(3000)), spec)
        assert float(params.scale) == 1
        assert not reference.static_round_trip(torch.zeros(4), spec, params).any()


@pytest.mark.parametrize("name", ["absmax", "percentile", "mse", "kl"])
def test_the_smallest_numbers_have_a_range(name: str) -> None:
    for size, scale in ((1e-37, torch.finfo(torch.float32).smallest_normal), (1e-44, 1.0)):
        params = found(name, histogram(drawn("normal", 0, 3000) * size), INT8)
        assert float(params.scale) == scale  # devices flush smaller scales to 0; what is below all of them counts as 0


@pytest.mark.parametrize("name", ["absmax", "percentile", "mse", "kl"])
def test_a_layer_that_never_ran_is_named(name: str) -> None:
    with pytest.raises(CalibrationError, match=r"never ran layers\.3\.mlp"):
        found(name, Histogram(), INT8, "layers.3.mlp")


@pytest.mark.parametrize(
    ("find", "message"),
    [
        (lambda h: absmax(h, TensorSpec("int8", Blocks(1, -1)), "l"), r"use blocks \(-1, -1\)"),
        (lambda h: absmax(h, TensorSpec("quantile4", TENSOR), "l"), "fitted to values"),
        (lambda h: percentile(h, INT8, "l", percentile=50), "above 50 and at most 100"),
        (lambda h: percentile(h, INT8, "l", percentile=101), "above 50 and at most 100"),
        (lambda h: mse(h, INT8, "l", steps=1), "whole number of steps >= 2, got 1"),
        (lambda h: mse(h, INT8, "l", steps=2.5), "whole number of steps >= 2, got 2.5"),
        (lambda h: kl(h, TensorSpec("e4m3fn", TENSOR), "l"), "evenly spaced levels"),
        (lambda h: kl(h, INT8, "l"), "at least 2048 values, the input of l had 100"),
    ],
)
def test_what_cannot_be_is_refused(find, message: str) -> None:
    with pytest.raises((SpecError, CalibrationError), match=message):
        find(histogram(drawn("normal", 0, 100)))
