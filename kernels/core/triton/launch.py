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
from hfquant.packing import packed_width
from hfquant.spec import PackedSpec, TensorSpec

from .blocks import Tile, grad_tile_for, tile_for
from .decoding import bytes_apart, bytes_of, decoding, padded, permutes, table_of
from .decoding import fits as fits
from .plans import Plan, Plans
from .weight_only import add_splits, input_grad, linear

Bound = Callable[[Tensor, list[Tensor], Tensor | None], Tensor]
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
class Shape:
    """What does not depend on tensors: the arguments of the kernel that describe the weight.

    `zero_bits` are 0 for zero points that are real numbers; `zero_stride` is in bytes, or in these.
    """

    bits: int
    row_bytes: int
    zero_bits: int
    zero_stride: int
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
    grid_bits = weight.numbers().bits
    bits = grid_bits if spec.layout == "dense" else 8
    inner = weight.scale
    scale_group = inner.blocks.sides((1, counts[0] * counts[1]))[1] if isinstance(inner, TensorSpec) else 1
    real = isinstance(weight.zero, str)
    zero_bits, zero_stride = (0, counts[1]) if real else (grid_bits, packed_width(counts[1], grid_bits))
    return Shape(bits, packed_width(spec.shape[1], bits), zero_bits, zero_stride, height, group, counts, scale_group)


def bind(packed: list[Tensor], spec: PackedSpec) -> Bound:
    """(x, packed, bias) -> y for one weight. Raises FormatError if there are fewer codes or scales than it needs."""
    check(dict(zip(spec.names, packed, strict=True)), spec)
    known = Known(spec)
    if not (spec.outliers or "order" in spec.names):
        return lambda x, packed, bias: product(x, dict(zip(spec.names, packed, strict=True)), bias, spec, known)

    def run(x: Tensor, packed: list[Tensor], bias: Tensor | None) -> Tensor:
        tensors = dict(zip(spec.names, packed, strict=True))
        apart = None
        if spec.outliers:  # the codes of these columns stand for something else: they take part in floating point only
            index = tensors["outlier_index"].long()
            apart = x.index_select(-1, index) @ tensors["outlier_weight"].to(x.dtype).T
            x = x.index_fill(-1, index, 0)
        if "order" in tensors:
            x = x.index_select(-1, tensors["order"])
        y = product(x, tensors, bias, spec, known)
        return y if apart is None else y + apart

    return run


def gradient(grad: Tensor, packed: list[Tensor], spec: PackedSpec) -> Tensor:
    """Gradient [..., K] of the input, `grad` [..., N] @ W, of a weight that is not rotated. Raises like `bind`."""
    tensors = dict(zip(spec.names, packed, strict=True))
    check(tensors, spec)
    out = product_with_weight(grad, tensors, spec)
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
    needed = {"codes": count * shape.row_bytes, "zero": shape.counts[0] * shape.zero_stride, "order": spec.shape[1]}
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


@dataclass(frozen=True)
class Weight:
    """A weight as the kernels take it: arguments that all of them have, and what tiles depend on."""

    arguments: dict[str, Any]
    shape: Shape
    is_gathered: bool  # codes are read one by one, or scales differ inside of any tile


def weight_of(tensors: dict[str, Tensor], spec: PackedSpec, dtype: torch.dtype) -> Weight:
    """The arguments for operands of a dtype, on the device of the weight."""
    stored, device = stored_of(tensors), tensors["codes"].device
    words = can_read_words(stored["codes"], shape_of(spec), spec.shape[1])
    fixed = described(spec, dtype, device, hardware(device).architecture, words)
    if words:
        stored["codes"] = words_of(stored["codes"])
    if "levels" in tensors:
        stored["table"] = fitted_table(tensors["levels"], dtype, fixed.arguments["KIND"])
    return Weight({**fixed.arguments, **stored}, fixed.shape, fixed.is_gathered)


