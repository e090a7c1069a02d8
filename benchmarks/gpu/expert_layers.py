"""Packed experts, as mixture-of-experts models have them, next to the same in floating point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hfquant.experts import QExperts
from hfquant.gpu import experts as gpu_experts
from hfquant.swap import to_packed_experts

from .setting import Setting
from .weights import Format, random_packed

EXPERTS, TOP, HIDDEN, INNER = 6, 2, 128, 192
TOGETHER = "grouped"


def packed_experts(format: Format, device: torch.device, dtype: torch.dtype) -> QExperts:
    """Experts with random weights."""
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    with torch.device("meta"):
        module = MixtralExperts(config)
    experts = to_packed_experts(module, dtype)
    for projection, shape in (("gate_up_proj", (2 * INNER, HIDDEN)), ("down_proj", (HIDDEN, INNER))):
        made = [random_packed(shape, format, device, seed) for seed in range(EXPERTS)]
        stacked = {name: torch.stack([tensors[name] for tensors, _ in made]) for name in made[0][0]}
        experts.hold(projection, stacked, made[0][1])
        del experts._parameters[projection]
    return experts.eval()


@dataclass(frozen=True)
class Call:
    """One call: hidden states `x` [T, H], expert numbers `index` [T, k] and `weights` [T, k]."""

    experts: QExperts
    x: Tensor
    index: Tensor
    weights: Tensor

    @property
    def kernel(self) -> str:
        """Whether all experts run in one launch."""
        return TOGETHER if gpu_experts.can_run(self.experts.keys, self.x) else "one by one"

    def run(self) -> Tensor:
        """Weighted sum [T, H] over each token's experts."""
        out: Tensor = self.experts(self.x, self.index, self.weights)
        return out

    def exact(self) -> Tensor:
        """The same in float32, with dequantized weights."""
        gate_up, down = (self.experts.dequantize(name, torch.float32) for name in ("gate_up_proj", "down_proj"))
        out = torch.zeros_like(self.x, dtype=torch.float32)
        for token, (chosen, shares) in enumerate(zip(self.index.tolist(), self.weights.tolist(), strict=True)):
            for expert, share in zip(chosen, shares, strict=True):
                gate, up = (gate_up[expert] @ self.x[token].float()).chunk(2)
                out[token] += share * (down[expert] @ (self.experts.act_fn(gate) * up))
        return out


def call(setting: Setting, format: Format, dtype: torch.dtype, tokens: int) -> Call:
    """A random call in which one expert gets no token."""
    generator, device = torch.Generator().manual_seed(tokens), setting.device
    x = torch.randn(tokens, HIDDEN, generator=generator).to(device, dtype)
    index = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:TOP] for _ in range(tokens)]).to(device)
    weights = torch.rand(tokens, TOP, generator=generator).to(device, dtype)
    return Call(packed_experts(format, device, dtype), x, index, weights)
