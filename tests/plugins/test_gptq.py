"""GPTQ against optimal brain quantization with explicit inverses, its exact identities, and bad Hessians."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfquant import HfQuantConfig
from hfquant.blocks import Blocks
from hfquant.errors import CalibrationError, SpecError
from hfquant.qtensor import QTensor
from hfquant.quantize import needs
from hfquant.ranges import Params, absmax
from hfquant.recipe import Recipe, Step
from hfquant.rounders import FindRange, nearest
from hfquant.scales import decode, encode
from hfquant.spec import TensorSpec
from hfquant.stats import CHANNELS, DRIFT, HESSIAN, InputStats, Stats
from hfquant.weighted_ranges import weighted_mse
from hfquant_gptq.hessian import factorize, ladder, processing_order
from hfquant_gptq.preset import gptq as preset
from hfquant_gptq.rounder import correction, gptq

N, K = 12, 70
INT4 = TensorSpec("int4", Blocks(1, 16))
UINT3 = TensorSpec("uint3", Blocks(1, 16), True, "bfloat16")
ROW = TensorSpec("int3", Blocks(1, -1))
SPECS = [
    INT4,
    UINT3,
    ROW,
    TensorSpec("int8n", Blocks(1, 16)),
    TensorSpec("uint4", Blocks(-1, 32), True),
    TensorSpec("nf4", Blocks(1, 32), scale="float16"),
    TensorSpec("e2m1", Blocks(5, 8)),
    TensorSpec("quantile4", Blocks(1, 32)),
    TensorSpec("nf4", Blocks(1, 16), scale=TensorSpec("uint8", Blocks(1, 256))),
]
ORDERS = ["group", "static", "none"]
each_spec = pytest.mark.parametrize(
    "spec", SPECS, ids=lambda spec: f"{spec.grid}-{spec.blocks.rows}x{spec.blocks.cols}"
)
each_order = pytest.mark.parametrize("actorder", ORDERS)
seeds = st.integers(0, 2**31)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, width: int, seed: int = 0, rank: int = 6, noise: float = 1.0) -> Tensor:
    """Inputs [tokens, width] that share a few directions, with channels of different size."""
    shared = normal(tokens, rank, seed=seed) @ normal(rank, width, seed=seed + 1)
    return (shared + noise * normal(tokens, width, seed=seed + 3)) * normal(width, seed=seed + 2).exp()


def seen(x: Tensor, original: Tensor | None = None) -> Stats:
    """What calibration with the inputs `x` [T, K] leaves behind."""
    what = {HESSIAN} if original is None else {HESSIAN, DRIFT}
    inputs = InputStats(x.shape[1], frozenset(what))
    if len(x):
        inputs.add(x, original)
    return Stats("layer", inputs=inputs, log=[])


def with_gram(gram: Tensor) -> Stats:
    stats = seen(torch.zeros(0, gram.shape[0]))
    stats.inputs.tokens = 1
    stats.inputs.gram.copy_(gram)
    stats.inputs.square_sum.copy_(gram.diagonal())
    return stats


def run(
    w: Tensor, spec: TensorSpec, stats: Stats, find: FindRange = absmax, sweeps: int = 0, **options: Any
) -> QTensor:
    """GPTQ alone, unless there are sweeps."""
    return gptq(w, spec, find, stats, sweeps=sweeps, **options)


def round_to_nearest(w: Tensor, spec: TensorSpec, stats: Stats, find: FindRange = absmax) -> QTensor:
    return nearest(w, spec, find, stats)


def hessian(stats: Stats, damping: float = 0.01) -> Tensor:
    """E[x x^T] with damping, [K, K] float64, by the definition."""
    h = stats.inputs.gram / stats.inputs.tokens
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def loss(w: Tensor, q: QTensor, h: Tensor) -> float:
    """tr(D H D^T) with D the weights' error."""
    error = w.double() - q.dequantize().double()
    return float(((error @ h) * error).sum())


