"""Function-preserving outlier channels for Llama models and vision transformers.

Large language models have a few hidden channels that are far larger than the rest, which small models lack.
Here the gain of some channels of a norm is multiplied by a factor and the columns of the weights that read
the norm's output are divided by it: the activations between them grow outliers, the function stays the same.
With powers of two every product is the same floating-point number as before, so the logits are too, bit for
bit.

This also makes the matching weight columns small, which is kinder to methods that scale or rotate activations
than the outliers of a real model are. It tests that a method copes with such activations, not how good it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, ViTForImageClassification

Pairs = list[tuple[nn.Module, Sequence[nn.Linear]]]
Model = LlamaForCausalLM | ViTForImageClassification


def norm_consumers(model: Model, final_norm: bool = False) -> Pairs:
    """Return every norm with the linear layers that read its output; the last norm only if ``final_norm``."""
    pairs: Pairs = []
    if isinstance(model, ViTForImageClassification):
        for block in model.vit.layers:
            attention = block.attention
            pairs.append((block.layernorm_before, (attention.q_proj, attention.k_proj, attention.v_proj)))
            pairs.append((block.layernorm_after, (block.mlp.fc1,)))
        if final_norm:
            pairs.append((model.vit.layernorm, (model.classifier,)))
        return pairs
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        pairs.append((layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)))
        pairs.append((layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)))
    if final_norm:
        if model.lm_head.weight is model.model.embed_tokens.weight:
            raise ValueError("the output head is tied: changing its columns would change the embedding")
        pairs.append((model.model.norm, (model.lm_head,)))
    return pairs


@torch.no_grad()
def scale_channels(norm: nn.Module, consumers: Sequence[nn.Linear], factors: Tensor) -> None:
    """Multiply gain and bias of ``norm`` by per-channel ``factors`` and divide the consumers' columns by them."""
    for made in norm.parameters(recurse=False):
        made.mul_(factors.to(made))
    for consumer in consumers:
        consumer.weight.div_(factors.to(consumer.weight))


def inject(model: Model, factor: float = 64.0, channels: int = 4, seed: int = 0, final_norm: bool = False) -> Model:
    """Make ``channels`` hidden channels ``factor`` times larger after every norm; in place.

    The channels are the same in every layer, as they are in real models. ``seed`` chooses them.
    """
    size = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    factors = torch.ones(size)
    factors[torch.randperm(size, generator=generator)[:channels]] = factor
    for norm, consumers in norm_consumers(model, final_norm):
        scale_channels(norm, consumers, factors)
    return model


def spread(model: Model, octaves: int = 3, seed: int = 0, final_norm: bool = False) -> Model:
    """Scale every channel after every norm by ``2**n``, ``n`` uniform in ``-octaves..octaves``; in place.

    Every norm draws its own exponents, from ``seed``.
    """
    generator = torch.Generator().manual_seed(seed)
    for norm, consumers in norm_consumers(model, final_norm):
        exponents = torch.randint(-octaves, octaves + 1, (model.config.hidden_size,), generator=generator)
        scale_channels(norm, consumers, torch.exp2(exponents.float()))
    return model


def save_variants(source: Path, folder: Path, seed: int) -> dict[str, Path]:
    """A model as it is, with injected outlier channels, and with spread channels; the last two go below ``folder``."""
    found = {"plain": source}
    for name, change in (("injected", inject), ("spread", spread)):
        found[name] = folder / f"{name}-{seed}"
        change(LlamaForCausalLM.from_pretrained(source), seed=seed).save_pretrained(found[name])
    return found
