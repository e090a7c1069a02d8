"""Runs Triton kernels on CPU tensors, one program after another, with the numbers that a GPU would get.

Triton's own interpreter holds bfloat16 as raw bits and calculates with those, truncates where hardware rounds, does not
round the operands of tf32 products, and reads any address. Here none of that is so. It is put in place for the time of
a `with interpreted():` block, in which every launch of a kernel is interpreted; outside of it the same kernels compile.
"""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton import knobs
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

Handle = interpreter.TensorHandle
LANGUAGE = types.SimpleNamespace(
    __globals__={"tl": tl, "core": tl.core}
)  # the modules to patch, as a function has them
NARROW = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
WORDS = {2: (torch.uint16, np.uint16), 1: (torch.uint8, np.uint8)}


@contextmanager
def interpreted(backwards: bool = False) -> Iterator[None]:
    """Interpret every launch inside the block, its programs in ascending order or `backwards`.

    Memory from `torch.empty` holds NaN, so that what a kernel leaves out is seen. Raises AssertionError for a load or
    store outside of the tensors of the launch, and for a conversion to float8 beyond its range.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch, knobs.runtime.scope(), np.errstate(all="ignore"):
        knobs.runtime.interpret = True
        patch.setattr(JITFunction, "run", _launch(backwards))
        patch.setattr(JITFunction, "__call__", lambda self, *args, **options: _rewritten(self.fn)(*args, **options))
        patch.setattr(interpreter.interpreter_builder, "__class__", Faithful)
        patch.setattr(interpreter, "_convert_float", convert)
        patch.setattr(interpreter.ReduceOps, "apply_impl", _reduce(interpreter.ReduceOps.apply_impl))
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)


def _launch(backwards: bool) -> Callable[..., None]:
    """What takes the place of `JITFunction.run`."""

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        named = {name: value for name, value in options.items() if name in kernel.arg_names}
        bound = inspect.getcallargs(kernel.fn, *args, **named)
        grid = grid(bound) if callable(grid) else grid
        constant = {kernel.arg_names[number] for number in kernel.constexprs}
        given = {name: v if name in constant else interpreter._implicit_cvt(v) for name, v in bound.items()}
        function, builder = _rewritten(kernel.fn), interpreter.interpreter_builder
        builder.extents = [extent(value) for value in bound.values() if isinstance(value, torch.Tensor)]
        scope = interpreter._patch_lang(LANGUAGE)
        try:
            builder.set_grid_dim(*grid, *(1,) * (3 - len(grid)))
            programs = list(itertools.product(*(range(count) for count in grid), *((0,),) * (3 - len(grid))))
            for program in reversed(programs) if backwards else programs:
                builder.set_grid_idx(*program)
                function(**given)
        finally:
            scope.restore()

    return run


@lru_cache(maxsize=256)
def _rewritten(bare: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel's function as the interpreter wants it, with globals of its own: rewriting adds names to them."""
    copy = types.FunctionType(bare.__code__, dict(bare.__globals__), bare.__name__, bare.__defaults__, bare.__closure__)
    copy.__annotations__, copy.__kwdefaults__ = bare.__annotations__, bare.__kwdefaults__
    copy.__module__, copy.__qualname__ = bare.__module__, bare.__qualname__
    return interpreter.InterpretedFunction(copy).rewrite()


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First address of a tensor and the one behind its last."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_impl(self: Any, input: Any) -> Any:
        assert not any(value.dtype in NARROW for value in input), "reduce in float32: results depend on the order"
        return original(self, input)

    return apply_impl


