"""A quantized KV cache in a model: what is generated, what a model is told, and how far its answers move."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import hfquant
from hfquant.blocks import Blocks
from hfquant.errors import SpecError, UnsupportedError
from hfquant.eval import token_batches
from hfquant.kv_cache import KVCacheLayer
from hfquant.ranges import absmax
from hfquant.rounders import to_nearest
from hfquant.spec import TensorSpec
from hfquant.stats import Stats

MODELS = Path(__file__).parents[1] / "models"
KIVI = (TensorSpec("uint4", Blocks(32, 1), True, "float16"), TensorSpec("uint4", Blocks(1, 32), True, "float16"))


@cache
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODELS / "tiny-llama", dtype=torch.float32).eval()


@cache
def text() -> Tensor:
    """Token ids [4, 192] of text that the model was not trained on."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tiny-llama")
    return torch.cat(list(token_batches(tokenizer, MODELS / "heldout.txt", sequences=4, length=192)))


def generated(ids: Tensor, past: Cache | None, **options: Any) -> Tensor:
    """What the model writes behind `ids`, with the scores of its choices."""
    torch.manual_seed(0)
    seen = torch.ones_like(ids)
    seen[0, :3] = 0  # the first sequence is shorter: padded on the left
    found = model().generate(
        ids, attention_mask=seen, past_key_values=past, min_new_tokens=20, max_new_tokens=20, **options
    )
    return found[:, ids.shape[1] :]


class Rebuilt(DynamicLayer):
    """Keeps all tokens in full precision, and quantizes them anew for each call: slow, and without any state."""

    def __init__(self, residual: int) -> None:
        super().__init__()
        self.residual = residual

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        old = max(0, self.get_seq_length() - self.residual) // 32 * 32
        both = super().update(key_states, value_states)
        return tuple(self._rounded(x, spec, old) for x, spec in zip(both, KIVI, strict=True))

    def _rounded(self, x: Tensor, spec: TensorSpec, old: int) -> Tensor:
        out = x.clone()
        for head in (head for sequence in out[:, :, :old] for head in sequence if old):
            head.copy_(to_nearest(head, absmax(head, spec, Stats("head"))).dequantize(x.dtype))
        return out


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 3},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize(("way", "knows_config"), [*((way, True) for way in WAYS), ("beams", False)])
def test_text_is_that_of_a_cache_which_quantizes_all_old_tokens_anew(way: str, knows_config: bool) -> None:
    """Batches, shared heads, padding, and sequences that go on from others: nothing is mixed up."""
    ids = text()[:2, :80]
    past = hfquant.KVCache(model().config if knows_config else None, residual=32)
    expected = generated(ids, Cache(layers=[Rebuilt(32) for _ in range(4)]), **WAYS[way])
    assert torch.equal(generated(ids, past, **WAYS[way]), expected)
    assert past.get_seq_length() == 80 + 19


@pytest.mark.parametrize("way", ["sampling", "beams"])
def test_without_quantization_nothing_changes(way: str) -> None:
    past = hfquant.KVCache(model().config, keys="none", values=None)
    assert torch.equal(generated(text()[:2, :80], past, **WAYS[way]), generated(text()[:2, :80], None, **WAYS[way]))
    taken, full = past.bytes()
    assert taken == full


def test_assisted_generation_takes_back_what_was_rejected() -> None:
    """Inside of the window nothing is quantized before it is certain: the text is that of the model alone."""
    ids, config = text()[:1, :80], model().config
    assistant = copy.deepcopy(model())
    for layer in assistant.model.layers:
        layer.mlp.up_proj.weight.data.mul_(0.7)  # one that is wrong now and then
    options = {"do_sample": False, "min_new_tokens": 20, "max_new_tokens": 20}
    alone = model().generate(ids, **options)
    for exact in (hfquant.KVCache(config, keys="none", values="none"), hfquant.KVCache(config, residual=128)):
        found = model().generate(ids, past_key_values=exact, assistant_model=assistant, **options)
        assert torch.equal(found, alone)
    tight = hfquant.KVCache(config, keys="uint8", values="uint8", residual=0)  # blocks are cut, and quantized again
    found = model().generate(ids, past_key_values=tight, assistant_model=assistant, **options)
    assert torch.equal(found, alone)