def obq(w: Tensor, h: Tensor, order: Tensor, spec: TensorSpec, stats: Stats, find: FindRange, fresh: bool) -> Tensor:
    """Codes [N, K] by the book: round a column, spread its error over the others, drop it from the inverse Hessian.

    `fresh`: grid parameters of a block are found when its first column is reached, from the weights of that moment.
    """
    w, inverse = w.double().clone(), torch.linalg.inv(h)
    codes = torch.empty(w.shape, dtype=torch.uint8)
    width = spec.blocks.sides((w.shape[0], w.shape[1]))[1]
    start, found = find(w.float(), spec, stats), {}
    for j in order.tolist():
        block = slice(j // width * width, j // width * width + width)
        if fresh and block.start not in found:
            columns = torch.arange(w.shape[1])[block]
            found[block.start] = find(w[:, block].float(), spec, stats.columns(columns))
        params, index = (found[block.start], 0) if fresh else (start, j // width)
        scale = spec.blocks.expand(params.scale[:, [index]], (w.shape[0], 1))
        zero = None if params.zero is None else spec.blocks.expand(params.zero[:, [index]], (w.shape[0], 1))
        codes[:, [j]] = encode(w[:, [j]].float(), scale, zero, params.grid)
        error = w[:, [j]] - decode(codes[:, [j]], scale, zero, params.grid)
        w -= error / inverse[j, j] * inverse[j]
        inverse -= inverse[:, [j]] * inverse[j] / inverse[j, j]
        inverse[j], inverse[:, j] = 0, 0
    return codes


# ---- what it computes


@each_order
@each_spec
def test_codes_are_those_of_sequential_obq(spec: TensorSpec, actorder: str) -> None:
    w, stats = normal(N, K), seen(correlated(200, K))
    width = spec.blocks.sides((N, K))[1]
    order = processing_order(stats.inputs.gram.diagonal(), actorder, width)
    shared_by_all = spec.grid == "quantile4" or not isinstance(spec.scale, str)
    wanted = obq(w, hessian(stats), order, spec, stats, absmax, actorder != "static" and not shared_by_all)
    assert torch.equal(run(w, spec, stats, actorder=actorder).codes, wanted)
    assert not torch.equal(wanted, round_to_nearest(w, spec, stats).codes)


@pytest.mark.parametrize("block_size", [1, 3, 16, 1000])
@each_order
@pytest.mark.parametrize("spec", [INT4, ROW, UINT3], ids=lambda spec: spec.grid)
def test_the_size_of_matrix_products_changes_nothing(spec: TensorSpec, actorder: str, block_size: int) -> None:
    w, stats = normal(N, 200), seen(correlated(400, 200))
    one, other = (run(w, spec, stats, actorder=actorder, block_size=size, sweeps=2) for size in (128, block_size))
    assert torch.equal(one.codes, other.codes)
    torch.testing.assert_close(one.scale, other.scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sweeps", [0, 2])
@each_order
@each_spec
def test_uncorrelated_inputs_round_to_nearest(spec: TensorSpec, actorder: str, sweeps: int) -> None:
    w, stats = normal(N, K), with_gram(torch.diag(normal(K, seed=1).exp()))
    one, other = run(w, spec, stats, actorder=actorder, sweeps=sweeps), round_to_nearest(w, spec, stats)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale_values(), other.scale_values())
    assert (one.zero is None) == (other.zero is None)
    assert one.zero is None or torch.equal(one.zero, other.zero)
    assert torch.equal(one.dequantize(), other.dequantize())


@given(seed=seeds, damping=st.sampled_from([0.001, 0.01, 0.3]), actorder=st.sampled_from(ORDERS))
@settings(max_examples=20, deadline=None)
def test_the_loss_is_the_sum_over_columns(seed: int, damping: float, actorder: str) -> None:
    w, stats = normal(N, K, seed=seed), seen(correlated(100, K, seed=seed))
    q = run(w, INT4, stats, actorder=actorder, damping=damping)
    factor = factorize(stats.inputs, w, actorder, 16, damping)
    error = (w.double() - q.dequantize().double())[:, factor.order]
    targets = error @ factor.lower.T  # w' - q: what is left once each column has made up for those before it
    total = float((targets.square() * factor.pivots.square()).sum())
    assert total == pytest.approx(loss(w, q, hessian(stats, damping)), rel=1e-11)


@given(seed=seeds, tokens=st.integers(1, 100), actorder=st.sampled_from(ORDERS))
@settings(max_examples=20, deadline=None)
def test_the_factor_is_that_of_the_hessian(seed: int, tokens: int, actorder: str) -> None:
    stats = seen(correlated(tokens, K, seed=seed))
    factor = factorize(stats.inputs, normal(N, K), actorder, 16, 0.01)
    assert torch.equal(factor.lower, factor.lower.tril()) and bool((factor.lower.diagonal() == 1).all())
    again = factor.lower.T @ factor.pivots.square().diag() @ factor.lower
    h = hessian(stats)
    torch.testing.assert_close(again, h[factor.order][:, factor.order], rtol=0, atol=1e-12 * float(h.abs().max()))
    upper = torch.linalg.cholesky(torch.linalg.inv(again), upper=True)  # as GPTQ is usually written
    torch.testing.assert_close(1 / upper.diagonal(), factor.pivots, rtol=1e-7, atol=0)


@pytest.mark.parametrize("spec", [INT4, UINT3, ROW], ids=lambda spec: spec.grid)
@each_order
def test_outputs_are_far_better_than_nearest(spec: TensorSpec, actorder: str) -> None:
    for seed in range(3):
        w, stats = normal(32, 128, seed=seed), seen(correlated(1000, 128, seed=seed))
        h = hessian(stats, 0)
        assert loss(w, run(w, spec, stats, actorder=actorder), h) < 0.5 * loss(w, round_to_nearest(w, spec, stats), h)


def official(w: Tensor, h: Tensor, spec: TensorSpec, columns: int) -> float:
    """Loss of GPTQ whose grid parameters miss the feedback from the same run of `columns`, as in the authors' code."""
    w, inverse, stale = w.double().clone(), torch.linalg.inv(h), w
    first, width, params = w.clone(), spec.blocks.cols, None
    rounded = torch.empty_like(w)
    for j in range(w.shape[1]):
        if j % columns == 0:
            stale = w.clone()
        if j % width == 0:
            params = absmax(stale[:, j : j + width].float(), spec, Stats())
        assert params is not None
        x = w[:, [j]].float()
        codes = encode(x, params.scale, params.zero, params.grid)
        rounded[:, [j]] = decode(codes, params.scale, params.zero, params.grid).double()
        error = w[:, [j]] - rounded[:, [j]]
        w -= error / inverse[j, j] * inverse[j]
        inverse -= inverse[:, [j]] * inverse[j] / inverse[j, j]
        inverse[j], inverse[:, j] = 0, 0
    return float((((first - rounded) @ h) * (first - rounded)).sum())


def test_fresh_parameters_are_better_than_stale_ones() -> None:
    spec = TensorSpec("uint3", Blocks(1, 32), True)
    ratios = []
    for seed in range(4):
        sizes = normal(4, seed=seed + 5).exp().repeat_interleave(32)  # errors of large groups end up in small ones
        w, x = normal(48, 128, seed=seed) * sizes, correlated(600, 128, seed=seed, rank=16, noise=0.1)
        h = hessian(seen(x))
        fresh = loss(w, run(w, spec, seen(x), actorder="none"), h)
        assert fresh == pytest.approx(official(w, h, spec, 32), rel=1e-3), "the oracle differs in nothing else"
        ratios.append(fresh / official(w, h, spec, 128))
    assert sum(ratios) / len(ratios) < 0.9


@each_order
@each_spec
def test_ranges_weigh_each_column_by_what_an_error_costs_in_the_end(spec: TensorSpec, actorder: str) -> None:
    w, stats = normal(N, K), seen(correlated(200, K))
    asked: list[tuple[Tensor, Tensor]] = []

    def spy(part: Tensor, spec: TensorSpec, about: Stats) -> Params:
        asked.append((about.inputs.second_moment, about.inputs.gram.diagonal()))
        return absmax(part, spec, about)

    run(w, spec, stats, spy, actorder=actorder)
    factor = factorize(stats.inputs, w, actorder, spec.blocks.sides((N, K))[1], 0.01)
    cost = torch.empty(K).index_copy_(0, factor.order, factor.pivots.square().float())
    answer = dict(zip(stats.inputs.gram.diagonal().tolist(), cost.tolist(), strict=True))
    for found, diagonal in asked:
        torch.testing.assert_close(found, torch.tensor([answer[value] for value in diagonal.tolist()]))
    assert sum(len(found) for found, _ in asked) == K


# ---- sweeps


@given(seed=seeds, actorder=st.sampled_from(ORDERS), spec=st.sampled_from(SPECS), gptaq=st.sampled_from([0.0, 1.0]))
@settings(max_examples=30, deadline=None)
def test_a_sweep_never_raises_the_loss(seed: int, actorder: str, spec: TensorSpec, gptaq: float) -> None:
    w, x = normal(N, K, seed=seed), correlated(100, K, seed=seed)
    stats = seen(x, x + 0.1 * normal(100, K, seed=seed + 5))
    target = w.double()
    if gptaq:
        factor = factorize(stats.inputs, w, actorder, spec.blocks.sides((N, K))[1], 0.01)
        target[:, factor.order] += correction(w.T[factor.order].double(), factor, stats.inputs).T
    after = [
        loss(target, run(w, spec, stats, actorder=actorder, gptaq=gptaq, sweeps=count), hessian(stats))
        for count in (0, 1, 4)
    ]
    assert after[1] <= after[0] * (1 + 1e-9) and after[2] <= after[1] * (1 + 1e-9)


@pytest.mark.parametrize("spec", [INT4, UINT3, ROW], ids=lambda spec: spec.grid)
def test_sweeps_end_where_no_code_alone_can_be_improved(spec: TensorSpec) -> None:
    w, stats = normal(N, K), seen(correlated(200, K))
    h, q = hessian(stats), run(w, spec, stats, sweeps=30)
    assert torch.equal(q.codes, run(w, spec, stats, sweeps=31).codes)
    assert loss(w, q, h) < loss(w, run(w, spec, stats), h)
    slope = (w.double() - q.dequantize().double()) @ h
    step = spec.blocks.expand(q.scale_values(), (N, K)).double()
    for change in (1, -1):
        allowed = (q.codes.int() + change >= 0) & (q.codes.int() + change < spec.numbers().size)
        gain = -2 * change * step * slope + step.square() * h.diagonal()  # of the loss, for one code moved by one
        assert float(gain[allowed].min()) > -1e-9


# ---- order


def test_group_order_ignores_how_columns_and_groups_are_arranged() -> None:
    spec = TensorSpec("uint3", Blocks(1, 16), True)
    w, stats = normal(N, 96), seen(correlated(200, 96))
    generator = torch.Generator().manual_seed(0)
    groups = torch.randperm(6, generator=generator).tolist()
    columns = torch.cat([16 * g + torch.randperm(16, generator=generator) for g in groups])
    one, other = run(w, spec, stats), run(w[:, columns], spec, stats.columns(columns))
    assert torch.equal(one.codes[:, columns], other.codes)
    assert torch.equal(one.scale[:, groups], other.scale)
    assert torch.equal(one.zero[:, groups], other.zero)


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("actorder", ["static", "group"])
def test_rows_with_one_scale_ignore_the_arrangement_of_columns(actorder: str, seed: int) -> None:
    w, stats = normal(N, K, seed=seed), seen(correlated(200, K, seed=seed))
    columns = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    codes = run(w, ROW, stats, actorder=actorder).codes
    assert torch.equal(codes[:, columns], run(w[:, columns], ROW, stats.columns(columns), actorder=actorder).codes)


def test_static_order_is_gptq_between_two_permutations() -> None:
    w, stats = normal(N, K), seen(correlated(200, K))
    order = stats.inputs.gram.diagonal().argsort(descending=True)
    inside = run(w[:, order], ROW, stats.columns(order), actorder="none").codes
    assert torch.equal(run(w, ROW, stats, actorder="static").codes[:, order], inside)


def test_rows_are_independent() -> None:
    w, stats = normal(N, K), seen(correlated(200, K))
    whole = run(w, UINT3, stats)
    assert torch.equal(torch.cat([run(part, UINT3, stats).codes for part in w.split(5)]), whole.codes)


def test_orders_by_hand() -> None:
    diagonal = torch.tensor([1.0, 5.0, 2.0, 2.0, 9.0])
    assert processing_order(diagonal, "none", 2).tolist() == [0, 1, 2, 3, 4]
    assert processing_order(diagonal, "static", 2).tolist() == [4, 1, 2, 3, 0]
    assert processing_order(diagonal, "group", 2).tolist() == [4, 1, 0, 2, 3]


# ---- Hessians that are no help


def decoded(q: QTensor) -> Tensor:
    """The weight; codes must lie on the grid."""
    levels = q.spec.numbers().bits
    assert int(q.codes.max()) < 2**levels
    values = q.dequantize()
    assert bool(values.isfinite().all())
    return values


@given(
    seed=seeds,
    tokens=st.sampled_from([1, 3, 40]),
    repeated=st.booleans(),
    dead=st.integers(0, K),
    size=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e30]),
    loud=st.sampled_from([1e-10, 1.0, 1e10]),
    damping=st.sampled_from([0.0, 1e-9, 0.01, 1.0]),
    spec=st.sampled_from(SPECS),
    actorder=st.sampled_from(ORDERS),
    weighted=st.booleans(),
    sweeps=st.integers(0, 2),
)
@settings(max_examples=80, deadline=None)
def test_the_result_is_always_finite(
    seed: int,
    tokens: int,
    repeated: bool,
    dead: int,
    size: float,
    loud: float,
    damping: float,
    spec: TensorSpec,
    actorder: str,
    weighted: bool,
    sweeps: int,
) -> None:
    x = correlated(tokens, K, seed=seed) * loud
    if repeated:
        x[:, 1::2] = x[:, ::2]
    x[:, :dead] = 0
    w, stats = normal(N, K, seed=seed + 1) * size, seen(x)
    find = weighted_mse if weighted and spec.grid != "quantile4" else absmax
    values = decoded(run(w, spec, stats, find, actorder=actorder, damping=damping, sweeps=sweeps))
    if size == 0:
        assert not values.any()


