"""Products with packed weights of any grid of 2 to 8 bits, read as they are stored."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codebooks import FittedGrid
from ..grids import grid as named
from ..kernel import Bound
from ..layouts import LAYOUTS
from ..packing import packed_width
from ..spec import PackedSpec, TensorSpec
from .inputs import describe_input, why_not_input
from .jobs import Direct
from .native import Library, library
from .types import TYPES, Weight, hold


def why_not(spec: PackedSpec, dtype: torch.dtype, capability: tuple[int, int] | None) -> str | None:
    """Reason why a weight cannot be run, or None."""
    if reason := why_not_layout(spec):
        return reason
    if dtype not in TYPES:
        return f"takes float32, bfloat16 and float16 inputs, not {dtype}"
    if spec.scheme.input is not None and (reason := why_not_input(spec.scheme.input)):
        return reason
    inner = spec.scheme.weight.scale
    if isinstance(inner, TensorSpec) and isinstance(inner.scale, TensorSpec):
        return "reads scales that are quantized once, not twice"
    found = library()
    return found if isinstance(found, str) else None


def why_not_layout(spec: PackedSpec) -> str | None:
    """Reason why stored codes cannot be read, or None."""
    if spec.layout in ("bytes", "dense"):
        return None
    found = LAYOUTS.get(spec.layout) if spec.layout in LAYOUTS else None
    fitted = isinstance(spec.scheme.weight.numbers(), FittedGrid)
    if found is None or fitted or found.levels_of_bytes(spec.scheme.weight.numbers()) is None:
        return f"reads layout 'dense', and those with a code in each byte, layout {spec.layout!r} is neither"
    return None


def run(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: PackedSpec) -> Tensor:
    """y [..., N] = x [..., K] @ W^T + bias in the dtype of `x`."""
    return bind(packed, spec)(x, packed, bias)


def bind(packed: list[Tensor], spec: PackedSpec) -> Bound:
    """The same for one weight: what does not depend on the input is done once."""
    tensors = dict(zip(spec.names, packed, strict=True))
    found = library()
    assert isinstance(found, Library)
    seen = None if spec.scheme.input is None else describe_input(tensors, spec, spec.scheme.input)
    # Blocks of an input are those of its own columns: where there may be some, the library brings them into order.
    reordered = "order" in tensors and (seen is None or seen.integers)
    order = spec.names.index("order") if reordered else None
    direct = Direct(found, describe(tensors, spec), seen)
    if order is None and (seen.integers if seen is not None else not spec.outliers):
        return direct

    def linear(x: Tensor, packed: list[Tensor], bias: Tensor | None) -> Tensor:
        if order is not None:
            x = x.index_select(-1, packed[order])
        return direct(x, packed, bias)

    if seen is not None or not spec.outliers:
        return linear
    columns, kept = spec.names.index("outlier_index"), spec.names.index("outlier_weight")

    def linear_and_outliers(x: Tensor, packed: list[Tensor], bias: Tensor | None) -> Tensor:
        # The codes of these columns stand for something else: they take part in floating point only.
        index = packed[columns].long()
        apart = F.linear(x.index_select(-1, index), packed[kept].to(x.dtype))
        return linear(x.index_fill(-1, index, 0), packed, bias) + apart

    return linear_and_outliers


def describe(tensors: dict[str, Tensor], spec: PackedSpec) -> Weight:
    """The weight as the library sees it; it holds addresses, so the tensors must outlive it.

    Raises FormatError if there are fewer codes or scales than the shape needs: the library reads what it is told to.
    """
    weight = Weight.from_buffer_copy(_frame(spec))
    weight.codes = hold(weight, tensors["codes"], spec.shape[0] * weight.row_bytes, "codes")
    table = tensors.get("levels")
    if table is not None:
        table = F.pad(table, (0, max(0, 256 - table.numel())))  # a fitted one, with as many entries as there are bytes
    weight.levels = hold(weight, levels_of(spec.scheme.weight.grid, spec.layout) if table is None else table)
    counts = spec.scheme.weight.blocks.counts(spec.shape)
    if "zero" in tensors:
        _describe_zeros(weight, tensors["zero"], counts)
    inner = spec.scheme.weight.scale
    if isinstance(inner, TensorSpec):
        row = (1, counts[0] * counts[1])
        outer = inner.blocks.counts(row)
        weight.scale_codes = hold(weight, tensors["scale_codes"], row[1], "scales")
        weight.scale_levels = hold(weight, levels_of(inner.grid))
        factors = tensors["scale_scale"]
        weight.scale_scale = hold(
            weight, factors.float(), outer[1] if factors.dtype == torch.float32 else 0, "scales of scales"
        )
    else:
        weight.scale = hold(weight, tensors["scale"], counts[0] * counts[1], "scales")
        weight.scale_type = TYPES[tensors["scale"].dtype]
    return weight


def _describe_zeros(weight: Weight, zero: Tensor, counts: tuple[int, int]) -> None:
    """Zero points of R x C blocks: real ones, which their dtype tells, or whole ones in the bits of a code."""
    width = packed_width(counts[1], weight.zero_bits)
    if zero.dtype in TYPES:
        weight.zero_bits, weight.zero_type, width = 8 * zero.element_size(), TYPES[zero.dtype], counts[1]
    weight.zero = hold(weight, zero, counts[0] * width, "zero points")


@lru_cache(maxsize=4096)
def _frame(spec: PackedSpec) -> bytes:
    """What does not depend on tensors."""
    rows, columns = spec.scheme.weight.blocks.sides(spec.shape)
    weight = Weight(n=spec.shape[0], k=spec.shape[1], group=columns, scale_height=rows)
    weight.zero_bits = spec.scheme.weight.numbers().bits
    weight.bits = weight.zero_bits if spec.layout == "dense" else 8
    weight.row_bytes = packed_width(spec.shape[1], weight.bits)
    inner = spec.scheme.weight.scale
    if isinstance(inner, TensorSpec):
        counts = spec.scheme.weight.blocks.counts(spec.shape)
        weight.scale_group = inner.blocks.sides((1, counts[0] * counts[1]))[1]
    return bytes(weight)


@lru_cache(maxsize=256)
def levels_of(grid: str, layout: str = "bytes") -> Tensor:
    """Level of every byte [256] float32, or of every code of layout "dense"."""
    table = LAYOUTS.get("bytes" if layout == "dense" else layout).levels_of_bytes(named(grid))
    assert table is not None
    return table
