"""Attention that reads a quantized KV cache as it is stored: `model.set_attn_implementation("hfquant_kv")`.

Between a cache and attention, models pass keys and values as tensors. Here these are stand-ins: of the right shape, NaN
everywhere, without memory, and with the states behind them. Whoever else reads them sees that they are no numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .attention import CHANGING
from .gpu import kv as gpu
from .kv_states import States

IMPLEMENTATION = "hfquant_kv"  # name among transformers' attention implementations
_HELD = "_hfquant_states"


def stand_ins(key: States, value: States) -> tuple[Tensor, Tensor]:
    """What a cache gives to `attend`: the numbers themselves while nothing is quantized."""
    if key.packed is None and value.packed is None:
        return key.read(), value.read()
    return _stand_in(key), _stand_in(value)


def _stand_in(states: States) -> Tensor:
    tail = states.tail
    shape = (*tail.shape[:2], states.tokens, tail.shape[3])
    found = torch.full((1, 1, 1, 1), torch.nan, dtype=tail.dtype, device=tail.device).expand(shape)
    setattr(found, _HELD, states)
    return found


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention for transformers' attention interface, over packed tokens by a kernel.

    `query` [B, H, L, D], `key`, `value` [B, H', T, D] with H a multiple of H', `attention_mask` [B, 1, L, T] bool or
    None. Returns the output [B, L, H, D]. What no kernel takes is dequantized and left to `sdpa`.
    """
    keys, values = getattr(key, _HELD, None), getattr(value, _HELD, None)
    if keys is not None and values is not None:
        reason = why_not(query, keys, values, attention_mask, dropout, kwargs)
        if reason is None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return gpu.attend(query, _side(keys), _side(values), attention_mask, scale), None
        gpu.report(query.device, "read by attention as they are stored", reason)
        key, value = keys.read(), values.read()
    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out


def why_not(
    query: Tensor, keys: States, values: States, mask: Tensor | None, dropout: float, given: dict[str, Any]
) -> str | None:
    """Reason why the kernel cannot attend to these states, or None."""
    if keys.packed is None or values.packed is None or keys.packed.tokens != values.packed.tokens:
        return "reads keys and values that are both quantized"
    if unknown := [name for name in CHANGING if given.get(name) is not None]:
        return f"has no {unknown[0]}"
    if dropout:
        return "has no dropout"
    if query.shape[2] > 1 and mask is None:
        return "takes several queries with a mask only"
    heads = query.shape[1] // keys.tail.shape[1]
    return gpu.why_not_attend(query, heads, keys.packed.spec, values.packed.spec, values.packed.width, mask)


def _side(states: States) -> gpu.Side:
    assert states.packed is not None
    return states.packed.spec, states.packed.tensors, states.tail


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
