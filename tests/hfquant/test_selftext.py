"""Text that a model writes itself: begun as LLM-QAT does, drawn from the model, and drawn alike every time."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hfquant.errors import CalibrationError, SpecError
from hfquant.eval import sequence_nll
from hfquant.selftext import draw, refusal, self_text
from hfquant.testing.tiny import VOCABULARY, tiny_model
from tests.models import MODEL_DIR

END = 3


@pytest.fixture(scope="module")
def trained() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def chatty() -> Any:
    """A random model of 12 tokens, which therefore ends its texts often, on either of two tokens."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=12, bos_token_id=1, eos_token_id=[2, END], pad_token_id=0, **sizes)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def likeliest(model: Any, ids: Tensor) -> Tensor:
    """What the model finds most likely at each position [S, L] but the first, all at once and without a cache."""
    found: Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)
    return found


def ppl(model: Any, ids: Tensor) -> float:
    nll, tokens = sequence_nll(model, [ids])
    return math.exp(float(nll.sum() / tokens.sum()))


def test_a_model_finds_its_own_text_far_more_likely_than_random_tokens(trained: Any) -> None:
    own = self_text(trained, samples=8, length=64)
    noise = torch.randint(1, 1024, (8, 64), generator=torch.Generator().manual_seed(0))
    assert ppl(trained, own) < ppl(trained, noise) / 1000


def test_a_text_begins_at_random_goes_on_greedily_and_then_freely(trained: Any) -> None:
    ids = self_text(trained, samples=32, length=16)
    assert ids.shape == (32, 16) and ids.dtype == torch.int64
    assert len(ids[:, 0].unique()) > 28, "1024 tokens to begin with"
    same = likeliest(trained, ids) == ids[:, 1:]
    fresh = (ids[:, :6] != trained.config.eos_token_id).all(1)  # texts that do not end in the greedy part
    runs = same[fresh].long().cumprod(1).sum(1)
    assert int(runs.min()) == 3, "three tokens at least, and not always more"
    assert same[fresh, 5:].double().mean() < 0.95, "later tokens are drawn"


def test_what_is_drawn_is_as_surprising_as_the_model_expects(trained: Any) -> None:
    """The mean surprise of tokens drawn from a distribution is its entropy: no temperature, nothing cut off."""
    ids = self_text(trained, samples=32, length=64)
    with torch.no_grad():
        log_p = trained(input_ids=ids[:, :-1], use_cache=False).logits.double().log_softmax(-1)
    surprise = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * log_p.square()).sum(-1) - entropy.square()
    free = (ids != trained.config.eos_token_id).long().cumprod(1).bool()[:, :-1]  # of texts that have not ended
    free[:, :5] = False
    deviation = (surprise - entropy)[free].sum() / variance[free].sum().sqrt()
    assert free.sum() > 1000 and abs(float(deviation)) < 3


def test_the_same_seed_gives_the_same_text_whatever_the_batch(trained: Any) -> None:
    texts = [self_text(trained, 6, 24, seed=7, batch_size=size) for size in (1, 4, 6)]
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0], self_text(trained, 6, 24, seed=8))


def test_the_caller_s_model_and_random_state_stay_as_they_are(trained: Any) -> None:
    model = copy.deepcopy(trained).train()
    settings = model.generation_config
    state = torch.get_rng_state()
    ids = self_text(model, 2, 8)
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules()) and model.generation_config is settings
    assert torch.equal(ids, self_text(trained, 2, 8))


def test_the_model_s_own_generation_settings_have_no_say(trained: Any) -> None:
    model = copy.deepcopy(trained)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, repetition_penalty=5.0, max_length=5, eos_token_id=0, num_beams=3
    )
    assert torch.equal(self_text(model, 2, 24), self_text(trained, 2, 24))


def test_a_text_that_ends_is_followed_by_one_begun_the_same_way(chatty: Any) -> None:
    ids = self_text(chatty, samples=40, length=48, prefix=[1], special=[4])
    assert ids.shape == (40, 48) and (ids[:, 0] == 1).all()
    marks = torch.tensor([0, 1, 2, END, 4])
    ended = torch.isin(ids[:, 1:-4], torch.tensor([2, END])).nonzero() + torch.tensor([0, 1])
    assert len(ended) > 40
    begins = torch.cat([ended, torch.stack([torch.arange(40), torch.zeros(40, dtype=torch.int64)], 1)])
    row, at = begins.T
    first = ids[row, at + 1]
    assert not torch.isin(first, marks).any() and len(first.unique()) == 12 - len(marks)
    likely = torch.cat([torch.zeros(40, 1, dtype=torch.int64), likeliest(chatty, ids)], dim=1)
    for step in (2, 3, 4):
        whole = ~torch.isin(ids[row[:, None], (at[:, None] + torch.arange(2, step))], torch.tensor([2, END])).any(1)
        inside = whole & (at + step < 48)
        assert torch.equal(ids[row[inside], at[inside] + step], likely[row[inside], at[inside] + step])


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "mixtral"])
def test_every_decoder_writes(kind: str) -> None:
    ids = self_text(tiny_model(kind), 3, 9, batch_size=2)
    assert ids.shape == (3, 9) and ids.min() >= 0 and ids.max() < VOCABULARY


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_models_without_a_language_model_head_are_refused(kind: str) -> None:
    with pytest.raises(CalibrationError, match=r"For\w+Classification has no language-model head: give it data"):
        self_text(tiny_model(kind), 2, 8)


@pytest.mark.parametrize(
    ("model_class", "config", "reason"),
    [
        (T5ForConditionalGeneration, T5Config(), "writes only answers to an input"),
        (type("Listener", (LlamaForCausalLM,), {"main_input_name": "sound"}), LlamaConfig(), "Listener reads sound"),
        (AutoModelForCausalLM, LlamaConfig(), None),
        (LlamaForCausalLM, LlamaConfig(), None),
    ],
)
def test_the_reason_is_known_before_there_is_a_model(model_class: Any, config: Any, reason: str | None) -> None:
    found = refusal(model_class, config)
    assert found is None if reason is None else reason in str(found)


def test_a_model_that_gives_nan_is_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="NaN for its own text"):
        self_text(model, 1, 4)


def test_a_length_that_leaves_nothing_to_write_is_refused(chatty: Any) -> None:
    with pytest.raises(SpecError, match="1 samples of 2 tokens, 2 of them given"):
        self_text(chatty, 1, 2, prefix=[1, 1])
    assert self_text(chatty, 3, 2, prefix=[1]).shape == (3, 2)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any))
def test_each_token_is_drawn_for_a_share_of_the_chances_that_is_its_probability(weights: list[int]) -> None:
    total = sum(weights)
    scores = torch.tensor(weights).double().log().expand(4 * total, -1)  # 0 becomes -inf: ruled out
    chances = (torch.arange(4 * total) + 0.5) / (4 * total)
    assert draw(scores, chances).bincount(minlength=len(weights)).tolist() == [4 * weight for weight in weights]
    assert torch.isin(draw(scores[:1], torch.zeros(1)), torch.tensor(weights).nonzero()).all()
