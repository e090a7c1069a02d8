"""KL divergence, agreement and paired perplexity of a model and its reference."""

import dataclasses
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from hfquant.errors import HfQuantError, SpecError
from hfquant.eval import fidelity as module
from hfquant.eval import perplexity as perplexity_module
from hfquant.eval.fidelity import Fidelity, Reference, token_kl
from hfquant.eval.perplexity import perplexity, sequence_nll
from hfquant.testing.tiny import tiny_model

CACHING = pytest.mark.parametrize("cache", [True, False], ids=["cached", "on-the-fly"])


class Constant(nn.Module):
    """The same next-token logits [V] after every token."""

    def __init__(self, probabilities, dtype=torch.float64):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(probabilities, dtype=torch.float64).log().to(dtype) + 1)
        self.calls = 0

    def forward(self, input_ids, use_cache):
        self.calls += 1
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def batches(vocabulary=4, shapes=((3, 6), (3, 6), (1, 6))):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, shape, generator=generator) for shape in shapes]


P = [0.1, 0.2, 0.3, 0.4]
Q = [0.5, 0.25, 0.15, 0.1]  # not P reversed: KL(P || Q) must differ from KL(Q || P)
KL = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))


@CACHING
def test_two_known_distributions(cache):
    result = Reference(Constant(P), batches(), cache).compare(Constant(Q))
    assert result.kl == pytest.approx(KL, rel=1e-12)
    assert result.kl_ci == pytest.approx((KL, KL), rel=1e-12)
    assert result.top1 == 0.0
    assert (result.tokens, result.sequences) == (7 * 5, 7)


@CACHING
def test_perplexities_are_those_of_each_model_alone(cache):
    result = Reference(Constant(P), batches(), cache).compare(Constant(Q))
    assert result.ppl_ref == pytest.approx(perplexity(*sequence_nll(Constant(P), batches())), rel=1e-12)
    assert result.ppl == pytest.approx(perplexity(*sequence_nll(Constant(Q), batches())), rel=1e-12)
    low, high = result.dppl_ci
    assert low <= result.ppl - result.ppl_ref <= high


def test_a_worse_model_has_a_positive_perplexity_interval():
    text = batches(4, [(8, 40)] * 4)  # uniform, so a model that is sure of token 0 does badly
    result = Reference(Constant([0.25] * 4), text).compare(Constant([0.91, 0.03, 0.03, 0.03]))
    assert 0 < result.dppl_ci[0] < result.ppl - result.ppl_ref < result.dppl_ci[1]


@CACHING
def test_predictions_that_do_not_count_might_as_well_not_be_there(cache):
    """Counting the first predictions of each sequence is measuring sequences that end there."""
    model, candidate = tiny_model("llama"), tiny_model("llama", seed=1)
    rows, lengths = [row for batch in batches(256) for row in batch], torch.tensor([5, 3, 1, 4, 2, 1, 5])
    counted = list((torch.arange(5) < lengths[:, None]).split([3, 3, 1]))
    found = Reference(model, batches(256), cache, counted=counted).compare(candidate)
    cut = [row[None, : end + 1] for row, end in zip(rows, lengths.tolist(), strict=True)]
    wanted = Reference(model, cut, cache).compare(candidate)
    assert (found.tokens, found.sequences) == (wanted.tokens, wanted.sequences) == (21, 7)
    for name in ("kl", "kl_ci", "top1", "ppl", "ppl_ref", "dppl_ci"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-4)


@CACHING
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_against_itself_is_exactly_the_same(cache, dtype):
    model = tiny_model("qwen3", dtype=dtype)
    result = Reference(model, batches(256), cache).compare(model)
    assert (result.kl, result.kl_ci, result.top1, result.dppl_ci) == (0.0, (0.0, 0.0), 1.0, (0.0, 0.0))
    assert result.ppl == result.ppl_ref


def test_cached_and_on_the_fly_agree_exactly():
    model, candidate = tiny_model("llama", dtype=torch.bfloat16), tiny_model("llama", seed=1)
    results = [Reference(model, batches(256), cache).compare(candidate) for cache in (True, False)]
    assert results[0] == results[1]
    assert results[0].kl > 0.01


def test_only_the_contexts_that_differ_count():
    class Successor(nn.Module):
        """Token t is followed by t + 1, but after `lost` by anything."""

        def __init__(self, lost=-1):
            super().__init__()
            self.lost = lost

        def forward(self, input_ids, use_cache):
            logits = torch.nn.functional.one_hot((input_ids + 1) % 8, 8) * 100.0
            return SimpleNamespace(logits=logits.masked_fill((input_ids == self.lost)[..., None], 0.0))

    batch = torch.tensor([[1, 5, 2, 5], [1, 2, 3, 4]])  # the last token is a context of nothing
    result = Reference(Successor(), [batch]).compare(Successor(lost=5))
    assert result.kl == pytest.approx(math.log(8) / 6)
    assert result.top1 == pytest.approx(5 / 6)
    assert result.kl_ci == pytest.approx((0, math.log(8) / 3))


def test_matches_the_formula_of_torch():
    model, candidate = tiny_model("llama"), tiny_model("llama", seed=1)
    (batch,) = batches(256, [(5, 9)])
    with torch.no_grad():
        p, q = (m(input_ids=batch).logits[:, :-1].double().log_softmax(-1) for m in (model, candidate))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / 40
    result = Reference(model, [batch]).compare(candidate)
    assert result.kl == pytest.approx(expected.item(), rel=1e-5)
    assert result.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


