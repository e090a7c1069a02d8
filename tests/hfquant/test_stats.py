"""Statistics of a layer's inputs: sums that equal their definition, whatever the order and whoever counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfquant.errors import CalibrationError
from hfquant.stats import CHANNELS, DRIFT, HESSIAN, HISTOGRAM, SAMPLE, InputStats, Stats, needs, needs_of

ALL = frozenset({HESSIAN, DRIFT})
seeds = st.integers(0, 2**31)
few = settings(max_examples=15)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Values of very different size from column to column."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape[-1], generator=generator).mul(3).exp()


def collected(parts: list[Tensor], original: list[Tensor] | None = None, what: frozenset[str] = ALL) -> InputStats:
    stats = InputStats(parts[0].shape[1], what, "layer")
    for x, moved in zip(parts, original or parts, strict=True):
        stats.add(x, moved)
    return stats


def assert_same(one: InputStats, other: InputStats) -> None:
    """Equal up to the rounding of float64 sums."""
    assert one.tokens == other.tokens
    assert torch.equal(one.absmax, other.absmax)
    for name in ("abs_sum", "square_sum"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-12, atol=0)
    size = one.square_sum.sqrt()
    for name in ("gram", "drift"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.dtype == theirs.dtype == torch.float64
        assert bool(((mine - theirs).abs() <= 1e-12 * size[:, None] * size).all()), name


@few
@given(seeds, st.integers(1, 300), st.integers(1, 40))
def test_sums_equal_their_definition(seed: int, tokens: int, features: int) -> None:
    x, moved = normal(tokens, features, seed=seed), normal(tokens, features, seed=seed + 1)
    stats = collected([x], [moved])
    exact, drift = x.double(), (moved - x).double()
    assert stats.tokens == tokens
    assert torch.equal(stats.absmax, x.abs().amax(0))
    torch.testing.assert_close(stats.abs_sum, exact.abs().sum(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.square_sum, exact.square().sum(0), rtol=1e-6, atol=0)  # squares are float32
    assert stats.gram is not None and stats.drift is not None
    scale = exact.norm(dim=0)
    # Products are float32 sums: an error of float32 epsilon for each of the tokens at most, by Cauchy-Schwarz.
    limit = 2**-23 * (tokens + 1)
    assert bool(((stats.gram - exact.T @ exact).abs() <= limit * scale[:, None] * scale).all())
    assert bool(((stats.drift - drift.T @ exact).abs() <= limit * drift.norm(dim=0)[:, None] * scale).all())
    torch.testing.assert_close(stats.absmean, exact.abs().mean(0).float())
    torch.testing.assert_close(stats.second_moment, exact.square().mean(0).float())


def test_the_gram_matrix_of_a_wide_input_is_symmetric_bit_for_bit() -> None:
    x = normal(50, 1500)  # several blocks of columns, the last one short
    stats = collected([x], what=frozenset({HESSIAN}))
    assert stats.gram is not None
    assert torch.equal(stats.gram, stats.gram.T)
    exact = x.double().T @ x.double()
    scale = exact.diagonal().sqrt()
    assert bool(((stats.gram - exact).abs() <= 51 * 2**-23 * scale[:, None] * scale).all())


def test_more_tokens_than_are_worked_on_at_once() -> None:
    x = normal(5000, 3)
    whole, parts = collected([x]), collected([x[:4096], x[4096:]])
    assert_same(whole, parts)


@few
@given(seeds, st.permutations(range(5)))
def test_the_order_of_batches_leaves_no_trace(seed: int, order: list[int]) -> None:
    parts = [normal(17, 9, seed=seed + number) for number in range(5)]
    moved = [part + 0.1 * normal(17, 9, seed=seed + 100 + number) for number, part in enumerate(parts)]
    assert_same(collected(parts, moved), collected([parts[i] for i in order], [moved[i] for i in order]))


@few
@given(seeds, st.integers(0, 5))
def test_shares_merge_to_what_one_process_counts(seed: int, share: int) -> None:
    parts = [normal(17, 9, seed=seed + number) for number in range(5)]
    moved = [part + 0.1 * normal(17, 9, seed=seed + 100 + number) for number, part in enumerate(parts)]
    shares = [InputStats(9, ALL, "layer"), InputStats(9, ALL, "layer")]
    for number, (x, original) in enumerate(zip(parts, moved, strict=True)):
        shares[number >= share].add(x, original)
    one, other = shares
    one.merge(other)
    assert_same(collected(parts, moved), one)
    assert set(map(tuple, one.sample.tolist())) == {tuple(row) for x in parts for row in x.tolist()}


def test_histograms_merge_too() -> None:
    parts = [normal(17, 9, seed=number) for number in range(2)]
    what = frozenset({HISTOGRAM})
    whole, one = collected(parts, what=what), collected(parts[:1], what=what)
    one.merge(collected(parts[1:], what=what))
    assert whole.histogram is not None and one.histogram is not None
    assert torch.equal(whole.histogram.counts, one.histogram.counts)
    assert whole.histogram.bounds().tolist() == one.histogram.bounds().tolist()


def test_what_was_derived_is_forgotten_when_the_sums_change() -> None:
    stats = collected([normal(4, 3)])
    stats.memo["result"] = 1
    stats.merge(collected([normal(4, 3)]))
    assert not stats.memo
    stats.memo["result"] = 1
    stats.add(normal(4, 3), normal(4, 3))
    assert not stats.memo


@few
@given(seeds, st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True))
def test_selected_columns_are_what_a_layer_of_those_columns_sees(seed: int, columns: list[int]) -> None:
    index = torch.tensor(columns)
    x, moved = normal(31, 12, seed=seed), normal(31, 12, seed=seed + 1)
    what = frozenset({HESSIAN, DRIFT})
    part = collected([x], [moved], what).select(index)
    alone = collected([x[:, index]], [moved[:, index]], what)
    assert part.tokens == alone.tokens and part.needs == alone.needs and part.features == len(columns)
    for name in ("absmax", "abs_sum", "square_sum", "sample"):
        assert torch.equal(getattr(part, name), getattr(alone, name)), name
    scale = alone.square_sum.sqrt()
    for name, other in (("gram", scale), ("drift", (moved - x)[:, index].double().norm(dim=0))):
        error = (getattr(part, name) - getattr(alone, name)).abs()
        assert bool((error <= 32 * 2**-23 * other[:, None] * scale).all()), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_raise_with_the_name_of_the_layer(bad: float) -> None:
    x = torch.zeros(7, 3)
    x[2, 1] = x[5, 0] = bad
    stats = InputStats(3, frozenset(), "model.layers.3.mlp.down_proj")
    with pytest.raises(CalibrationError, match=r"model\.layers\.3\.mlp\.down_proj.* 2 of 7 tokens.*float32"):
        stats.add(x)
    assert stats.tokens == 0  # nothing of a bad batch is kept


def test_the_sample_is_bounded_and_consists_of_tokens() -> None:
    stats = InputStats(2)
    seen = [torch.arange(2000.0).reshape(1000, 2) + 2000 * number for number in range(10)]
    for x in seen:
        stats.add(x)
    assert stats.sample.shape == (SAMPLE, 2)
    rows = set(map(tuple, torch.cat(seen).tolist()))
    assert set(map(tuple, stats.sample.tolist())) <= rows
    assert len(set(stats.sample[:, 0].div(2000).floor().tolist())) > 1  # not all of the first batch


def test_a_short_batch_is_in_the_sample_as_a_whole() -> None:
    stats = InputStats(2)
    x = normal(5, 2)
    stats.add(x)
    assert torch.equal(stats.sample, x)


def test_only_the_last_reader_gets_the_gram_matrix_itself() -> None:
    stats = collected([normal(9, 4)], what=frozenset({HESSIAN}))
    assert stats.gram is not None
    before = stats.gram.clone()
    stats.take_gram().zero_()
    assert torch.equal(stats.gram, before)
    stats.last = True
    assert torch.equal(stats.take_gram(), before)
    assert stats.gram is None


def test_a_stage_says_what_it_reads() -> None:
    @needs(HESSIAN, CHANNELS)
    def rounder() -> None: ...

    def depends() -> None: ...

    vars(depends)["needs"] = lambda options: frozenset({DRIFT}) if options.get("corrects") else frozenset()
    assert needs_of(rounder, {}) == {HESSIAN, CHANNELS}
    assert needs_of(depends, {}) == frozenset() and needs_of(depends, {"corrects": True}) == {DRIFT}
    assert needs_of(lambda: None, {}) == frozenset()


def test_statistics_that_were_not_gathered_are_asked_for() -> None:
    with pytest.raises(CalibrationError, match=r"mlp needs calibration data \(channels\).*data="):
        Stats("mlp").seen(CHANNELS)
    with pytest.raises(CalibrationError, match=r"\(hessian\)"):
        Stats("mlp", inputs=InputStats(3)).seen(HESSIAN)
    inputs = InputStats(3)
    assert Stats("mlp", inputs=inputs).seen(CHANNELS) is inputs


def test_a_layer_cut_to_some_columns_keeps_name_and_log() -> None:
    whole = Stats("mlp", producer_std=torch.arange(4.0), inputs=collected([normal(9, 4)]), log=[])
    part = whole.columns(torch.tensor([3, 1]))
    part.note("remark")
    assert part.name == "mlp" and whole.log == ["remark"]
    assert part.producer_std is not None and part.producer_std.tolist() == [3, 1]
    assert part.inputs is not None and part.inputs.features == 2
