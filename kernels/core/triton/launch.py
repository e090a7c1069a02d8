"""From a packed weight to launches of `weight_only.linear`: what does not depend on the input is found out once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from hfquant.errors import FormatError
from hfquant.grids import FloatGrid, Grid, IntGrid
from hfquant.grids import grid as named
from hfquant.packing import packed_width
from hfquant.spec import PackedSpec, TensorSpec

from .blocks import Tile, grad_tile_for, tile_for
from .weight_only import add_splits, input_grad, linear

Bound = Callable[[Tensor, list[Tensor], Tensor | None], Tensor]
CODES = 256  # entries of a lookup table: what a byte can hold, so that damaged codes stay inside
REDUCED = 1024  # sums that one program adds up


@dataclass(frozen=True)
class Hardware:
    """What tiles depend on: `architecture` ("sm_90", "gfx942") and the number of multiprocessors."""

    architecture: str
    processors: int


@lru_cache(maxsize=64)
def hardware(device: torch.device) -> Hardware:
    """What a device is."""
    if device.type != "cuda":
        return Hardware("none", 4)
    found = torch.cuda.get_device_properties(device)
    rocm = getattr(found, "gcnArchName", "").partition(":")[0] if torch.version.hip else ""
    return Hardware(rocm or f"sm_{found.major}{found.minor}", found.multi_processor_count)


@dataclass(frozen=True)
class Decoding:
    """How the codes of a grid become numbers of a dtype: constants of the kernels in `decode`."""

    kind: str
    zero: int = 0
    mantissa: int = 0
    factor: float = 1.0
    level: float = 1.0


@lru_cache(maxsize=1024)
def decoding(name: str, dtype: torch.dtype) -> Decoding:
    """The fastest way for a grid. Levels are divided by `level`, a power of two, where float16 needs that."""
    grid = named(name)
    if isinstance(grid, IntGrid):
        return Decoding("integer", zero=grid.zero_code)
    if hasattr(grid, "fit"):
        return Decoding("table")
    level = 2.0 ** shift(grid, dtype)
    if isinstance(grid, FloatGrid):
        factor = 127 - grid.exponent_bias - shift(grid, dtype)
        if -126 <= factor <= 127:
            return Decoding("float", grid.zero_code, grid.m, 2.0**factor, level)
    return Decoding("table", level=level)


def shift(grid: Grid, dtype: torch.dtype) -> int:
    """0, or where float16 does not hold the levels the power of two that brings the largest just below its end."""
    if dtype != torch.float16 or keeps(grid.levels()):
        return 0
    return int(torch.frexp(grid.levels().abs().max()).exponent) - 15


def keeps(levels: Tensor) -> bool:
    """Whether float16 holds numbers as precisely as it can."""
    limits = torch.finfo(torch.float16)
    normal = (levels.abs() >= limits.smallest_normal) & (levels.abs() <= limits.max)
    return bool((normal | (levels.half().float() == levels)).all())


def fits(grid: Grid, dtype: torch.dtype) -> bool:
    """Whether there is a power of two that makes the levels of a grid fit into a dtype."""
    if dtype != torch.float16 or isinstance(grid, IntGrid) or hasattr(grid, "fit"):
        return True
    return keeps(grid.levels() / 2.0 ** shift(grid, dtype))


@lru_cache(maxsize=1024)
def table_of(name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Level of every byte [256]; codes that the grid does not have stand for 0."""
    return padded(named(name).levels() / decoding(name, dtype).level, dtype).to(device)