def logits(past: Cache | None, ids: Tensor, step: int) -> Tensor:
    """Log-probabilities [B, T, V], `step` tokens at a time."""
    with torch.no_grad():
        parts = [model()(part, past_key_values=past, use_cache=past is not None).logits for part in ids.split(step, 1)]
    return torch.log_softmax(torch.cat(parts, 1), -1)


@cache
def divergence(keys: str | TensorSpec, values: str | TensorSpec) -> float:
    """KL in nats for each token, of text read 32 tokens at a time with everything older quantized."""
    exact = logits(None, text(), 192)
    found = logits(hfquant.KVCache(model().config, keys=keys, values=values, residual=0), text(), 32)
    return float((exact.exp() * (exact - found)).sum(-1).mean())


def test_reading_in_parts_is_reading_at_once() -> None:
    """Up to the order of float32 sums without quantization, nearly so with eight bits."""
    assert abs(divergence("none", "none")) < 1e-8
    assert divergence("uint8", "uint8") < 3e-5


@pytest.mark.parametrize("bits", [2, 4])
def test_keys_by_channel_are_closer_than_keys_by_token_of_as_many_bits(bits: int) -> None:
    """Keys have channels that are large in all tokens; transformers' quantized cache groups channels of a token."""
    by_token = TensorSpec(f"uint{bits}", Blocks(1, 32), True, "float16")
    assert 1.5 * divergence(f"uint{bits}", f"uint{bits}") < divergence(by_token, f"uint{bits}")
    taken = [filled(tokens=64, keys=keys, values="none").bytes()[0] for keys in (f"uint{bits}", by_token)]
    assert taken[0] <= taken[1]


@pytest.mark.parametrize("bits", [2, 4])
def test_keys_are_more_sensitive_than_values(bits: int) -> None:
    assert divergence(f"uint{bits}", "none") > divergence("none", f"uint{bits}")


def test_more_bits_are_closer() -> None:
    found = [divergence(f"uint{bits}", f"uint{bits}") for bits in (8, 4, 2)]
    assert 50 * found[0] < found[1] and 10 * found[1] < found[2]


def test_four_bits_take_little_more_than_a_quarter() -> None:
    past = hfquant.KVCache(model().config, residual=0)
    for layer in range(4):
        past.update(*torch.randn(2, 1, 2, 1024, 32, dtype=torch.bfloat16), layer)
    taken, full = past.bytes()
    assert (
        full == 4 * 2 * 1 * 2 * 1024 * 32 * 2
    )  # layers, keys and values, batch, heads of keys, tokens, channels, bytes
    assert taken / full == pytest.approx((4 + 20 / 32) / 16, abs=0.02)


def filled(config: Any = None, tokens: int = 70, **options: Any) -> hfquant.KVCache:
    """A cache with some tokens of two sequences in two layers."""
    past = hfquant.KVCache(config, residual=0, **options)
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        past.update(*torch.randn(2, 2, 2, tokens, 32, generator=generator), layer)
    return past


def test_a_cache_that_is_reset_is_as_new() -> None:
    past, new = filled(), filled()
    past.reset()
    assert past.get_seq_length() == 0 and past.layers[0].keys is None and past.get_mask_sizes(5, 0) == (5, 0)
    for layer in range(2):
        past.update(*torch.full((2, 2, 2, 70, 32), 15.0), layer)
        assert torch.equal(past.layers[layer].keys, torch.full((2, 2, 70, 32), 15.0))  # the scale is 1
    assert past.bytes() == new.bytes()


