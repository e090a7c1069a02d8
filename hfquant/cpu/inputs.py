"""How the CPU kernels quantize the input of a layer: to integers that are multiplied exactly, or to any other grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..blocks import Blocks
from ..codebooks import FittedGrid
from ..errors import FormatError
from ..grids import FloatGrid, Grid, IntGrid, thresholds
from ..layouts import INPUT_NAMES
from ..spec import SCALE_DTYPES, InputSpec, PackedSpec, TensorSpec
from .types import TYPES, Input, hold

MOST_COLUMNS = 1 << 16  # products of two bytes that fit into 32 bits, added up
_MODERATE = 2.0**40  # sums of levels between its inverse and this stay far inside of float32
_INTEGER_BITS = 8  # behind the first one: of numbers up to 255, rounded to whole ones


def why_not_input(input: InputSpec) -> str | None:
    """Reason why inputs cannot be quantized like this, or None."""
    if isinstance(input.tensor.numbers(), FittedGrid):
        return f"looks numbers up in tables, those of {input.tensor.grid} would be fitted to each input"
    return None


def why_not_integers(spec: PackedSpec, input: InputSpec) -> str | None:
    """Reason why a layer is not computed as an exact product of integers, or None."""
    weight, seen = spec.scheme.weight, input.tensor
    if not all(isinstance(grid, IntGrid) and grid.is_signed for grid in (weight.numbers(), seen.numbers())):
        return f"multiplies signed integers, this layer {weight.grid} and {seen.grid}"
    if spec.layout not in ("bytes", "dense"):
        return f"reads integers in the layouts bytes and dense, the weight has {spec.layout!r}"
    if weight.blocks.sides(spec.shape) != (1, spec.shape[1]) or isinstance(weight.scale, TensorSpec):
        return "multiplies integers of weights with one scale for each row"
    if seen.zero or seen.blocks != (Blocks(1, -1) if input.dynamic else Blocks(-1, -1)):
        return "multiplies integers of inputs with one scale for each token, or for all, and no zero point"
    if input.dynamic and seen.scale != "float32":
        return f"has float32 scales for inputs, this layer rounds them to {seen.scale}"
    if spec.layout == "dense" and weight.numbers().bits != 4:
        return f"multiplies integers of 4 and 8 bits, the weight has {weight.numbers().bits}"
    if spec.shape[1] > MOST_COLUMNS:
        return f"adds up to {MOST_COLUMNS} products of integers in 32 bits, the weight has {spec.shape[1]} columns"
    return None


def describe_input(tensors: dict[str, Tensor], spec: PackedSpec, input: InputSpec) -> Input:
    """How the library quantizes the input of a layer; like a `Weight`, it holds addresses.

    Raises FormatError for a static range without a positive scale, for fewer outliers than there should be, and for
    columns that the weight does not have.
    """
    grid, seen = input.tensor.numbers(), Input()
    seen.low, seen.high = float(grid.levels()[0]), grid.top
    seen.split = math.inf if input.split is None else input.split
    seen.integers = why_not_integers(spec, input) is None
    order = _columns(tensors, "order", spec)
    _describe_outliers(seen, tensors, spec, order if seen.integers else None)
    if not input.dynamic:
        seen.scale = float(tensors[INPUT_NAMES[0]])
        if not seen.scale > 0:  # the library would take 0 for a range of each block's own
            raise FormatError(f"{INPUT_NAMES[0]} is {seen.scale}, a scale is above 0: the checkpoint is damaged")
    if seen.integers:
        return seen
    _describe_numbers(seen, grid)
    _describe_blocks(seen, tensors, input.tensor, spec.shape[1])
    if order is not None:
        seen.order = hold(seen, order, spec.shape[1], "columns in their order")
    return seen


def _describe_outliers(seen: Input, tensors: dict[str, Tensor], spec: PackedSpec, order: Tensor | None) -> None:
    """The columns that have weights of their own; `order`: that in which the library gets all of them, or None."""
    if not spec.outliers:
        return
    index, weight, count = _columns(tensors, "outlier_index", spec), tensors["outlier_weight"], spec.outliers
    assert index is not None
    if order is not None and index.numel() == count:
        places = torch.empty_like(order)
        places[order.long()] = torch.arange(order.numel(), dtype=order.dtype)
        index, sort = places[index.long()].sort()
        weight = weight[:, sort]
    seen.outlier_count = count
    seen.outliers = hold(seen, index, count, "outlier columns", order is None)
    seen.outlier_weight = hold(seen, weight, spec.shape[0] * count, "weights of outlier columns", order is None)
    seen.outlier_type = TYPES[weight.dtype]


def _columns(tensors: dict[str, Tensor], name: str, spec: PackedSpec) -> Tensor | None:
    """Numbers of columns, or None. Raises FormatError for those that the weight does not have."""
    found = tensors.get(name)
    if found is not None and found.numel() and not 0 <= int(found.min()) <= int(found.max()) < spec.shape[1]:
        raise FormatError(f"{name} names columns beyond the {spec.shape[1]} of the weight: the checkpoint is damaged")
    return found


def _describe_numbers(seen: Input, grid: Grid) -> None:
    """How numbers are rounded to a grid: by arithmetic on their bits where it can be done, otherwise by a table."""
    if isinstance(grid, IntGrid):
        seen.mantissa_bits, seen.normal = _INTEGER_BITS, 2.0**_INTEGER_BITS
    elif isinstance(grid, FloatGrid):
        seen.mantissa_bits, seen.normal = grid.m, 2.0 ** (1 - grid.exponent_bias)
    else:
        seen.level_count = grid.size
        seen.levels, seen.thresholds = hold(seen, grid.levels()), hold(seen, thresholds(grid))


def _describe_blocks(seen: Input, tensors: dict[str, Tensor], spec: TensorSpec, columns: int) -> None:
    """Who shares a scale, and in which form it is."""
    rows, width = spec.blocks.rows, spec.blocks.cols
    seen.height = rows if rows > 0 else torch.iinfo(torch.int32).max  # of any input that there is
    seen.width = max(1, columns if width < 0 else min(width, columns))
    assert isinstance(spec.scale, str)
    seen.scale_type, seen.zero = TYPES[SCALE_DTYPES[spec.scale]], spec.zero
    if spec.zero and INPUT_NAMES[1] in tensors:
        seen.zero_point = float(tensors[INPUT_NAMES[1]])
    seen.scale_last = _stands_apart(spec.numbers().levels())


def _stands_apart(levels: Tensor) -> bool:
    """Whether levels can be multiplied without their scale: bfloat16 has them all, and sums of them stay in range."""
    magnitudes = levels[levels != 0].abs()
    moderate = float(magnitudes.min()) >= 1 / _MODERATE and float(magnitudes.max()) <= _MODERATE
    return moderate and torch.equal(levels, levels.bfloat16().float())