@lru_cache(maxsize=1024)
def bytes_of(name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The levels of a grid of 4 bits as `bytes_apart` gives them."""
    return bytes_apart(table_of(name, dtype, device))


def bytes_apart(table: Tensor) -> Tensor:
    """The first 16 entries of a table in 16 bit as `decode.levels_of_words` reads them: [8] int32."""
    return table[:16].view(torch.uint8).reshape(16, 2).T.contiguous().view(torch.int32).flatten()


def padded(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """A table with as many entries as a byte has values."""
    table = torch.zeros(CODES, dtype=dtype, device=levels.device)
    table[: levels.numel()] = levels.to(dtype)
    return table


@dataclass(frozen=True)
class Shape:
    """What does not depend on tensors: the arguments of the kernel that describe the weight."""

    bits: int
    row_bytes: int
    zero_bits: int
    zero_bytes: int
    height: int
    group: int
    counts: tuple[int, int]
    scale_group: int


@lru_cache(maxsize=4096)
def shape_of(spec: PackedSpec) -> Shape:
    """The arguments for a weight."""
    weight = spec.scheme.weight
    height, group = weight.blocks.sides(spec.shape)
    counts = weight.blocks.counts(spec.shape)
    zero_bits = weight.numbers().bits
    bits = zero_bits if spec.layout == "dense" else 8
    inner = weight.scale
    scale_group = inner.blocks.sides((1, counts[0] * counts[1]))[1] if isinstance(inner, TensorSpec) else 1
    zero_bytes = packed_width(counts[1], zero_bits)
    return Shape(bits, packed_width(spec.shape[1], bits), zero_bits, zero_bytes, height, group, counts, scale_group)


def bind(packed: list[Tensor], spec: PackedSpec) -> Bound:
    """(x, packed, bias) -> y for one weight. Raises FormatError if there are fewer codes or scales than it needs."""
    check(dict(zip(spec.names, packed, strict=True)), spec)
    fitted: dict[torch.dtype, Tensor] = {}

    def run(x: Tensor, packed: list[Tensor], bias: Tensor | None) -> Tensor:
        tensors = dict(zip(spec.names, packed, strict=True))
        if "levels" in tensors and x.dtype not in fitted:
            fitted[x.dtype] = padded(tensors["levels"], x.dtype)
        apart = None
        if spec.outliers:  # the codes of these columns stand for something else: they take part in floating point only
            index = tensors["outlier_index"].long()
            apart = x.index_select(-1, index) @ tensors["outlier_weight"].to(x.dtype).T
            x = x.index_fill(-1, index, 0)
        if "order" in tensors:
            x = x.index_select(-1, tensors["order"])
        y = product(x, tensors, fitted.get(x.dtype), bias, spec)
        return y if apart is None else y + apart

    return run


def gradient(grad: Tensor, packed: list[Tensor], spec: PackedSpec) -> Tensor:
    """Gradient [..., K] of the input, `grad` [..., N] @ W, of a weight that is not rotated. Raises like `bind`."""
    tensors = dict(zip(spec.names, packed, strict=True))
    check(tensors, spec)
    table = padded(tensors["levels"], grad.dtype) if "levels" in tensors else None
    out = product_with_weight(grad, tensors, table, spec)
    if "order" in tensors:
        out = torch.empty_like(out).index_copy_(-1, tensors["order"].long(), out)
    if spec.outliers:
        apart = grad @ tensors["outlier_weight"].to(grad.dtype)
        out.index_copy_(-1, tensors["outlier_index"].long(), apart)
    return out


def check(tensors: dict[str, Tensor], spec: PackedSpec) -> None:
    """Raises FormatError if a tensor is too short: a kernel reads what it is told to."""
    shape, count = shape_of(spec), spec.shape[0]
    blocks = shape.counts[0] * shape.counts[1]
    needed = {"codes": count * shape.row_bytes, "zero": shape.counts[0] * shape.zero_bytes, "order": spec.shape[1]}
    inner = spec.scheme.weight.scale
    if isinstance(inner, TensorSpec):
        needed |= {"scale_codes": blocks, "scale_scale": -(-blocks // shape.scale_group)}
    else:
        needed["scale"] = blocks
    check_lengths(tensors, needed)


def check_lengths(tensors: dict[str, Tensor], needed: dict[str, int]) -> None:
    """Raises FormatError if a tensor has fewer numbers than are needed of it."""
    for name, least in needed.items():
        if name in tensors and tensors[name].numel() < least:
            found = tensors[name].numel()
            raise FormatError(f"a packed weight needs {least} {name}, found {found}: the checkpoint is damaged")


def permutes(architecture: str) -> bool:
    """Whether a GPU looks bytes up in registers by the instruction that `decode.permuted` is."""
    return architecture.startswith("sm_")


@dataclass(frozen=True)
class Weight:
    """A weight as the kernels take it: arguments that all of them have, and what tiles depend on."""

    arguments: dict[str, Any]
    shape: Shape
    words: bool

    @property
    def is_gathered(self) -> bool:
        """Whether codes are read one by one, or scales differ inside of any tile."""
        return not (self.words or self.shape.bits == 8) or columns_of(16, self.shape)[1]


def weight_of(tensors: dict[str, Tensor], table: Tensor | None, spec: PackedSpec, like: Tensor) -> Weight:
    """The arguments for operands of the dtype and on the device of `like`."""
    shape, weight = shape_of(spec), spec.scheme.weight
    how = decoding(weight.grid, like.dtype)
    codes, row_stride = tensors["codes"].contiguous(), shape.row_bytes
    four = words_of(codes, row_stride) if shape.bits == 4 and spec.shape[1] % 8 == 0 else None
    if four is not None:
        codes, row_stride = four, row_stride // 4
        if how.kind != "integer" and like.element_size() == 2 and permutes(hardware(like.device).architecture):
            how = replace(how, kind="permute")
    if how.kind == "permute":
        table = bytes_of(weight.grid, like.dtype, like.device) if table is None else bytes_apart(table)
    elif how.kind == "table" and table is None:
        table = table_of(weight.grid, like.dtype, like.device)
    zero = tensors["zero"].contiguous() if "zero" in tensors else None
    arguments = {"codes": codes, "table": table, "zero": zero, "scale_levels": None, "scale_factors": None}
    if isinstance(weight.scale, TensorSpec):
        arguments["scale"] = tensors["scale_codes"].contiguous()
        arguments["scale_levels"] = table_of(weight.scale.grid, torch.float32, like.device)
        arguments["scale_factors"] = tensors["scale_scale"].contiguous()
    else:
        arguments["scale"] = tensors["scale"].contiguous()
    arguments |= dict(  # noqa: C408
        N=spec.shape[0], K=spec.shape[1], row_stride=row_stride, zero_stride=shape.zero_bytes,
        scale_stride=shape.counts[1], height=shape.height, scale_group=shape.scale_group,
        BITS=shape.bits, WORDS=four is not None, KIND=how.kind, ZERO=how.zero, MANTISSA=how.mantissa, FACTOR=how.factor,
        LEVEL=how.level, GROUP=shape.group, ZERO_BITS=shape.zero_bits, enable_fp_fusion=True,
    )  # fmt: skip
    return Weight(arguments, shape, four is not None)


def words_of(codes: Tensor, row_bytes: int) -> Tensor | None:
    """The bytes of `codes`, which have no gaps, four at once: int32 in one dimension. None if rows do not allow it."""
    if row_bytes % 4 or codes.data_ptr() % 4:
        return None
    # A single row may have any stride and still no gaps, but not be viewed as another type.
    return codes.reshape(-1).view(torch.int32)


def rows_of(x: Tensor, spec: PackedSpec, axis: int) -> Tensor:
    """`x` [..., L] as a matrix whose rows have no gaps; L is that axis of the weight. Raises RuntimeError, as torch."""
    if x.shape[-1] != spec.shape[axis]:
        raise RuntimeError(f"a weight of {spec.shape[0]} x {spec.shape[1]} cannot take a tensor {tuple(x.shape)}")
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def product(
    x: Tensor, tensors: dict[str, Tensor], table: Tensor | None, bias: Tensor | None, spec: PackedSpec
) -> Tensor:
    """y [..., N] of `x` [..., K] in the stored order of columns; `table` holds the levels of a fitted grid."""
    (n, k), rows, found = spec.shape, rows_of(x, spec, 1), hardware(x.device)
    m = rows.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m:
        weight = weight_of(tensors, table, spec, x)
        tile = tile_for(found.architecture, m, x.dtype == torch.float32, weight.is_gathered)
        columns, inside = columns_of(tile.bk, weight.shape)
        splits, each = split(tile, columns, m, n, k, found.processors)
        partial = torch.empty(splits, m, n, dtype=torch.float32, device=x.device) if splits > 1 else out
        with on(x.device):
            linear[(triton.cdiv(n, tile.bn) * triton.cdiv(m, tile.bm), splits)](
                rows, bias=bias, out=partial, M=m, x_stride=rows.stride(0), split_steps=each, **weight.arguments,
                ONE_GROUP=weight.shape.counts[1] == 1, INSIDE=inside, EVEN=k % columns == 0, SPLIT=splits,
                BM=tile.bm, BN=tile.bn, BK=columns, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            if splits > 1:
                size = m * n
                add_splits[(triton.cdiv(size, REDUCED),)](
                    partial, bias, out, size, n, SPLIT=splits, BLOCK=REDUCED, enable_fp_fusion=True
                )
    return out.reshape(*x.shape[:-1], n)


def product_with_weight(grad: Tensor, tensors: dict[str, Tensor], table: Tensor | None, spec: PackedSpec) -> Tensor:
    """`grad` [..., N] @ W, [..., K] in the stored order of columns, without outlier columns."""
    k, rows, found = spec.shape[1], rows_of(grad, spec, 0), hardware(grad.device)
    m = rows.shape[0]
    out = torch.empty(m, k, dtype=grad.dtype, device=grad.device)
    if m:
        weight = weight_of(tensors, table, spec, grad)
        tile = grad_tile_for(found.architecture, m, grad.dtype == torch.float32, weight.is_gathered)
        columns, inside = columns_of(tile.bk, weight.shape)
        with on(grad.device):
            input_grad[(triton.cdiv(k, columns) * triton.cdiv(m, tile.bm),)](
                rows, out=out, M=m, grad_stride=rows.stride(0), **weight.arguments, INSIDE=inside,
                EVEN=k % columns == 0, BM=tile.bm, BN=tile.bn, BK=columns,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out.reshape(*grad.shape[:-1], k)


def columns_of(most: int, shape: Shape) -> tuple[int, bool]:
    """Columns of a tile, at most `most`, and whether scales are applied inside of it.

    Blocks that a tile of at least 16 columns fits into keep their scales for the sums.
    """
    if shape.counts[1] == 1:
        return most, False
    fitting = min(most, shape.group & -shape.group)
    return (fitting, False) if fitting >= 16 else (most, True)


def split(tile: Tile, columns: int, m: int, n: int, k: int, processors: int) -> tuple[int, int]:
    """In how many parts K is split, and tiles in each: enough programs for twice the processors, 4 tiles each."""
    steps = triton.cdiv(k, columns)
    programs = triton.cdiv(n, tile.bn) * triton.cdiv(m, tile.bm)
    parts = max(1, min(2 * processors // programs, steps // 4)) if tile.split else 1
    each = triton.cdiv(steps, parts)
    return triton.cdiv(steps, each), each


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
