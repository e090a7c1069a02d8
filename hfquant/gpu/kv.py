"""The Triton kernels of a quantized KV cache: what they take. They are imported when one is run."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor

from ..binding import is_plain
from ..errors import UnsupportedError
from ..kernel import forced_kernel
from ..spec import TensorSpec
from .weight_only import DTYPES, KERNEL, launcher, why_not_here

logger = logging.getLogger(__name__)

WIDEST = 256  # channels of a head
ROWS = 64  # queries that read the same keys: those of a group of heads
TOKENS = (1, 16, 32, 64, 128)  # in a block

Side = tuple[TensorSpec, dict[str, Tensor], Tensor]
"""Keys or values: their numbers, packed tensors, and the tail [B, H, t, D] in full precision."""


def why_not_blocks(spec: TensorSpec, width: int) -> str | None:
    """Reason why the kernels do not know the blocks of tokens with `width` channels, or None."""
    rows, columns = spec.blocks.rows, spec.blocks.sides((1, width))[1]
    if rows not in TOKENS or (rows == 1) == (columns == 1):
        return f"has scales for channels of {', '.join(map(str, TOKENS[1:]))} tokens, or for channels of each token"
    if rows == 1 and columns < width and (columns % 8 or columns & (columns - 1)):
        return f"has groups of 8 channels or a larger power of two, here of {columns}"
    return None if width <= WIDEST else f"takes heads with up to {WIDEST} channels, here {width}"


def why_not_here_now(x: Tensor) -> str | None:
    """Reason why no kernel runs on a tensor at this point, or None."""
    if x.device.type != "cuda":
        return f"is for GPUs, the cache is on {x.device.type}"
    if forced_kernel() not in (None, KERNEL.name):
        return f"kernel {forced_kernel()!r} was asked for"
    if x.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, not {x.dtype}"
    if not is_plain(x.detach()):
        return "does not run under a compiler or a mode that follows operators"
    return why_not_here(torch.cuda.get_device_capability(x.device))


def why_not_quantize(x: Tensor, spec: TensorSpec) -> str | None:
    """Reason why tokens [B, H, T, D] are not quantized by a kernel, or None."""
    return why_not_here_now(x) or why_not_blocks(spec, x.shape[-1])


def quantize(x: Tensor, spec: TensorSpec) -> dict[str, Tensor]:
    """Tokens [B, H, T, D] as packed tensors, bit for bit as `kv_states.quantized` gives them."""
    found: dict[str, Tensor] = import_module("hfquant.kernels.triton.kv_quantize").quantize(x.detach(), spec)
    return found


def why_not_attend(
    query: Tensor, heads: int, keys: TensorSpec, values: TensorSpec, width: int, mask: Tensor | None
) -> str | None:
    """Reason why no kernel attends with queries [B, H, L, D], `heads` of which share keys, or None.

    `keys` and `values` are the numbers of packed tokens, `width` the channels of a value.
    """
    if reason := why_not_here_now(query):
        return reason
    if query.requires_grad and torch.is_grad_enabled():
        return "has no gradients"
    if mask is not None and mask.dtype != torch.bool:
        return f"takes boolean masks, not {mask.dtype}"
    if heads * query.shape[2] > ROWS:
        return f"takes up to {ROWS} queries for the same keys, here {heads * query.shape[2]}"
    return why_not_numbers(keys, query.shape[-1], query.dtype) or why_not_numbers(values, width, query.dtype)


def why_not_numbers(spec: TensorSpec, width: int, dtype: torch.dtype) -> str | None:
    """Reason why a kernel does not read packed tokens of `width` channels in products of a dtype, or None."""
    if reason := why_not_blocks(spec, width):
        return reason
    fits = launcher().fits(spec.numbers(), dtype)
    return None if fits else f"the levels of {spec.grid} do not fit into float16 numbers: use bfloat16"


def attend(query: Tensor, keys: Side, values: Side, mask: Tensor | None, scale: float) -> Tensor:
    """Attention [B, L, H, D'] of queries [B, H, L, D] to packed tokens and the tails behind them.

    `mask` [B or 1, H or 1, L, T] bool: whether a query sees a token. One that sees none gets 0.
    """
    found: Tensor = import_module("hfquant.kernels.triton.kv_attention").attend(query, keys, values, mask, scale)
    return found


def report(device: torch.device, what: str, reason: str) -> None:
    """Say once why a GPU does without its kernels; an error under HFQUANT_STRICT=1."""
    if device.type != "cuda":
        return
    if os.environ.get("HFQUANT_STRICT") == "1":
        raise UnsupportedError(f"HFQUANT_STRICT=1 and keys and values are not {what} by a kernel", [reason])
    _log_once(what, reason)


@lru_cache(maxsize=256)
def _log_once(what: str, reason: str) -> None:
    logger.warning("keys and values of the cache are not %s by a kernel: it %s", what, reason)
