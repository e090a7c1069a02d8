"""The Triton kernels of layers that quantize their inputs: what they take. They are imported when one is run."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from .cpu import why_not_int
from .gpu import DTYPES, LAYOUTS, OLDEST, missing
from .kernel import Kernel
from .spec import PackedSpec


def why_not_gpu(spec: PackedSpec, dtype: torch.dtype, capability: tuple[int, int] | None) -> str | None:
    """Reason why none of these kernels can run a weight, or None."""
    if capability is not None and capability < OLDEST:
        return f"needs compute capability {OLDEST[0]}.{OLDEST[1]}, this GPU has {capability[0]}.{capability[1]}"
    if reason := missing():
        return reason
    if spec.scheme.input is None:
        return "multiplies quantized inputs, this layer does not quantize its input"
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
    y: Tensor = import_module("hfquant.kernels.triton.int8").run(x, packed, bias, spec)
    return y


INT8 = Kernel("triton_int8", "*", "cuda", run_int8, why_not_int8, priority=20)
KERNELS = (INT8,)
