"""Injected outlier channels must be large and must not change what the model computes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, ViTForImageClassification

from . import MODEL_DIR, VIT_DIR
from .outliers import inject, norm_consumers, spread

Transform = Callable[[LlamaForCausalLM], LlamaForCausalLM]

POWERS_OF_TWO: dict[str, Transform] = {
    "inject": inject,
    "inject-16": lambda model: inject(model, factor=16.0, channels=9, seed=3),
    "inject-final-norm": lambda model: inject(model, final_norm=True),
    "spread": spread,
    "spread-final-norm": lambda model: spread(model, octaves=5, seed=1, final_norm=True),
    "both": lambda model: spread(inject(model)),
}


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture
def model(original: LlamaForCausalLM) -> LlamaForCausalLM:
    return copy.deepcopy(original)


@torch.inference_mode()
def logits(model: LlamaForCausalLM) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (4, 96), generator=generator)
    return model(input_ids=ids).logits


@torch.inference_mode()
def channel_peaks(model: LlamaForCausalLM) -> list[Tensor]:
    """Return the largest magnitude of each channel after each norm, in the order of ``norm_consumers``."""
    peaks: list[Tensor] = []
    hooks = [
        norm.register_forward_hook(lambda _module, _inputs, output: peaks.append(output.abs().amax(dim=(0, 1))))
        for norm, _ in norm_consumers(model)
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    return peaks


@pytest.mark.parametrize("name", POWERS_OF_TWO)
def test_powers_of_two_keep_float32_logits_bitwise(
    name: str, original: LlamaForCausalLM, model: LlamaForCausalLM
) -> None:
    assert POWERS_OF_TWO[name](model) is model
    assert torch.equal(logits(model), logits(original))


def test_powers_of_two_keep_bfloat16_logits_bitwise(original: LlamaForCausalLM, model: LlamaForCausalLM) -> None:
    reference = logits(copy.deepcopy(original).bfloat16())
    assert torch.equal(logits(inject(model.bfloat16())), reference)


def test_other_factors_keep_logits_to_rounding(original: LlamaForCausalLM, model: LlamaForCausalLM) -> None:
    torch.testing.assert_close(logits(inject(model, factor=100.0)), logits(original), rtol=1e-4, atol=1e-4)


def test_inject_enlarges_the_same_channels_everywhere(original: LlamaForCausalLM, model: LlamaForCausalLM) -> None:
    changed: list[frozenset[int]] = []
    for before, after in zip(channel_peaks(original), channel_peaks(inject(model)), strict=True):
        ratio = after / before
        assert set(ratio.unique().tolist()) == {1.0, 64.0}
        changed.append(frozenset(ratio.argwhere().flatten()[ratio == 64.0].tolist()))
    assert len(set(changed)) == 1
    assert len(changed[0]) == 4


def test_spread_reaches_every_octave(original: LlamaForCausalLM, model: LlamaForCausalLM) -> None:
    for before, after in zip(channel_peaks(original), channel_peaks(spread(model)), strict=True):
        assert set((after / before).log2().unique().tolist()) == {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}


def test_seed_decides_the_channels(original: LlamaForCausalLM) -> None:
    def gain(transform: Callable[..., LlamaForCausalLM], seed: int) -> Tensor:
        return transform(copy.deepcopy(original), seed=seed).model.layers[0].input_layernorm.weight

    for transform in (inject, spread):
        assert torch.equal(gain(transform, 5), gain(transform, 5))
        assert not torch.equal(gain(transform, 5), gain(transform, 6))


def test_the_final_norm_is_left_alone_by_default(original: LlamaForCausalLM, model: LlamaForCausalLM) -> None:
    spread(inject(model))
    assert torch.equal(model.model.norm.weight, original.model.norm.weight)
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)


def test_a_tied_head_is_refused(model: LlamaForCausalLM) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="tied"):
        inject(model, final_norm=True)


@torch.inference_mode()
def test_spreading_a_vision_transformer_keeps_float32_logits_bitwise() -> None:
    model = ViTForImageClassification.from_pretrained(VIT_DIR, dtype=torch.float32).eval()
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before, norm = model(pixels).logits, model.vit.layers[0].layernorm_before
    entering = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
    small = norm(entering)
    spread(model, final_norm=True)
    assert torch.equal(model(pixels).logits, before)
    assert set((norm(entering) / small).log2().unique().tolist()) == {float(n) for n in range(-3, 4)}