def stored_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The packed tensors that the kernels read, without gaps and by the names that these have for them."""
    return {name: tensors[given].contiguous() for given, name in STORED.items() if given in tensors}


STORED = {"codes": "codes", "zero": "zero", "scale": "scale", "scale_codes": "scale", "scale_scale": "scale_factors"}


def can_read_words(codes: Tensor, shape: Shape, k: int) -> bool:
    """Whether `codes`, which have no gaps, can be read as words of eight."""
    return shape.bits == 4 and k % 8 == 0 and codes.data_ptr() % 4 == 0


def words_of(codes: Tensor) -> Tensor:
    """The bytes of `codes`, which have no gaps, four at once: int32 in one dimension.

    A single row may have any stride and still no gaps, but not be viewed as another type.
    """
    return codes.view(-1).view(torch.int32)


def fitted_table(levels: Tensor, dtype: torch.dtype, kind: str) -> Tensor:
    """The table of a grid that was fitted to the weight, for a way to read it."""
    table = padded(levels, dtype)
    return bytes_apart(table) if kind == "permute" else table


@lru_cache(maxsize=4096)
def described(spec: PackedSpec, dtype: torch.dtype, device: torch.device, architecture: str, words: bool) -> Weight:
    """What does not depend on the packed tensors: they are missing in `arguments`, and those that there are not None.

    `words`: eight 4-bit codes are read at once.
    """
    shape, weight = shape_of(spec), spec.scheme.weight
    how, table, levels = decoding(weight.grid, dtype), None, None
    if not shape.zero_bits:
        how = replace(how, kind="shifted")  # by real zero points
    elif words and how.kind != "integer" and dtype.itemsize == 2 and permutes(architecture):
        how = replace(how, kind="permute")
    if how.kind in ("permute", "table") and "levels" not in spec.names:
        table = (bytes_of if how.kind == "permute" else table_of)(weight.grid, dtype, device)
    if isinstance(weight.scale, TensorSpec):
        levels = table_of(weight.scale.grid, torch.float32, device)
    arguments = dict(  # noqa: C408
        table=table, zero=None, scale_levels=levels, scale_factors=None, N=spec.shape[0], K=spec.shape[1],
        row_stride=shape.row_bytes // 4 if words else shape.row_bytes, zero_stride=shape.zero_stride,
        scale_stride=shape.counts[1], height=shape.height, scale_group=shape.scale_group,
        BITS=shape.bits, WORDS=words, KIND=how.kind, ZERO=how.zero, MANTISSA=how.mantissa, FACTOR=how.factor,
        LEVEL=how.level, GROUP=shape.group, ZERO_BITS=shape.zero_bits, enable_fp_fusion=True,
    )  # fmt: skip
    return Weight(arguments, shape, not (words or shape.bits == 8) or columns_of(16, shape)[1])


def rows_of(x: Tensor, spec: PackedSpec, axis: int) -> Tensor:
    """`x` [..., L] as a matrix whose rows have no gaps; L is that axis of the weight. Raises RuntimeError, as torch."""
    if x.shape[-1] != spec.shape[axis]:
        raise RuntimeError(f"a weight of {spec.shape[0]} x {spec.shape[1]} cannot take a tensor {tuple(x.shape)}")
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


class Known:
    """What is found out once about a bound weight: plans, and tables of a fitted grid."""

    def __init__(self, spec: PackedSpec) -> None:
        self.shape = shape_of(spec)
        self.plans = Plans(lambda *key: plan_of(spec, *key))
        self._tables: dict[tuple[torch.dtype, str], Tensor] = {}

    def table(self, levels: Tensor, dtype: torch.dtype, kind: str) -> Tensor:
        """`fitted_table`, once for each dtype."""
        if (dtype, kind) not in self._tables:
            self._tables[dtype, kind] = fitted_table(levels, dtype, kind)
        return self._tables[dtype, kind]


def plan_of(spec: PackedSpec, m: int, dtype: torch.dtype, device: torch.device, words: bool) -> Plan:
    """The launch for `m` rows; without the table of a fitted grid."""
    (n, k), found = spec.shape, hardware(device)
    weight = described(spec, dtype, device, found.architecture, words)
    tile = tile_for(found.architecture, m, dtype == torch.float32, weight.is_gathered)
    columns, inside = columns_of(tile.bk, weight.shape)
    splits, each = split(tile, columns, m, n, k, found.processors)
    arguments = {
        **weight.arguments, "M": m, "split_steps": each, "ONE_GROUP": weight.shape.counts[1] == 1, "INSIDE": inside,
        "EVEN": k % columns == 0, "SPLIT": splits, "BM": tile.bm, "BN": tile.bn, "BK": columns,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    finish = {"size": m * n, "N": n, "SPLIT": splits, "BLOCK": REDUCED, "enable_fp_fusion": True}
    return Plan((triton.cdiv(n, tile.bn) * triton.cdiv(m, tile.bm), splits), splits, words, arguments, finish)


def product(x: Tensor, tensors: dict[str, Tensor], bias: Tensor | None, spec: PackedSpec, bound: Known) -> Tensor:
    """y [..., N] of `x` [..., K] in the stored order of columns."""
    n, rows = spec.shape[0], rows_of(x, spec, 1)
    m = rows.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m:
        given = stored_of(tensors)
        plan = bound.plans.get(m, x.dtype, x.device, can_read_words(given["codes"], bound.shape, spec.shape[1]))
        if plan.words:
            given["codes"] = words_of(given["codes"])
        if "levels" in tensors:
            given["table"] = bound.table(tensors["levels"], x.dtype, plan.arguments["KIND"])
        partial = torch.empty(plan.splits, m, n, dtype=torch.float32, device=x.device) if plan.splits > 1 else out
        with on(x.device):
            linear[plan.grid](rows, bias=bias, out=partial, x_stride=rows.stride(0), **{**plan.arguments, **given})
            if plan.splits > 1:
                add_splits[(triton.cdiv(m * n, REDUCED),)](partial, bias, out, **plan.finish)
    return out.reshape(*x.shape[:-1], n)


def product_with_weight(grad: Tensor, tensors: dict[str, Tensor], spec: PackedSpec) -> Tensor:
    """`grad` [..., N] @ W, [..., K] in the stored order of columns, without outlier columns."""
    k, rows, found = spec.shape[1], rows_of(grad, spec, 0), hardware(grad.device)
    m = rows.shape[0]
    out = torch.empty(m, k, dtype=grad.dtype, device=grad.device)
    if m:
        weight = weight_of(tensors, spec, grad.dtype)
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