def test_no_token_means_nearest_with_a_note() -> None:
    w, stats = normal(N, K), seen(torch.zeros(0, K))
    assert torch.equal(run(w, INT4, stats).codes, round_to_nearest(w, INT4, stats).codes)
    assert len(stats.log) == 1 and "no calibration token" in stats.log[0] and "nearest" in stats.log[0]


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 1e6], ids=str)
def test_a_hessian_beyond_repair_means_nearest_with_a_note(bad: float) -> None:
    gram = torch.eye(K, dtype=torch.float64)
    gram[3, 40] = gram[40, 3] = bad
    w, stats = normal(N, K), with_gram(gram)
    assert torch.equal(run(w, INT4, stats).codes, round_to_nearest(w, INT4, stats).codes)
    assert any("cannot be factorized" in line for line in stats.log)


@each_order
def test_dead_channels_are_rounded_to_nearest_with_a_note(actorder: str) -> None:
    dead = [0, 17, 18, 69]
    x = correlated(200, K)
    x[:, dead] = 0
    w, stats = normal(N, K), seen(x)
    q = run(w, ROW, stats, actorder=actorder, sweeps=1)
    assert torch.equal(q.codes[:, dead], round_to_nearest(w, ROW, stats).codes[:, dead])
    assert any("4 input channels are 0" in line for line in stats.log)
    rest = torch.tensor([j for j in range(K) if j not in dead])
    alone = gptq(w[:, rest], ROW, lambda *_: absmax(w, ROW, stats), stats.columns(rest), actorder)
    assert torch.equal(q.codes[:, rest], alone.codes), "they have no influence on the others"


