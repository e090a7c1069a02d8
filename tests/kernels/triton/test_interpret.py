"""What the interpreter calculates is what torch calculates, so that kernels that pass it are right."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from .interpret import interpreted

NARROW = (torch.bfloat16, torch.float16)
EIGHT = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


@triton.jit
def arithmetic(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, tl.where(a > b, a * b + a, -(a - b) / b))


@triton.jit
def product(x, y, out, N: tl.constexpr, PRECISION: tl.constexpr):
    row, col = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a, b = tl.load(x + row * N + col), tl.load(y + row * N + col)
    tl.store(out + row * N + col, tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def doubled(x):
    return x + x


@triton.jit
def conversion(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, doubled(tl.load(x + at)).to(out.dtype.element_ty))


@triton.jit
def widening(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def total(x, out, n, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + tl.program_id(0), tl.sum(tl.load(x + at, mask=at < n, other=0.0)))


@triton.jit
def masked_by_a_scalar(x, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at, mask=n & 3 > 1, other=7))


@triton.jit
def permuted(a, b, selector, out, N: tl.constexpr):
    at = tl.arange(0, N)
    found = tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, tl.load(b + at), tl.load(selector + at)], tl.int32, True, 1
    )
    tl.store(out + at, found)


@triton.jit
def unknown_assembly(out):
    tl.store(out, tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [7], tl.int32, True, 1))


@triton.jit
def last_program(out):
    tl.store(out, tl.program_id(0))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", NARROW)
def test_every_operation_is_rounded_to_its_type(dtype: torch.dtype) -> None:
    x, y = numbers(1024).to(dtype), numbers(1024, seed=1).to(dtype)
    out = torch.empty_like(x)
    with interpreted():
        arithmetic[(1,)](x, y, out, N=1024)
    quotient = (-(x - y).float() / y.float()).to(dtype)  # Triton divides in float32
    assert torch.equal(out, torch.where(x > y, x * y + x, quotient))


@pytest.mark.parametrize("dtype", [*NARROW, *EIGHT, torch.int8, torch.float32])
def test_products_are_exact_up_to_float32_sums(dtype: torch.dtype) -> None:
    x, y = ((numbers(32, 32, seed=seed) * 20).to(dtype) for seed in (0, 1))
    out = torch.empty(32, 32, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    with interpreted():
        product[(1,)](x, y, out, N=32, PRECISION="ieee")
    exact = x.double() @ y.double()
    assert ((out - exact).abs() <= 2**-20 * (x.double().abs() @ y.double().abs())).all()


def test_tf32_products_round_their_operands() -> None:
    x, y, out = numbers(32, 32), numbers(32, 32, seed=1), torch.empty(32, 32)
    with interpreted():
        product[(1,)](x, y, out, N=32, PRECISION="tf32")
    error = float((out - x.double() @ y.double()).norm() / out.norm())
    assert 1e-4 < error < 1e-3


@pytest.mark.parametrize("target", [torch.float32, *NARROW, *EIGHT])
@pytest.mark.parametrize("source", [torch.float32, *NARROW])
def test_conversions_round_like_torch(source: torch.dtype, target: torch.dtype) -> None:
    special = torch.tensor([float("nan"), 0.0, -0.0, 2.0**-9, 3 * 2.0**-10, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 200.0])
    x = torch.cat([special, 10 * numbers(248), 0.01 * numbers(256, seed=1)]).to(source)
    out = torch.empty(512, dtype=target)
    with interpreted():
        conversion[(1,)](x, out, N=512)
    torch.testing.assert_close(out.float(), (x + x).to(target).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", [torch.float32, *NARROW])
@pytest.mark.parametrize("source", EIGHT)
def test_float8_is_read_exactly(source: torch.dtype, target: torch.dtype) -> None:
    x, out = torch.arange(256, dtype=torch.uint8).view(source), torch.empty(256, dtype=target)
    with interpreted():
        widening[(1,)](x, out, N=256)
    torch.testing.assert_close(out.float(), x.float(), rtol=0, atol=0, equal_nan=True)


def test_float8_beyond_its_range_is_an_error() -> None:
    x = torch.full((16,), 300.0)
    with interpreted(), pytest.raises(AssertionError, match="clamp first"):
        conversion[(1,)](x, torch.empty(16, dtype=torch.float8_e4m3fn), N=16)


def test_addresses_outside_of_the_tensors_are_an_error() -> None:
    x, out = torch.ones(100), torch.empty(4)
    with interpreted():
        total[(4,)](x, out, 100, N=32)
        assert out.tolist() == [32, 32, 32, 4]
        with pytest.raises(AssertionError, match="reads 28 of 32 places outside"):
            total[(4,)](x, out, 128, N=32)
        with pytest.raises(AssertionError, match="writes 1 of 1 places outside"):
            total[(4,)](x, out[:3], 100, N=32)


def test_bytes_are_permuted_as_the_instruction_set_says() -> None:
    """The digits of a selector name bytes of both operands; from 8 on they repeat the sign of one."""
    b, selector = torch.tensor([0x77665544] * 4), torch.tensor([0x3210, 0x7654, 0x0415, 0xB98F])
    out = torch.empty(4, dtype=torch.int32)
    with interpreted():
        permuted[(1,)](0x33221180 - (1 << 32), b.int(), selector.int(), out, N=4)
        with pytest.raises(AssertionError, match=r"what this instruction does: mov"):
            unknown_assembly[(1,)](out)
    a = 0x33221180
    assert [f"{value & 0xFFFFFFFF:08x}" for value in out.tolist()] == [f"{a:08x}", "77665544", "80441155", "0000ff00"]


@pytest.mark.parametrize(("n", "expected"), [(6, 1), (5, 7)])
def test_a_comparison_of_scalars_is_a_mask(n: int, expected: int) -> None:
    x, out = torch.ones(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    with interpreted():
        masked_by_a_scalar[(1,)](x, out, n, N=8)
    assert out.tolist() == [expected] * 8


def test_memory_that_nobody_wrote_is_nan_and_programs_run_in_either_order() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    with interpreted():
        assert torch.empty(3).isnan().all()
        last_program[(5,)](out)
        assert out.item() == 4
    with interpreted(backwards=True):
        last_program[(5,)](out)
    assert out.item() == 0


def test_nothing_of_it_is_left_behind() -> None:
    before = (JITFunction.run, JITFunction.__call__, interpreter._convert_float, tl.load, tl.range, tl.tensor.__add__)
    names = set(arithmetic.fn.__globals__), set(triton.language.standard.__dict__)
    with pytest.raises(RuntimeError, match="stop"), interpreted():
        total[(1,)](torch.ones(8), torch.empty(1), 8, N=8)
        raise RuntimeError("stop")
    after = (JITFunction.run, JITFunction.__call__, interpreter._convert_float, tl.load, tl.range, tl.tensor.__add__)
    assert before == after and type(interpreter.interpreter_builder) is interpreter.InterpreterBuilder
    assert names == (set(arithmetic.fn.__globals__), set(triton.language.standard.__dict__))
    assert not triton.knobs.runtime.interpret and not torch.are_deterministic_algorithms_enabled()
