"""The compiled CPU kernels: weights of any grid of 2 to 8 bits, read as they are stored, times floating-point inputs.

The library is loaded once, after torch, so that both share one OpenMP runtime and its threads. It picks the best
instruction set of the processor; HFQUANT_CPU_ISA asks for another one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .build import cpu_library
from .codebooks import FittedGrid
from .cpu_inputs import describe_input, why_not_input
from .cpu_types import TYPES, Input, Weight, hold
from .errors import UnsupportedError
from .grids import grid as named
from .jobs import Direct, join, run_jobs
from .kernel import Bound, Kernel
from .layouts import LAYOUTS
from .packing import packed_width
from .spec import PackedSpec, TensorSpec

ABI = 2


class Library:
    """The loaded library. Raises UnsupportedError if it does not fit, or has nothing for HFQUANT_CPU_ISA."""

    def __init__(self, path: str) -> None:
        try:
            self._c = ctypes.CDLL(path)
        except OSError as error:
            raise UnsupportedError(f"the CPU kernels cannot be loaded: {error}", [_REBUILD]) from error
        self._c.hfq_isa.restype = self._c.hfq_isas.restype = c_char_p
        self._c.hfq_use.argtypes = [c_char_p]
        self._c.hfq_read.restype, self._c.hfq_read.argtypes = c_int64, [c_void_p, c_int64, c_int]
        self._c.hfq_linear.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int]
        self._c.hfq_linear_int.argtypes = [c_void_p, *self._c.hfq_linear.argtypes]
        self._c.hfq_linear_grid.argtypes = self._c.hfq_linear_int.argtypes
        if (found := self._c.hfq_abi()) != ABI:
            raise UnsupportedError(f"{path} has version {found} of the interface, hfquant needs {ABI}", [_REBUILD])
        self._c.hfq_linear_jobs.argtypes = [c_char_p, c_int64, c_int, c_int]
        if self._c.hfq_isa() is None:
            asked, able = os.environ.get("HFQUANT_CPU_ISA"), ", ".join(self.isas())
            raise UnsupportedError(f"HFQUANT_CPU_ISA={asked!r} is nothing that runs here: choose from {able}")

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._c.hfq_isa().decode()

    def isas(self) -> list[str]:
        """The instruction sets that are built and run on this processor, best first."""
        return self._c.hfq_isas().decode().split(",")

    @contextmanager
    def using(self, isa: str) -> Iterator[None]:
        """Use another instruction set inside the block, in all threads. Raises UnsupportedError if it is not there."""
        before = self.isa
        if self._c.hfq_use(isa.encode()):
            raise UnsupportedError(f"instruction set {isa!r} is nothing that runs here: choose from {self.isas()}")
        try:
            yield
        finally:
            self._c.hfq_use(before.encode())

    def read(self, words: Tensor) -> int:
        """Read `words` int64 as fast as memory gives them: what reading weights is compared with. Returns their sum."""
        return self._c.hfq_read(words.data_ptr(), words.numel(), torch.get_num_threads())

    def call(self, name: str, *addresses: int, type: int) -> int:
        """What a function returns that takes addresses or sizes, the type of numbers and how many threads to use."""
        result: int = self._c[name](*map(c_void_p, addresses), type, torch.get_num_threads())
        return result

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None, input: Input | None = None) -> Tensor:
        """y [..., N] of contiguous `x` [..., K], in its dtype; `bias` [N] float32; `input`: how `x` is quantized.

        Raises MemoryError, and RuntimeError, as torch does, if the shapes do not fit.
        """
        if x.shape[-1] != weight.k or (bias is not None and bias.numel() != weight.n):
            given = f"{tuple(x.shape)}" + ("" if bias is None else f" and a bias of {bias.numel()}")
            raise RuntimeError(f"a weight of {weight.n} x {weight.k} cannot take an input of shape {given}")
        y = x.new_empty(*x.shape[:-1], weight.n)
        at = None if bias is None else bias.data_ptr()
        rows = y.numel() // weight.n if weight.n else 0
        rest = (x.data_ptr(), at, y.data_ptr(), rows, TYPES[x.dtype], torch.get_num_threads())
        if input is None:
            failed = self._c.hfq_linear(ctypes.addressof(weight), *rest)
        else:
            call = self._c.hfq_linear_int if input.integers else self._c.hfq_linear_grid
            failed = call(ctypes.addressof(weight), ctypes.addressof(input), *rest)
        if failed:
            raise MemoryError(f"the CPU kernels ran out of memory on a {weight.n} x {weight.k} weight")
        return y

    def jobs(self, table: bytes, count: int, dtype: torch.dtype) -> None:
        """Run `count` jobs of the `table` of `hfq_job`, whose inputs and results are of `dtype`. Raises MemoryError."""
        if self._c.hfq_linear_jobs(table, count, TYPES[dtype], torch.get_num_threads()):
            raise MemoryError(f"the CPU kernels ran out of memory on {count} products at once")


_REBUILD = "build it again: hfquant doctor --build"


@lru_cache(maxsize=1)
def library() -> Library | str:
    """The library, or the reason why there is none."""
    path = cpu_library()
    if path is None:
        return "the library is not built: install a C++ compiler and run `hfquant doctor --build`"
    try:
        return Library(str(path))
    except UnsupportedError as error:
        return str(error)


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
        needed = counts[0] * packed_width(counts[1], weight.zero_bits)
        weight.zero = hold(weight, tensors["zero"], needed, "zero points")
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


KERNEL = Kernel("cpu", "*", "cpu", run, why_not, priority=10, bind=bind, run_jobs=run_jobs, join=join)
