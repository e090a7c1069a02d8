"""Negative log-likelihood, perplexity and bootstrap intervals."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hfquant.errors import HfQuantError, SpecError
from hfquant.eval import perplexity as module
from hfquant.eval.perplexity import bootstrap_mean, evaluating, paired_bootstrap, perplexity, sequence_nll
from hfquant.testing.tiny import tiny_model


class Table(nn.Module):
    """Next-token logits looked up by the current token: `table` [V, V]."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.drop = nn.Dropout(0.5)

    def forward(self, input_ids, use_cache):
        assert not use_cache
        return SimpleNamespace(logits=self.drop(self.table)[input_ids])


def ids(*shapes, vocabulary=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, shape, generator=generator) for shape in shapes]


def test_uniform_model_has_the_perplexity_of_its_vocabulary():
    nll, counts = sequence_nll(Table(torch.full((16, 16), 3.0)), ids((4, 10), (1, 10)))
    assert counts.tolist() == [9.0] * 5
    assert perplexity(nll, counts) == pytest.approx(16, rel=1e-12)


def test_certain_model_has_perplexity_one():
    successor = torch.eye(16).roll(1, dims=1) * 1000  # token t is followed by t + 1
    batch = (torch.arange(10) + torch.arange(3)[:, None]) % 16
    assert perplexity(*sequence_nll(Table(successor), [batch])) == pytest.approx(1, abs=1e-12)


def test_a_token_ruled_out_costs_infinity_only_if_it_occurs():
    table = torch.zeros(4, 4)
    table[:, 3] = -torch.inf
    nll, _ = sequence_nll(Table(table), [torch.tensor([[0, 1, 2], [0, 3, 1]])])
    assert nll.tolist() == [pytest.approx(2 * math.log(3)), math.inf]


@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
def test_matches_cross_entropy_whatever_the_chunk(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    table = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    (batch,) = ids((3, 11))
    expected = F.cross_entropy(table[batch[:, :-1]].double().mT, batch[:, 1:], reduction="none").sum(1)
    torch.testing.assert_close(sequence_nll(Table(table), [batch])[0], expected, rtol=1e-12, atol=0)


def test_sequences_of_different_lengths_weigh_by_tokens():
    nll, counts = sequence_nll(Table(torch.zeros(16, 16)), ids((2, 5), (1, 9)))
    assert counts.tolist() == [4, 4, 8]
    assert perplexity(nll, counts) == pytest.approx(16)


def test_matches_the_loss_of_transformers():
    model = tiny_model("llama")
    (batch,) = ids((2, 12), vocabulary=256)
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch).loss
    assert perplexity(*sequence_nll(model, [batch])) == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_name_model_and_batch(bad):
    table = torch.zeros(16, 16)
    table[7, 3] = bad
    batches = [torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[0, 7, 7, 1]])]
    with pytest.raises(HfQuantError, match="Table, batch 1: the logits of 2 of 3 tokens"):
        sequence_nll(Table(table), batches)


def test_modes_return_and_gradients_stay_off():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[0].eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert [m.training for m in model.modules()] == [True, False, True]


def test_dropout_is_off_while_measuring():
    model = Table(torch.randn(16, 16)).train()
    first, second = (sequence_nll(model, ids((2, 8)))[0] for _ in range(2))
    assert torch.equal(first, second) and model.training


# ---- intervals

COUNTS = st.lists(st.integers(1, 50), min_size=2, max_size=20).map(lambda c: torch.tensor(c, dtype=torch.float64))


@given(counts=COUNTS, seed=st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_no_difference_gives_exactly_zero(counts, seed):
    nll = counts * torch.rand(len(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert paired_bootstrap(nll, nll.clone(), counts, samples=50, seed=seed) == (0.0, 0.0)


@given(counts=COUNTS, value=st.floats(0, 5))
@settings(deadline=None, max_examples=30)
def test_a_constant_has_an_interval_of_no_width(counts, value):
    assert bootstrap_mean(counts * value, counts, samples=50) == pytest.approx((value, value))


@given(counts=COUNTS, level=st.floats(0.5, 0.99))
@settings(deadline=None, max_examples=30)
def test_bounds_are_ordered_widen_with_level_and_stay_in_range(counts, level):
    means = torch.rand(len(counts), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap_mean(means * counts, counts, samples=200, level=level)
    wide_low, wide_high = bootstrap_mean(means * counts, counts, samples=200, level=0.995)
    assert means.min() - 1e-12 <= wide_low <= low <= high <= wide_high <= means.max() + 1e-12


def noisy_pair(sequences=60, tokens=100.0):
    """Texts of very different difficulty; b is a little worse everywhere."""
    generator = torch.Generator().manual_seed(0)
    a = 2 + 0.5 * torch.randn(sequences, generator=generator, dtype=torch.float64)
    b = a + 0.02 + 0.01 * torch.randn(sequences, generator=generator, dtype=torch.float64)
    return a * tokens, b * tokens, torch.full((sequences,), tokens)


def test_pairing_shrinks_the_interval():
    a, b, counts = noisy_pair()
    paired = paired_bootstrap(a, b, counts)
    shuffled = paired_bootstrap(a, b[torch.randperm(len(b), generator=torch.Generator().manual_seed(1))], counts)
    assert paired[0] > 0, "worse everywhere must be seen"
    assert paired[1] - paired[0] < 0.2 * (shuffled[1] - shuffled[0])


def test_sign_is_b_minus_a():
    a, b, counts = noisy_pair()
    low, high = paired_bootstrap(a, b, counts)
    difference = perplexity(b, counts) - perplexity(a, counts)
    assert 0 < low < difference < high
    assert paired_bootstrap(b, a, counts) == pytest.approx((-high, -low))


def test_seed_decides():
    a, b, counts = noisy_pair()
    assert paired_bootstrap(a, b, counts, seed=3) == paired_bootstrap(a, b, counts, seed=3)
    assert paired_bootstrap(a, b, counts, seed=3) != paired_bootstrap(a, b, counts, seed=4)


def test_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    bootstrap_mean(torch.rand(3, generator=torch.Generator()), torch.ones(3))
    assert torch.equal(state, torch.random.get_rng_state())


def test_interval_covers_the_truth_about_as_often_as_it_says():
    draws = 1.0 + torch.randn(300, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    intervals = [bootstrap_mean(row, torch.ones(40), samples=500, level=0.9) for row in draws]
    covered = sum(low <= 1.0 <= high for low, high in intervals) / len(intervals)
    assert 0.84 <= covered <= 0.94  # 0.9, less the percentile method's small-sample bias, give or take 3 sigma


def test_width_matches_the_standard_error():
    row = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap_mean(row, torch.ones(400))
    assert high - low == pytest.approx(2 * 1.96 * float(row.std()) / 20, rel=0.1)


def test_one_sequence_says_nothing_about_the_spread():
    one = torch.ones(1)
    assert bootstrap_mean(one, one) == (-math.inf, math.inf)
    assert paired_bootstrap(one, one, one) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("sums", "counts", "options"),
    [
        (torch.ones(3), torch.ones(4), {}),
        (torch.ones(2, 2), torch.ones(2, 2), {}),
        (torch.ones(0), torch.ones(0), {}),
        (torch.ones(3), torch.ones(3), {"samples": 0}),
        (torch.ones(3), torch.ones(3), {"level": 95}),
    ],
)
def test_bad_input_is_refused(sums, counts, options):
    with pytest.raises(SpecError, match="bootstrap"):
        bootstrap_mean(sums, counts, **options)