class Faithful(interpreter.InterpreterBuilder):
    """The interpreter's operations with the results of hardware."""

    extents: list[tuple[int, int]]

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        self._assert_inside(ptrs, mask, "reads")
        return super().create_masked_load(ptrs, mask, other, *rest)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        self._assert_inside(ptrs, mask, "writes")
        return super().create_masked_store(ptrs, value, mask, *rest)

    def _assert_inside(self, ptrs: Any, mask: Any, verb: str) -> None:
        size = np.uint64(max(1, ptrs.get_element_ty().primitive_bitwidth // 8))
        at = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
        inside = np.zeros(at.shape, dtype=bool)
        for first, behind in self.extents:
            inside |= (at >= np.uint64(first)) & (at + size <= np.uint64(behind))
        assert inside.all(), f"{verb} {np.count_nonzero(~inside)} of {at.size} places outside of the kernel's tensors"

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        if not is_narrow(lhs):
            result = super().binary_op(lhs, rhs, op)
            # A comparison of scalars that is still said to be an integer would become one when it is broadcast.
            return Handle(result.data, tl.int1) if result.data.dtype == np.bool_ else result
        result = op(widened(lhs), widened(rhs))
        return Handle(result, tl.int1) if result.dtype == np.bool_ else narrowed(result, lhs.dtype.scalar)

    def unary_op(self, arg: Any, op: Any) -> Any:
        return narrowed(op(widened(arg)), arg.dtype.scalar) if is_narrow(arg) else super().unary_op(arg, op)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        if not is_narrow(z):
            return super().create_fma(x, y, z)
        # Products of 8 bits are exact in float32, so that only the sum in float64 and one rounding are left.
        exact = widened(x).astype(np.float64) * widened(y) + widened(z)
        return Handle(torch.from_numpy(exact).to(NARROW[z.dtype.scalar]).view(torch.uint16).numpy(), z.dtype.scalar)

    def create_rsqrt(self, arg: Any) -> Any:
        return self.unary_op(arg, lambda x: 1 / np.sqrt(x)) if is_narrow(arg) else super().create_rsqrt(arg)

    def create_clampf(self, arg: Any, lo: Any, hi: Any, nan: Any) -> Any:
        assert not is_narrow(arg), "clamp in float32"
        return super().create_clampf(arg, lo, hi, nan)

    def create_dot(self, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        a, b = (Handle(widened(x), tl.float32) if is_narrow(x) else x for x in (a, b))
        if precision == ir.INPUT_PRECISION.TF32 and a.dtype.scalar == tl.float32:
            a, b = (Handle(interpreter._round_f32_to_tf32(x.data), tl.float32) for x in (a, b))
        if a.data.dtype == np.float16:
            a, b = (Handle(x.data.astype(np.float32), tl.float32) for x in (a, b))
        return super().create_dot(a, b, d, precision, *rest)

    def create_inline_asm(self, asm: str, constraints: str, operands: Any, *rest: Any) -> Any:
        assert asm in ASSEMBLY, f"say what this instruction does: {asm}"
        result = Handle(ASSEMBLY[asm](*(operand.data for operand in operands)), tl.int32)
        return types.SimpleNamespace(get_result=lambda number: result)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source in NARROW:
            return super().cast_impl(Handle(widened(src), tl.float32), dst_type)
        if target in NARROW:
            wide = torch.from_numpy(np.ascontiguousarray(src.data)).to(NARROW[target])
            return Handle(wide.view(WORDS[wide.element_size()][0]).numpy(), target)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if src.dtype.scalar not in NARROW and dst_type.scalar not in NARROW:
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        data = convert(src.data, src.dtype.scalar, dst_type.scalar, rounding_mode)
        return Handle(data.view(interpreter._get_np_dtype(dst_type)), dst_type.scalar)


def byte_permutation(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """PRMT in its default mode: four digits, of which bit 3 would repeat the sign of a byte instead."""
    a, b, selector = (value.astype(np.int32) for value in np.broadcast_arrays(a, b, selector))
    both = a.view(np.uint32).astype(np.uint64) | (b.view(np.uint32).astype(np.uint64) << np.uint64(32))
    out = np.zeros(both.shape, np.uint32)
    for place in range(4):
        digit = ((selector >> (4 * place)) & 0xF).astype(np.uint64)
        byte = (both >> (8 * (digit & 7))) & 0xFF
        byte = np.where(digit & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        out |= byte.astype(np.uint32) << (8 * place)
    return out.view(np.int32)


ASSEMBLY = {"prmt.b32 $0, $1, $2, $3;": byte_permutation}


def is_narrow(handle: Any) -> bool:
    """Whether the interpreter holds numbers as bits."""
    return handle.dtype.scalar in NARROW


def widened(handle: Any) -> np.ndarray:
    """The numbers of a handle as float32."""
    return _floats(handle.data, handle.dtype.scalar)


def narrowed(values: np.ndarray, dtype: Any) -> Any:
    """A handle for float32 `values` rounded to a narrow dtype."""
    return Handle(_bits(values, dtype), dtype)


def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """Bits of `data` in another floating-point type, rounded to nearest, ties to even, unless asked to truncate."""
    if rounding is not None and rounding == ir.ROUNDING_MODE.RTZ:
        return _ORIGINAL(data, source, target, rounding)
    values = _floats(np.asarray(data), source)
    if target in NARROW:
        return _bits(values, target)
    return values.astype(interpreter._get_np_dtype(target))


_ORIGINAL = interpreter._convert_float


def _floats(data: np.ndarray, dtype: Any) -> np.ndarray:
    if dtype not in NARROW:
        return np.asarray(data).view(interpreter._get_np_dtype(dtype)).astype(np.float32)
    bits = torch.from_numpy(np.array(data).view(WORDS[np.asarray(data).itemsize][1]))
    return bits.view(NARROW[dtype]).float().numpy()


def _bits(values: np.ndarray, dtype: Any) -> np.ndarray:
    wide = torch.from_numpy(np.array(values, dtype=np.float32))
    narrow = wide.to(NARROW[dtype])
    if narrow.element_size() == 1:  # some GPUs saturate here and some do not
        beyond = wide.abs() > torch.finfo(narrow.dtype).max
        assert not beyond.any(), "a conversion to float8 beyond its range: clamp first"
    return narrow.view(WORDS[narrow.element_size()][0]).numpy()