@pytest.mark.parametrize("chunk", [1, 9, 1 << 22])
def test_chunk_size_does_not_matter(monkeypatch, chunk):
    monkeypatch.setattr(perplexity_module, "CHUNK", chunk)
    assert Reference(Constant(P), batches()).compare(Constant(Q)).kl == pytest.approx(KL, rel=1e-12)


def test_logits_shifted_by_a_constant_are_the_same_model():
    shifted = Constant(P)
    shifted.logits.data += 100  # rounds them to 1e-14
    assert Reference(Constant(P), batches()).compare(shifted).kl == pytest.approx(0, abs=1e-13)


def test_tiny_divergence_is_resolved():
    eps = 1e-5  # KL of a uniform pair tilted by eps is eps^2 / 2 to first order
    result = Reference(Constant([0.5, 0.5]), batches(2)).compare(Constant([0.5 + eps / 2, 0.5 - eps / 2]))
    assert result.kl == pytest.approx(eps**2 / 2, rel=1e-3)


LOGITS = arrays("float32", (3, 7), elements=st.floats(-100, 100, width=32))


@given(a=LOGITS, b=LOGITS)
def test_divergence_is_never_negative_and_zero_only_by_itself(a, b):
    log_p, log_q = (torch.from_numpy(x).double().log_softmax(-1) for x in (a, b))
    assert (token_kl(log_p, log_q) >= 0).all()
    assert (token_kl(log_p, log_p) == 0).all()
    gap = (log_p.exp() - log_q.exp()).abs().sum(-1)
    assert (token_kl(log_p, log_q) >= gap**2 / 2 - 1e-12).all(), "Pinsker's inequality"


def test_tokens_ruled_out():
    allowed, ruled_out = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    assert token_kl(ruled_out, allowed).item() == pytest.approx(math.log(2))
    assert token_kl(ruled_out, ruled_out).item() == 0
    assert token_kl(allowed, ruled_out).item() == math.inf


def test_one_reference_run_serves_many_candidates():
    model = Constant(P)
    reference = Reference(model, batches())
    for _ in range(3):
        reference.compare(Constant(Q))
    assert reference.cached and model.calls == 3


def test_large_vocabulary_runs_on_the_fly_unless_told_to_cache(monkeypatch):
    monkeypatch.setattr(module, "CACHE_LIMIT", 35 * 4 * 8)
    assert Reference(Constant(P), batches()).cached
    monkeypatch.setattr(module, "CACHE_LIMIT", 35 * 4 * 8 - 1)
    assert not Reference(Constant(P), batches()).cached
    assert Reference(Constant(P), batches(), cache=True).cached


def test_one_batch_of_logits_of_each_model_is_alive_at_a_time():
    class Watched(Constant):
        made = ()

        def forward(self, input_ids, use_cache):
            assert all(logits() is None for logits in self.made)
            result = super().forward(input_ids, use_cache)
            self.made = (*self.made, weakref.ref(result.logits))
            return result

    Reference(Watched(P), batches(), cache=False).compare(Watched(Q))
    sequence_nll(Watched(P), batches())


def test_cache_keeps_the_logits_dtype():
    reference = Reference(Constant(P, torch.bfloat16), batches())
    assert {x.dtype for x in reference._logits} == {torch.bfloat16}


@CACHING
@pytest.mark.parametrize("bad", ["reference", "candidate"])
def test_nan_names_model_and_batch(cache, bad):
    class Broken(Constant):
        def forward(self, input_ids, use_cache):
            logits = super().forward(input_ids, use_cache).logits.clone()
            return SimpleNamespace(logits=logits.fill_(math.nan) if self.calls % 3 == 2 else logits)

    pair = (Broken(P), Constant(Q)) if bad == "reference" else (Constant(P), Broken(Q))
    name = r"Broken \(reference\), batch 1" if bad == "reference" else "Broken, batch 1"
    with pytest.raises(HfQuantError, match=name):
        Reference(pair[0], batches(), cache).compare(pair[1])


def test_other_vocabulary_is_refused():
    with pytest.raises(SpecError, match="share one vocabulary"):
        Reference(Constant(P), batches()).compare(Constant([0.2] * 5))


def test_bad_batches_are_refused():
    with pytest.raises(SpecError, match="L at least 2"):
        Reference(Constant(P), [])
    with pytest.raises(SpecError, match="vocabulary of 256"):
        Reference(tiny_model("llama"), [torch.tensor([[0, 256, 1]])])


def test_custom_forward_is_used():
    def reversed_logits(model, ids):
        return model(input_ids=ids, use_cache=False).logits.flip(-1)

    reference = Reference(Constant(P), batches())
    assert reference.compare(Constant(P[::-1]), forward=reversed_logits).kl == pytest.approx(0, abs=1e-15)


def test_result_is_frozen_plain_data():
    result = Reference(Constant(P), batches()).compare(Constant(Q))
    assert all(type(v) in (float, int, tuple) for v in dataclasses.asdict(result).values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.kl = 0.0
    assert isinstance(result, Fidelity)


@CACHING
def test_training_mode_and_gradients_are_left_as_they_were(cache):
    reference, candidate = tiny_model("gpt2").train(), tiny_model("gpt2", seed=1).train()
    Reference(reference, batches(256), cache).compare(candidate)
    assert reference.training and candidate.training and torch.is_grad_enabled()
