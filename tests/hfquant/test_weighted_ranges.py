"""The weighted range: never worse than the whole range in its own measure, and blind to what no input reaches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hfquant  # noqa: F401  registers the tables of the core
from hfquant.blocks import Blocks
from hfquant.errors import CalibrationError, SpecError
from hfquant.quantize import needs
from hfquant.ranges import RANGES, Params, absmax, params_from_bounds
from hfquant.recipe import Recipe, Step
from hfquant.scales import decode, encode
from hfquant.spec import Scheme, TensorSpec
from hfquant.stats import CHANNELS, InputStats, Stats
from hfquant.weighted_ranges import weighted_mse

SPECS = [
    TensorSpec("int3", Blocks(1, 16)),
    TensorSpec("uint4", Blocks(1, 16), True, "bfloat16"),
    TensorSpec("nf4", Blocks(1, -1), scale="float16"),
    TensorSpec("e2m1", Blocks(3, 8)),
    TensorSpec("uint3", Blocks(-1, 16), True),
]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.grid)
seeds = st.integers(0, 2**31)


def heavy(*shape: int, seed: int = 0) -> Tensor:
    """Values with heavy tails, for which clipping pays."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (1 + 4 * (torch.rand(shape, generator=generator) > 0.95))


def seen(moments: Tensor, tokens: int = 4) -> Stats:
    """Calibration in which E[x_j^2] are `moments` [K]."""
    inputs = InputStats(moments.numel())
    inputs.add(moments.sqrt().expand(tokens, -1))
    return Stats("layer", inputs=inputs, log=[])


def losses(w: Tensor, params: Params, moments: Tensor, norm: float = 2.0) -> Tensor:
    """Sum of E[x^2] |error|^norm of each block [R, C]."""
    shape = (w.shape[0], w.shape[1])
    scale = params.spec.blocks.expand(params.scale, shape)
    zero = None if params.zero is None else params.spec.blocks.expand(params.zero, shape)
    error = (decode(encode(w, scale, zero, params.grid), scale, zero, params.grid) - w).double().abs()
    (total,) = params.spec.blocks.reduce((error.pow(norm) * moments.double()).float(), lambda x: (x.sum(1),))
    return total


def by_the_book(w: Tensor, spec: TensorSpec, moments: Tensor, norm: float, steps: int, shrink: float) -> Tensor:
    """The smallest loss [R, C] among all candidates."""
    low, high = spec.blocks.reduce(w, lambda x: (x.amin(1), x.amax(1)))
    factors = torch.linspace(1, 1 - shrink, steps).tolist()
    each = [losses(w, params_from_bounds(w, low * f, high * f, spec), moments, norm) for f in factors]
    return torch.stack(each).amin(0)


@each_spec
@given(seed=seeds, norm=st.sampled_from([2.0, 2.4, 1.0]))
@settings(max_examples=15, deadline=None)
def test_few_candidates_are_all_tried(spec: TensorSpec, seed: int, norm: float) -> None:
    w, moments = heavy(7, 40, seed=seed), heavy(40, seed=seed + 1).square()
    found = losses(w, weighted_mse(w, spec, seen(moments), norm=norm, steps=3, shrink=0.5), moments, norm)
    torch.testing.assert_close(found, by_the_book(w, spec, moments, norm, 3, 0.5), rtol=1e-4, atol=0)


@each_spec
@given(seed=seeds, norm=st.sampled_from([2.0, 2.4]))
@settings(max_examples=15, deadline=None)
def test_it_is_never_worse_than_no_clipping(spec: TensorSpec, seed: int, norm: float) -> None:
    w, moments = heavy(12, 40, seed=seed), heavy(40, seed=seed + 1).square()
    found = losses(w, weighted_mse(w, spec, seen(moments), norm=norm), moments, norm)
    assert bool((found <= losses(w, absmax(w, spec, Stats()), moments, norm) * (1 + 1e-5)).all())


@each_spec
def test_the_search_comes_near_the_best_candidate(spec: TensorSpec) -> None:
    w, moments = heavy(400, 40), heavy(40, seed=1).square()
    found = losses(w, weighted_mse(w, spec, seen(moments)), moments)
    best = by_the_book(w, spec, moments, 2.0, 64, 0.8)
    assert float(found.sum()) <= 1.02 * float(best.sum())
    assert float(found.sum()) <= 0.9 * float(losses(w, absmax(w, spec, Stats()), moments).sum())


def test_columns_that_no_input_reaches_are_ignored() -> None:
    """A large weight there would otherwise stretch the range of its whole block."""
    spec, w, moments = TensorSpec("int4", Blocks(1, 16)), heavy(6, 32).clamp(-2, 2), torch.ones(32)
    large, unseen = w.clone(), moments.clone()
    large[:, 5], unseen[5] = 6.0, 0.0
    ignoring = weighted_mse(large, spec, seen(unseen)).scale
    assert bool((ignoring[:, 0] < 0.5 * absmax(large, spec, Stats()).scale[:, 0]).all())
    assert torch.equal(ignoring[:, 1], weighted_mse(w, spec, seen(moments)).scale[:, 1])
    nothing = seen(torch.cat([torch.zeros(16), torch.ones(16)]))
    assert torch.equal(weighted_mse(w, spec, nothing).scale[:, 0], absmax(w, spec, Stats()).scale[:, 0])


@each_spec
def test_what_multiplies_all_inputs_changes_nothing(spec: TensorSpec) -> None:
    w, moments = heavy(6, 40), heavy(40, seed=1).square()
    one, other = (weighted_mse(w, spec, seen(moments * size)).scale for size in (1.0, 4.0**20))
    assert torch.equal(one, other)


def test_no_token_counts_all_columns_alike_with_a_note() -> None:
    spec, w = SPECS[1], heavy(6, 40)
    silent = Stats("layer", inputs=InputStats(40), log=[])
    assert torch.equal(weighted_mse(w, spec, silent).scale, weighted_mse(w, spec, seen(torch.ones(40))).scale)
    assert silent.log is not None and "no calibration token" in silent.log[0]


def test_bad_weights_and_empty_blocks() -> None:
    spec = TensorSpec("int4", Blocks(1, 16))
    for w in (torch.zeros(3, 40), torch.full((3, 40), 1e-30), torch.full((3, 40), 1e30)):
        params = weighted_mse(w, spec, seen(torch.ones(40)))
        assert torch.equal(params.scale, absmax(w, spec, Stats()).scale)


def test_it_needs_calibration_and_sensible_options() -> None:
    assert RANGES.get("weighted_mse") is weighted_mse
    assert needs(Recipe(Scheme(SPECS[0]), Step("weighted_mse"))) == {CHANNELS}
    with pytest.raises(CalibrationError, match=r"some\.layer needs calibration data"):
        weighted_mse(heavy(3, 40), SPECS[0], Stats("some.layer"))
    for options in ({"steps": 1}, {"shrink": 1.0}, {"norm": 0.0}):
        with pytest.raises(SpecError, match="weighted_mse needs"):
            weighted_mse(heavy(3, 40), SPECS[0], seen(torch.ones(40)), **options)
    with pytest.raises(SpecError, match="fitted"):
        weighted_mse(heavy(3, 40), TensorSpec("quantile4", Blocks(1, 16)), seen(torch.ones(40)))