@each_order
@pytest.mark.parametrize("gptaq", [0.0, 1.0])
@pytest.mark.parametrize("spec", [ROW, UINT3], ids=lambda spec: spec.grid)
def test_empty_columns_stay_empty_and_take_no_errors(spec: TensorSpec, gptaq: float, actorder: str) -> None:
    """They are kept in 16 bit elsewhere, so that nobody may count on what GPTQ would put there."""
    empty = [2, 30, 31]
    w, x = normal(N, K), correlated(200, K)
    stats = seen(x, x + 0.1 * normal(200, K, seed=9))
    w[:, empty] = 0
    q = run(w, spec, stats, actorder=actorder, gptaq=gptaq, sweeps=1)
    assert not q.dequantize()[:, empty].any()
    if spec is ROW and gptaq == 0:
        rest = torch.tensor([j for j in range(K) if j not in empty])
        alone = run(w[:, rest], spec, stats.columns(rest), actorder=actorder, sweeps=1)
        assert torch.equal(q.codes[:, rest], alone.codes)


def test_damping_is_raised_until_it_works_with_a_note() -> None:
    w, stats = normal(N, K), with_gram(torch.ones(K, K) - 0.1 * torch.eye(K))  # smallest eigenvalue -0.1, mean 0.9
    assert factorize(stats.inputs, w, "none", 16, 0.05).remedies[0].startswith("damping was raised from 0.05 to 0.2")
    decoded(run(w, INT4, stats, damping=0.05))
    assert any("damping was raised" in line for line in stats.log)
    healthy = seen(correlated(200, K))
    run(w, INT4, healthy)
    assert healthy.log == []


