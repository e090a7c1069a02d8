"""Packed experts on a GPU: a projection of all experts of a call in one launch, with nothing read back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..binding import is_plain
from ..kernel import choose, forced_kernel
from ..spec import PackedSpec
from . import weight_only


@lru_cache(maxsize=1)
def kernels() -> Any:
    """The module with the kernels."""
    return import_module("hfquant.kernels.triton.grouped")


def can_run(keys: Mapping[str, str], x: Tensor) -> bool:
    """Whether projections, by the keys of their weights, can be run for an input [T, H] at this point."""
    return x.device.type == "cuda" and x.shape[0] > 0 and is_plain(x) and fits(keys, x.device, x.dtype)


def fits(keys: Mapping[str, str], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all weights would run one by one on the Triton kernel, and this one takes them, too."""
    forced = forced_kernel()
    if device.type != "cuda" or forced not in (None, weight_only.KERNEL.name):
        return False
    chosen = all(choose(key, device, dtype, forced) is weight_only.KERNEL for key in keys.values())
    return chosen and all(kernels().why_not(PackedSpec.parse(key)) is None for key in keys.values())


def forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum [T, H] over each token's experts, as `RoutedExperts.forward`, for a `QExperts`."""
    grouped = kernels()
    plan = grouped.routing(top_k_index, experts.num_experts, hidden_states.dtype)

    def project(projection: str, x: Tensor) -> Tensor:
        top = (
            0 if projection == "down_proj" else top_k_index.shape[1]
        )  # experts of each row; 0: a row for each, in order
        spec = experts.specs[projection]
        tensors = {name: experts._parameters[f"{projection}_{name}"].detach() for name in spec.names}
        bias = getattr(experts, f"{projection}_bias") if experts.has_bias else None
        y: Tensor = grouped.project(x, tensors, bias, spec, plan, top)
        return y

    y = experts.mlp(hidden_states, project)
    out: Tensor = grouped.combine(y, plan, top_k_index, top_k_weights, experts.num_experts)
    return out
