"""Triton kernels for layers that quantize their inputs: what they take, and why not. Triton is imported at first use."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from .cpu import LAYOUTS, why_not_int
from .kernel import Kernel
from .spec import PackedSpec

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST = (8, 0)  # compute capability; AMD GPUs report 9.0 and more


def why_not_gpu(spec: PackedSpec, dtype: torch.dtype, capability: tuple[int, int] | None) -> str | None:
    """Reason why none of these kernels can run a weight, or None."""
    if find_spec("triton") is None:
        return "needs Triton: pip install hfquant[triton]"
    if capability is not None and capability < OLDEST:
        return f"needs compute capability {OLDEST[0]}.{OLDEST[1]}, the GPU has {capability[0]}.{capability[1]}"
    if spec.scheme.input is None:
        return "is for layers that quantize their input"
    return None if dtype in DTYPES else f"takes float32, bfloat16 and float16 inputs, not {dtype}"


def why_not_int8(spec: PackedSpec, dtype: torch.dtype, capability: tuple[int, int] | None) -> str | None:
    """Reason why the int8 kernel cannot run a weight, or None: it takes what the CPU kernels multiply as integers."""
    if reason := why_not_gpu(spec, dtype, capability):
        return reason
    if spec.layout not in LAYOUTS:
        return f"reads layouts {' and '.join(LAYOUTS)}, the weight has {spec.layout!r}"
    assert spec.scheme.input is not None
    return why_not_int(spec, spec.scheme.input)


def run_int8(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: PackedSpec) -> Tensor:
    """y [..., N] = x [..., K] @ W^T + bias in the dtype of `x`, integers multiplied exactly."""
    from .kernels.triton import int8

    return int8.run(x, packed, bias, spec)


INT8 = Kernel("triton_int8", "*", "cuda", run_int8, why_not_int8, priority=20)
KERNELS = (INT8,)