def test_the_ladder_doubles_up_to_one() -> None:
    assert list(ladder(0.3)) == [0.3, 0.6, 1.0]
    assert list(ladder(0.0))[:3] == [0.0, 0.01, 0.02]
    assert list(ladder(1.0)) == [1.0]


def test_layers_with_the_same_input_share_one_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated(200, K)
    x[:, 5] = 0
    stats, calls = seen(x), []
    real = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda h: calls.append(1) or real(h))
    alone = run(normal(N, K, seed=3), INT4, seen(x))
    for seed in range(4):
        again = run(normal(N, K, seed=seed), INT4, stats)
    assert len(calls) == 2 and torch.equal(again.codes, alone.codes)
    assert len(stats.log) == 4, "every layer's report has the remedy"
    run(normal(N, K), INT4, stats, damping=0.02)
    assert len(calls) == 3


# ---- GPTAQ


def drifted(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs [T, K] of the quantized and of the original model, which are related."""
    original = correlated(600, K, seed=seed)
    drift = 0.15 * original @ normal(K, K, seed=seed + 7) / math.sqrt(K) + 0.1 * normal(600, K, seed=seed + 8)
    return original + drift, original


def test_the_correction_is_ridge_regression_on_the_original_outputs() -> None:
    (x, original), w = drifted(), normal(N, K).double()
    stats = seen(x, original)
    factor = factorize(stats.inputs, w, "group", 16, 0.01)
    found = torch.empty_like(w).index_copy_(1, factor.order, correction(w.T[factor.order], factor, stats.inputs).T)
    residual = (original - x).double() @ w.T  # to be explained by x
    ridge = (0.01 * x.double().square().mean() * len(x)).sqrt() * torch.eye(K, dtype=torch.float64)
    inputs, outputs = torch.cat([x.double(), ridge]), torch.cat([residual, torch.zeros(K, N)])
    torch.testing.assert_close(found, torch.linalg.lstsq(inputs, outputs).solution.T, rtol=1e-3, atol=1e-4)


@each_order
def test_gptaq_brings_outputs_closer_to_the_original(actorder: str) -> None:
    for seed in range(3):
        (x, original), w = drifted(seed), normal(N, K, seed=seed)
        with_drift, without = (run(w, UINT3, seen(x, original), actorder=actorder, gptaq=share) for share in (1.0, 0.0))
        wanted = original @ w.T
        error = [float((wanted - x @ q.dequantize().T).square().sum()) for q in (with_drift, without)]
        assert error[0] < 0.9 * error[1]


def test_gptaq_without_drift_is_gptq() -> None:
    x, w = correlated(200, K), normal(N, K)
    one, other = run(w, UINT3, seen(x, x), gptaq=1.0), run(w, UINT3, seen(x))
    assert torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)


# ---- options


def test_what_calibration_has_to_measure() -> None:
    assert needs(preset()) == {HESSIAN, CHANNELS}
    assert needs(preset(range="absmax")) == {HESSIAN}
    assert needs(preset(range="absmax", gptaq=0.25)) == {HESSIAN, DRIFT}
    with pytest.raises(CalibrationError, match=r"some\.layer needs calibration data"):
        gptq(normal(N, K), INT4, absmax, Stats("some.layer"))
    with pytest.raises(CalibrationError, match="drift"):
        run(normal(N, K), INT4, seen(correlated(9, K)), gptaq=0.25)


def test_the_defaults_are_what_gptq_is_known_by() -> None:
    recipe = preset()
    assert recipe.scheme.weight == TensorSpec("int4", Blocks(1, 128), scale="float16")
    assert recipe.rounder.name == "gptq" and recipe.range.name == "weighted_mse" and recipe.transforms == ()
    assert preset(bits=3, symmetric=False, group_size=-1).scheme.weight == TensorSpec("uint3", Blocks(1, -1), True)
    assert preset(grid="nf4").scheme.weight.grid == "nf4"
    steps = (Step("a"), Step("b", {"alpha": 1}))
    assert preset(transform=["a", {"name": "b", "alpha": 1}]).transforms == steps
    assert (
        preset(transform="a").transforms == steps[:1] and preset(transform=steps[1].to_dict()).transforms == steps[1:]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"bits": True}, "bits"),
        ({"bits": 3, "grid": "nf4"}, "leave out bits"),
        ({"symmetric": False, "grid": "nf4"}, "leave out bits"),
        ({"group_size": 0}, "group_size"),
        ({"actorder": "yes"}, "actorder"),
        ({"damping": -0.1}, "damping"),
        ({"damping": 1.5}, "damping"),
        ({"damping": math.nan}, "damping"),
        ({"gptaq": 2}, "gptaq"),
        ({"gptaq": True}, "gptaq"),
        ({"sweeps": -1}, "sweeps"),
        ({"sweeps": 1.5}, "sweeps"),
        ({"range": "nonsense"}, "nonsense"),
        ({"grid": "nonsense"}, "nonsense"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        HfQuantConfig("gptq", **options)


@pytest.mark.parametrize("options", [{}, {"bits": 2, "symmetric": False}, {"grid": "e2m1", "gptaq": 0.25}], ids=str)
def test_recipes_are_strict_json(options: dict[str, Any]) -> None:
    recipe = preset(**options)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict(), allow_nan=False))) == recipe
