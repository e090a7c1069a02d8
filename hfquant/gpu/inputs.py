"""The Triton kernels of layers that quantize their inputs: what they take. They are imported when one is run."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from ..cpu.inputs import why_not_integers
from ..grids import FloatGrid, IntGrid
from ..kernel import Bound, Kernel
from ..spec import PackedSpec, TensorSpec
from .weight_only import DTYPES, LAYOUTS, why_not_here

SMALLEST_GROUP = 32  # columns that a matrix instruction adds up


def why_not_gpu(spec: PackedSpec, dtype: torch.dtype, capability: tuple[int, int] | None) -> str | None:
    """Reason why none of these kernels can run a weight, or None."""
    if reason := why_not_here(capability):
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
    if "order" in spec.names and spec.outliers:
        return "does not keep columns of inputs that are quantized in another order"
    assert spec.scheme.input is not None
    return why_not_integers(spec, spec.scheme.input)


def run_int8(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: PackedSpec) -> Tensor:
    """y [..., N] = x [..., K] @ W^T + bias in the dtype of `x`, integers multiplied exactly."""
    return bind_int8(packed, spec)(x, packed, bias)


def bind_int8(packed: list[Tensor], spec: PackedSpec) -> Bound:
    """The same for one weight: what does not depend on the input is done once."""
    bound: Bound = import_module("hfquant.kernels.triton.int8").bind(packed, spec)
    return bound


def why_not_levels(spec: PackedSpec, dtype: torch.dtype, capability: tuple[int, int] | None) -> str | None:
    """Reason why the kernel for levels cannot run a weight, or None."""
    if reason := why_not_gpu(spec, dtype, capability):
        return reason
    if spec.layout not in (*LAYOUTS, "float8"):
        return f"reads layouts {', '.join(LAYOUTS)} and float8, the weight has {spec.layout!r}"
    weight, given = spec.scheme.weight, spec.scheme.input
    assert given is not None
    seen = given.tensor
    if not all(isinstance(tensor.numbers(), IntGrid | FloatGrid) for tensor in (weight, seen)):
        return f"multiplies integers and floating-point numbers, this layer {weight.grid} and {seen.grid}"
    if weight.zero or seen.zero:
        return "multiplies numbers without zero points"
    if isinstance(weight.scale, TensorSpec) or (given.dynamic and seen.scale != "float32"):
        return "has float32 scales for inputs, and scales of weights that are not quantized themselves"
    if spec.outliers or given.split is not None:
        return "keeps no columns of inputs in floating point"
    if seen.blocks.rows not in (1, -1) or (seen.blocks.rows == -1 and seen.blocks.cols != -1):
        return "multiplies inputs with scales for tokens, groups of their columns, or all"
    groups = [blocks.sides(spec.shape)[1] for blocks in (weight.blocks, seen.blocks)]
    groups = [group for group in groups if group < spec.shape[1]]
    if any(group < SMALLEST_GROUP or group & (group - 1) for group in groups):
        return f"has scales for groups of {SMALLEST_GROUP} columns or a larger power of two, this layer {groups}"
    if "order" in spec.names and seen.blocks.sides(spec.shape)[1] < spec.shape[1]:
        return "does not quantize groups of columns that are stored in another order"
    return None


def run_levels(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: PackedSpec) -> Tensor:
    """y [..., N] = x [..., K] @ W^T + bias in the dtype of `x`, levels multiplied exactly, sums in float32."""
    return bind_levels(packed, spec)(x, packed, bias)


def bind_levels(packed: list[Tensor], spec: PackedSpec) -> Bound:
    """The same for one weight: what does not depend on the input is done once."""
    bound: Bound = import_module("hfquant.kernels.triton.levels").bind(packed, spec)
    return bound


INT8 = Kernel("triton_int8", "*", "cuda", run_int8, why_not_int8, priority=9, bind=bind_int8)
LEVELS = Kernel("triton_levels", "*", "cuda", run_levels, why_not_levels, priority=8, bind=bind_levels)
