"""The Triton kernels: weights of any grid, read as they are stored, times floating-point inputs on a GPU.

Triton and the kernels are imported when the first layer asks for them. AMD's GPUs are "cuda" devices to torch, too.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..kernel import Bound, Kernel
from ..optional_packages import is_installed
from ..spec import PackedSpec, TensorSpec

LAYOUTS = ("bytes", "dense")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST = (8, 0)  # the first with matrix instructions for bfloat16


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why there are no Triton kernels here, or None."""
    if not is_installed("triton"):
        return "triton is not installed: pip install hfquant[triton]"
    try:
        launcher()
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install --upgrade hfquant[triton]"
    return None


@lru_cache(maxsize=1)
def launcher() -> Any:
    """The module that launches the kernels."""
    return import_module("hfquant.kernels.triton.launch")


def why_not_here(capability: tuple[int, int] | None) -> str | None:
    """Reason why no Triton kernel runs on a GPU of this capability, or with what is installed, or None."""
    if capability is not None and capability < OLDEST:
        return f"needs compute capability {OLDEST[0]}.{OLDEST[1]}, this GPU has {capability[0]}.{capability[1]}"
    return missing()


def why_not(spec: PackedSpec, dtype: torch.dtype, capability: tuple[int, int] | None) -> str | None:
    """Reason why a weight cannot be run, or None."""
    if spec.layout not in LAYOUTS:
        return f"reads layouts {' and '.join(LAYOUTS)}, the weight has {spec.layout!r}"
    if dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16 inputs, not {dtype}"
    if spec.scheme.input is not None:
        return "multiplies floating-point inputs, this layer quantizes its input"
    inner = spec.scheme.weight.scale
    if isinstance(inner, TensorSpec) and isinstance(inner.scale, TensorSpec):
        return "reads scales that are quantized once, not twice"
    if isinstance(spec.scheme.weight.zero, str) and dtype == torch.float16:
        return "real zero points may lie beyond float16 numbers: use bfloat16 inputs"
    if reason := why_not_here(capability):
        return reason
    if not launcher().fits(spec.scheme.weight.numbers(), dtype):
        return f"the levels of {spec.scheme.weight.grid} do not fit into float16 numbers: use bfloat16 inputs"
    return None


def run(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: PackedSpec) -> Tensor:
    """y [..., N] = x [..., K] @ W^T + bias in the dtype of `x`."""
    return bind(packed, spec)(x, packed, bias)


def bind(packed: list[Tensor], spec: PackedSpec) -> Bound:
    """The same for one weight: what does not depend on the input is done once."""
    return launcher().bind(packed, spec)


def input_grad(grad: Tensor, packed: list[Tensor], spec: PackedSpec) -> Tensor:
    """Gradient [..., K] of the input: grad [..., N] @ W in the dtype of `grad`."""
    return launcher().gradient(grad, packed, spec)


def columns(packed: list[Tensor], spec: PackedSpec, dtype: torch.dtype, first: int, last: int) -> Tensor:
    """Columns [N, last - first] of the matrix of a weight, bit for bit as `QTensor.dequantize` gives them."""
    out: Tensor = import_module("hfquant.kernels.triton.dequantize").columns(packed, spec, dtype, first, last)
    return out


KERNEL = Kernel("triton", "*", "cuda", run, why_not, priority=10, bind=bind, columns=columns, input_grad=input_grad)
