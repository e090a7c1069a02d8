"""The `torch.library` operators that all compute goes through: schema, fake and autograd, once for every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .hadamard import inverse_hadamard
from .kernel import columns_of, run_input_grad, run_linear
from .layouts import LAYOUTS, unpack
from .spec import PackedSpec

_LIBRARY = torch.library.Library("hfquant", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor[] packed, Tensor? bias, str spec) -> Tensor")
_LIBRARY.define("input_grad(Tensor grad, Tensor[] packed, str spec) -> Tensor")
_LIBRARY.define("dequantize(Tensor[] packed, str spec, ScalarType dtype) -> Tensor")
_LIBRARY.define("embedding(Tensor ids, Tensor[] packed, str spec, ScalarType dtype) -> Tensor")


def _linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    return run_linear(x, packed, bias, spec)


def _linear_fake(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], PackedSpec.parse(spec).shape[0])


def _input_grad(grad: Tensor, packed: list[Tensor], spec: str) -> Tensor:
    return run_input_grad(grad, packed, spec)


def _input_grad_fake(grad: Tensor, packed: list[Tensor], spec: str) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], PackedSpec.parse(spec).shape[1])


def _dequantize(packed: list[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    columns = columns_of(spec, packed[0].device, dtype)
    if columns is not None:
        parsed = PackedSpec.parse(spec)
        return columns(packed, parsed, dtype, 0, parsed.shape[1])
    return unpack(packed, PackedSpec.parse(spec)).dequantize(dtype)


def _dequantize_fake(packed: list[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    return packed[0].new_empty(PackedSpec.parse(spec).shape, dtype=dtype)


def _embedding(ids: Tensor, packed: list[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    parsed = PackedSpec.parse(spec)
    index = ids.flatten()
    index = torch.where(index < 0, parsed.shape[0], index)  # indexing would count from the end: make it fail instead
    tensors = dict(zip(parsed.names, packed, strict=True))
    rows = LAYOUTS.get(parsed.layout).rows(tensors, index, parsed.shape, parsed.scheme.weight)
    rows = inverse_hadamard(rows) if parsed.rotated else rows
    return rows.to(dtype).reshape(*ids.shape, parsed.shape[1])


def _embedding_fake(ids: Tensor, packed: list[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    return packed[0].new_empty(*ids.shape, PackedSpec.parse(spec).shape[1], dtype=dtype)


_BODIES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "linear": (_linear, _linear_fake),
    "input_grad": (_input_grad, _input_grad_fake),
    "dequantize": (_dequantize, _dequantize_fake),
    "embedding": (_embedding, _embedding_fake),
}
for _name, (_body, _fake) in _BODIES.items():
    _LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hfquant::{_name}", _fake, lib=_LIBRARY)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, bias, spec = inputs
    ctx.save_for_backward(*packed)
    ctx.spec, ctx.count = spec, len(packed)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of the input, through the frozen weight, and of the bias; packed tensors are never trained."""
    needs_input, _, needs_bias, _ = ctx.needs_input_grad
    grad_x = torch.ops.hfquant.input_grad(grad, list(ctx.saved_tensors), ctx.spec) if needs_input else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if needs_bias else None
    return grad_x, [None] * ctx.count, grad_bias, None


torch.library.register_autograd("hfquant::linear", _backward, setup_context=_save_for_backward, lib=_LIBRARY)


def linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    """y [..., N] of x [..., K] through a packed weight; differentiable in `x` and `bias`.

    Computes in the dtype of `x`, or under autocast in its dtype, as a dense layer does.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return torch.ops.hfquant.linear(x, packed, bias, spec)


def dequantize(packed: list[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] of a packed weight."""
    return torch.ops.hfquant.dequantize(packed, spec, dtype)


def embedding(ids: Tensor, packed: list[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    """Rows [..., K] of a packed matrix; only these rows are dequantized."""
    return torch.ops.hfquant.embedding(ids, packed, spec, dtype)
