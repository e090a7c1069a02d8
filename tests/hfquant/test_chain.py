"""The chain of blocks: found in every architecture, and replayed block by block to the model's own result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hfquant.chain import Chain, calls, find_chain, first_call, no_cache, stubs
from hfquant.errors import UnsupportedError
from hfquant.matrices import Enough
from hfquant.testing.tiny import KINDS, tiny_inputs, tiny_model

SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "gemma3":  # sliding windows in the first layers, and two rotary bases
        layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
        return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **layers, sliding_window=4)).eval()
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**SMALL, num_hidden_layers=2, sliding_window=4)).eval()
    return tiny_model(kind)


@contextmanager
def answers(model: nn.Module, chain: Chain, found: dict[int, Tensor]) -> Iterator[None]:
    """Note the hidden states that each block of the model gives back."""

    def hook(index: int) -> Any:
        def note(module: nn.Module, args: tuple, output: Any) -> None:
            found[index] = output[0] if isinstance(output, tuple) else output

        return note

    hooks = [block.register_forward_hook(hook(index)) for index, block in enumerate(chain.holder)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@torch.no_grad()
def replay(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[list[Tensor], Tensor]:
    """What each block makes of the one before it, and the logits that follow from the last one."""
    chain = find_chain(model)
    call, hidden = first_call(model, chain, inputs)
    tupled = isinstance(call.output(chain.holder[0], hidden), tuple)
    every, hidden = calls(model, chain, inputs, tupled)
    states = []
    for how, block in zip(every, chain.holder, strict=True):
        hidden = how.run(block, hidden)
        states.append(hidden)

    def answer(index: int, call: Any, given: Tensor) -> Any:
        out = states[-1] if index == len(chain.holder) - 1 else given
        return (out,) if tupled else out

    with stubs(chain, answer), no_cache(model):
        return states, model(**inputs).logits


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kind", [*KINDS, "gemma3", "mistral"])
@torch.no_grad()
def test_replaying_the_blocks_gives_the_models_own_states_and_logits(kind: str, padded: bool) -> None:
    model = model_of(kind)
    inputs = tiny_inputs(model)
    if padded and "attention_mask" in inputs:
        inputs["attention_mask"][0, 9:] = 0
    chain = find_chain(model)
    found: dict[int, Tensor] = {}
    with answers(model, chain, found):
        expected = model(**inputs).logits
    states, logits = replay(model, inputs)
    assert len(states) == len(found) == len(chain.holder) >= 2
    assert all(torch.equal(states[index], found[index]) for index in found)
    assert torch.equal(logits, expected)


def test_blocks_are_called_with_what_is_theirs() -> None:
    """Every other layer of Gemma 3 looks at a window: replaying one with another's mask must differ."""
    model = model_of("gemma3")
    inputs = tiny_inputs(model)
    chain = find_chain(model)
    every, hidden = calls(model, chain, inputs, tupled=False)
    window, full = every[0], every[1]
    with torch.no_grad():
        own, wrong = window.run(chain.holder[0], hidden), full.run(chain.holder[0], hidden)
    assert not torch.equal(own[:, -1], wrong[:, -1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_chain_is_named_as_in_the_model(kind: str) -> None:
    model = tiny_model(kind)
    chain = find_chain(model)
    for name, block in zip(chain.names(), chain.holder, strict=True):
        assert model.get_submodule(name) is block


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"Sequential has no list of blocks.*data-free"):
        find_chain(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_a_model_with_two_chains_is_refused_and_both_are_named() -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    with pytest.raises(UnsupportedError, match=r"several chains .*encoder\.block.*decoder\.block"):
        find_chain(model)


def test_lists_of_other_things_are_no_chains() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ModuleList([nn.Linear(2, 1)])  # small
            self.empty = nn.ModuleList()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(16, 16) for _ in range(3))}) for _ in range(2)
            )

    assert find_chain(Model()).name == "layers"  # the outermost one


class Odd(nn.Module):
    """A model that calls its blocks in some way of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "none":
            return x
        for layer in self.layers[:2] if self.how == "some" else self.layers:
            x = layer(input=x) if self.how == "keyword" else layer(x)
        return x


def test_blocks_that_are_not_called_are_refused() -> None:
    none, some = Odd("none"), Odd("some")
    with pytest.raises(UnsupportedError, match=r"Odd never calls its blocks layers"):
        first_call(none, find_chain(none), {"x": torch.ones(1, 4)})
    with pytest.raises(UnsupportedError, match=r"Odd does not call every block of layers"):
        calls(some, find_chain(some), {"x": torch.ones(1, 4)}, tupled=False)


def test_hidden_states_may_be_a_keyword() -> None:
    model = Odd("keyword")
    chain = find_chain(model)
    every, hidden = calls(model, chain, {"x": torch.ones(1, 4)}, tupled=False)
    for how, block in zip(every, chain.holder, strict=True):
        assert how.keyword == "input"
        hidden = how.run(block, hidden)
    assert torch.equal(hidden, model(torch.ones(1, 4)))


def test_the_blocks_are_back_after_an_error() -> None:
    model = tiny_model("llama")
    chain = find_chain(model)
    before = list(chain.holder)
    with pytest.raises(RuntimeError, match="broken"), stubs(chain, lambda index, call, hidden: 1 / 0):
        assert chain.holder[0] is not before[0]
        assert chain.holder[0].self_attn is before[0].self_attn  # models ask their blocks
        raise RuntimeError("broken")
    assert all(now is was for now, was in zip(chain.holder, before, strict=True))


def test_only_the_way_to_the_last_block_is_run() -> None:
    model = tiny_model("llama")
    called: list[str] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: called.append("head"))
    calls(model, find_chain(model), tiny_inputs(model), tupled=False)
    assert not called


def test_a_call_in_another_dtype_casts_what_is_a_number() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    inputs = tiny_inputs(model)
    inputs["attention_mask"][0, 9:] = 0
    call, hidden = first_call(model, find_chain(model), inputs)
    wide = call.to(torch.float32)
    cos, sin = wide.kwargs["position_embeddings"]
    assert cos.dtype == sin.dtype == torch.float32 and hidden.dtype == torch.bfloat16
    assert wide.kwargs["attention_mask"].dtype == torch.bool
    assert not wide.kwargs["position_ids"].is_floating_point()


# The cache: blocks are run again and again, and each run would add to it.


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_key_value_cache_while_calibrating(kind: str) -> None:
    model = tiny_model(kind)
    assert model.config.use_cache
    with pytest.raises(Enough), no_cache(model):
        assert not model.config.use_cache
        raise Enough
    assert model.config.use_cache
    call, _ = first_call(model, find_chain(model), tiny_inputs(model))
    assert call.kwargs.get("past_key_values") is None and not call.kwargs.get("use_cache")


@torch.no_grad()
def test_no_cache_in_the_text_part_of_a_larger_model() -> None:
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    text = LlamaConfig(**SMALL, num_hidden_layers=2)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=255)
    ).eval()
    inputs = {"input_ids": torch.arange(3, 16)[None]}
    chain = find_chain(model)
    assert chain.name.endswith("language_model.layers")
    call, hidden = first_call(model, chain, inputs)
    once, again = call.run(chain.holder[0], hidden), call.run(chain.holder[0], hidden)
    assert torch.equal(once, again)
    assert text.use_cache