def test_a_copy_is_a_cache_of_its_own() -> None:
    """As for a prompt that many texts begin with."""
    past = filled()
    again = copy.deepcopy(past)
    before = past.layers[0].keys.clone()
    again.update(*torch.randn(2, 2, 2, 40, 32), 0)
    again.batch_repeat_interleave(2)
    again.crop(-100)
    assert torch.equal(past.layers[0].keys, before) and past.get_seq_length() == 70
    assert again.layers[0].keys.shape == (4, 2, 10, 32) and torch.equal(again.layers[0].keys[1], before[0, :, :10])


def test_sequences_are_selected_by_number_and_by_mask() -> None:
    one, two, three = filled(), filled(), filled()
    one.batch_select_indices(torch.tensor([1]))
    two.batch_select_indices(torch.tensor([False, True]))
    three.reorder_cache(torch.tensor([1, 0]))
    for layer in range(2):
        assert torch.equal(one.layers[layer].values, two.layers[layer].values)
        assert torch.equal(one.layers[layer].values[0], three.layers[layer].values[0])


def test_only_negative_numbers_are_cropped() -> None:
    past = filled()
    past.crop(0)
    assert past.get_seq_length() == 70
    with pytest.raises(ValueError, match="negative"):
        past.crop(10)


def windowed(**options: Any) -> Qwen2ForCausalLM:
    """A random model with windows of 16 tokens in some layers."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=16, **options,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def test_layers_with_a_window_keep_it_in_full_precision() -> None:
    mixed = windowed(layer_types=["sliding_attention", "full_attention"])
    past = hfquant.KVCache(mixed.config, keys="uint8", values="uint8", residual=16)
    assert isinstance(past.layers[0], DynamicSlidingWindowLayer) and isinstance(past.layers[1], KVCacheLayer)
    ids = torch.randint(64, (2, 60))
    with torch.no_grad():
        expected = mixed(ids).logits
        found = torch.cat([mixed(part, past_key_values=past).logits for part in ids.split(10, 1)], 1)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert past.bytes()[0] < past.bytes()[1]


def test_a_model_without_a_layer_to_quantize_is_refused() -> None:
    only = windowed(layer_types=["sliding_attention", "sliding_attention"])
    with pytest.raises(UnsupportedError, match="sliding_attention, whose caches do not grow"):
        hfquant.KVCache(only.config)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown grid": ({"keys": "int9"}, "int9"),
    "no grid": ({"values": 4}, "name of a grid, 'none' or a TensorSpec"),
    "group": ({"group_size": 0}, "group_size is a whole number of at least 1"),
    "window": ({"residual": -1}, "residual is a whole number of at least 0"),
    "scale": ({"scale_dtype": "int8"}, "scales are stored as"),
    "no sign": ({"keys": "ue2m2"}, "both signs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_make_no_sense_are_refused(name: str) -> None:
    options, what = REFUSED[name]
    with pytest.raises(SpecError, match=what):
        hfquant.KVCache(**options)


def test_attention_that_reads_the_cache_itself_gives_the_same_text() -> None:
    """On a CPU it dequantizes what other attention gets dequantized."""
    ids = text()[:2, :80]
    expected = generated(ids, hfquant.KVCache(model().config, residual=32), do_sample=False)
    model().set_attn_implementation("hfquant_kv")
    try:
        assert torch.equal(generated(ids, hfquant.KVCache(model().config, residual=32), do_sample=False), expected)
        assert torch.equal(generated(ids, hfquant.KVCache(residual=32), do_sample=False), expected)
        assert torch.equal(
            generated(ids, None, do_sample=False), generated(ids, None, do_sample=False, use_cache=False)
        )
    finally:
        model().set_attn_implementation("sdpa")


def test_whoever_takes_stand_ins_for_numbers_gets_nan() -> None:
    config = copy.deepcopy(model().config)
    config._attn_implementation = "hfquant_kv"
    keys, values = filled(config).update(*torch.randn(2, 2, 2, 1, 32), 0)
    assert keys.shape == values.shape == (2, 2, 71, 32) and keys.isnan().all() and values.isnan().all()
