"""Tiny models of the architectures that matter, built from their configs with seeded random weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
    ViTConfig,
)

from ..errors import SpecError

HIDDEN = 64
LAYERS = 2
HEADS = 4
KV_HEADS = 2  # grouped-query attention, so that k and v are narrower than q
VOCABULARY = 256
RAGGED = 176  # not a multiple of 32 or 64: the last group of a row is short
EXPERTS = 4
IMAGE = 32  # pixels
PATCH = 8  # pixels
LABELS = 5

BATCH, LENGTH = 2, 13  # 26 tokens, no multiple of 4, so that kernels meet a ragged M too


@dataclass(frozen=True)
class Kind:
    """How to build one architecture: config class, auto class, and what differs from the shared sizes."""

    config: Callable[..., Any]
    auto: Any
    sizes: Mapping[str, Any] = field(default_factory=dict)


_TOKENS = {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "pad_token_id": 0}
_ENCODER = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": RAGGED,
}
_DECODER = {
    **_TOKENS,
    **_ENCODER,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HIDDEN // HEADS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Dropout is off everywhere, so that a model in training mode computes the same function.
_CLASSIFIER = {"num_labels": LABELS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 128,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_inner": RAGGED,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN3_MOE = {
    **_DECODER,
    "moe_intermediate_size": RAGGED,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
}

_KINDS = {
    "llama": Kind(LlamaConfig, AutoModelForCausalLM, _DECODER),
    "qwen3": Kind(Qwen3Config, AutoModelForCausalLM, _DECODER),
    "gpt2": Kind(GPT2Config, AutoModelForCausalLM, _GPT2),
    "bert": Kind(BertConfig, AutoModelForSequenceClassification, {**_TOKENS, **_ENCODER, **_CLASSIFIER}),
    "vit": Kind(
        ViTConfig,
        AutoModelForImageClassification,
        {**_ENCODER, **_CLASSIFIER, "image_size": IMAGE, "patch_size": PATCH},
    ),
    "mixtral": Kind(MixtralConfig, AutoModelForCausalLM, {**_DECODER, "num_local_experts": EXPERTS}),
    "qwen3_moe": Kind(Qwen3MoeConfig, AutoModelForCausalLM, _QWEN3_MOE),
}

KINDS = tuple(_KINDS)
"""Names that `tiny_model` takes."""


def tiny_model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the 2-layer, 64-wide model `kind`, in evaluation mode on the CPU. Raises `SpecError`."""
    if kind not in _KINDS:
        raise SpecError(f"tiny_model: unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    spec = _KINDS[kind]
    with torch.random.fork_rng(devices=[]):  # building draws from the global generator
        # Built in dtype, as from_pretrained does: .to(dtype) would round the rotary frequencies too.
        model: PreTrainedModel = spec.auto.from_config(spec.config(**spec.sizes), dtype=dtype)
    _randomize(model, torch.Generator().manual_seed(seed))
    return model.eval()


def tiny_inputs(model: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs for `model(**inputs)`: token ids and mask [2, 13] int64, or pixels [2, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator)
        return {"pixel_values": pixels.to(model.device, model.dtype)}
    first = 3  # ids below are pad, begin and end of text
    ids = torch.randint(first, VOCABULARY, (BATCH, LENGTH), generator=generator).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def _randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Overwrite every parameter in place, none of them trivially zero or one.

    transformers' own initialisation (0.02, zero biases, unit gains) is too quiet: logits come out nearly
    uniform, and an error in a bias or in a folded gain changes nothing.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:  # the last axis is the fan-in of most: outputs of unit size
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
        elif name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        else:
            parameter.copy_(1 + 0.1 * noise)
