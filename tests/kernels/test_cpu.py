"""The compiled CPU kernels compute what `QTensor.dequantize` says, on every instruction set that runs here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfquant import cpu
from hfquant.blocks import Blocks
from hfquant.errors import UnsupportedError
from hfquant.kernel import KERNELS, choose, declined
from hfquant.layouts import LAYOUTS, packed_spec, unpack
from hfquant.qtensor import Outliers, QTensor
from hfquant.spec import InputSpec, PackedSpec, Scheme, TensorSpec

LIBRARY = cpu.library()
assert not isinstance(LIBRARY, str), LIBRARY  # the suite is for machines with a compiler
ISAS = LIBRARY.isas()
INTEGERS = ("int2", "uint2", "int3", "int4", "uint4", "int4n", "int5", "uint5", "int6", "int7", "int8", "uint8")
FLOATS = ("e1m1", "e2m0", "e2m1", "e1m2", "e3m0", "e2m2", "e3m2", "e2m3", "e3m3", "e4m3", "e4m3fn", "e5m2ieee")
GRIDS = (*INTEGERS, *FLOATS, "nf4", "fp4", "dyn8")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of the norm of the result, for inputs as models have them.
BOUND = {torch.bfloat16: 3e-3, torch.float16: 6e-4, torch.float32: 1e-5}
# Of sum |x w|, for any input and each result: half a last place of the result, of a weight where it is rounded to
# bfloat16, and float32 sums.
WORST = {torch.bfloat16: (1 + 2.0**-8) ** 2 - 1, torch.float16: 2.0**-11, torch.float32: 0.0}
SUMS = 2.0**-20


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with LIBRARY.using(request.param):
        yield request.param


def random_weight(shape: tuple[int, int], spec: TensorSpec, seed: int) -> QTensor:
    """Any codes of a grid with scales of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    counts = spec.blocks.counts(shape)
    codes = torch.randint(spec.numbers().size, shape, generator=generator, dtype=torch.uint8)
    scale: Any = torch.exp(torch.randn(counts, generator=generator)) / spec.numbers().top
    if isinstance(spec.scale, TensorSpec):
        row = (1, counts[0] * counts[1])
        inner = torch.randint(spec.scale.numbers().size, row, generator=generator, dtype=torch.uint8)
        outer = torch.rand(spec.scale.blocks.counts(row), generator=generator) + 0.5
        scale = QTensor(inner, outer, None, None, spec.scale)
    else:
        scale = scale.to(spec.scale_dtype)
    zero = None
    if spec.zero:
        zero = torch.randint(spec.numbers().size, counts, generator=generator, dtype=torch.uint8)
    return QTensor(codes, scale, zero, None, spec)


def packed(q: QTensor, layout: str) -> tuple[list[Tensor], PackedSpec]:
    tensors = LAYOUTS.get(layout).pack(q)
    return list(tensors.values()), packed_spec(tensors, layout, q.shape, Scheme(q.spec))


def error(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """Norm of the error over that of the exact result."""
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert y.dtype == x.dtype and y.shape == exact.shape
    return float((y.double() - exact).norm() / exact.norm().clamp_min(1e-300))


@st.composite
def problems(draw: st.DrawFn) -> tuple[QTensor, str, Tensor, Tensor | None]:
    grid = draw(st.sampled_from(GRIDS))
    shape = draw(st.integers(16, 70)), draw(st.integers(1, 700))
    columns = draw(st.sampled_from([-1, 8, 16, 32, 64, 128, 256, 12, 40, 96, 1]))
    blocks = Blocks(draw(st.sampled_from([1, 1, 1, 16, -1])), columns)
    how: Any = draw(st.sampled_from(["float32", "bfloat16", "float16", TensorSpec("dyn8", Blocks(1, 256))]))
    if isinstance(how, TensorSpec) and blocks.rows != 1:
        how = "bfloat16"
    zero = grid.startswith("uint") and draw(st.booleans())
    spec = TensorSpec(grid, blocks, zero, how)
    layout = draw(st.sampled_from(["dense", "bytes"])) if spec.numbers().bits < 8 else "bytes"
    seed = draw(st.integers(0, 2**31))
    q = random_weight(shape, spec, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(draw(st.sampled_from([1, 2, 3, 4, 5, 7, 13, 30])), shape[1], generator=generator)
    x[:, :: draw(st.integers(2, 50))] *= draw(st.sampled_from([0.0, 1e-3, 300.0]))
    bias = torch.randn(shape[0], generator=generator) if draw(st.booleans()) else None
    dtype = draw(st.sampled_from(DTYPES))
    return q, layout, (x * 1e-3 if dtype == torch.float16 else x).to(dtype), bias  # float16 overflows early


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=120, deadline=None)
@given(problem=problems())
def test_the_product_is_that_of_the_dequantized_weight(name: str, problem: tuple) -> None:
    q, layout, x, bias = problem
    tensors, spec = packed(q, layout)
    with LIBRARY.using(name):
        assert cpu.why_not(spec, x.dtype, None) is None
        y = cpu.run(x, tensors, bias, spec)
    weight, offset = q.dequantize().double(), torch.zeros(1).double() if bias is None else bias.double()
    exact, terms = x.double() @ weight.T + offset, x.double().abs() @ weight.abs().T + offset.abs()
    tiny = torch.finfo(x.dtype).smallest_normal * x.shape[1]
    assert y.dtype == x.dtype
    assert ((y.double() - exact).abs() <= (WORST[x.dtype] + SUMS) * terms + tiny).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 5, 33])
def test_errors_at_the_sizes_of_models(isa: str, dtype: torch.dtype, rows: int) -> None:
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(1))
    x[:, 77] *= 50
    for grid in GRIDS:
        q = random_weight((256, 512), TensorSpec(grid, Blocks(1, 64), grid == "uint4"), 0)
        tensors, spec = packed(q, "dense" if q.spec.numbers().bits < 8 else "bytes")
        assert error(cpu.run(x.to(dtype), tensors, None, spec), x.to(dtype), q.dequantize(), None) <= BOUND[dtype], grid


@pytest.mark.parametrize("grid", ["nf4", "int4", "uint4", "int3", "int8", "e4m3"])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_results_do_not_depend_on_threads(isa: str, grid: str, rows: int) -> None:
    q = random_weight((70, 333), TensorSpec(grid, Blocks(1, 32), grid == "uint4"), 0)
    tensors, spec = packed(q, "dense" if q.spec.numbers().bits < 8 else "bytes")
    x = torch.randn(rows, 333, generator=torch.Generator().manual_seed(1)).bfloat16()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(cpu.run(x, tensors, None, spec))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_numbers_stay_visible(isa: str, dtype: torch.dtype) -> None:
    q = random_weight((20, 200), TensorSpec("e2m1", Blocks(1, 32)), 0)
    q.codes[q.codes == q.spec.numbers().zero_code] = 0  # no weight is 0, so that none hides an infinity
    tensors, spec = packed(q, "dense")
    for rows in (1, 8):
        x = torch.randn(rows, 200, generator=torch.Generator().manual_seed(1)).to(dtype)
        x[0, 150] = float("nan")
        x[-1, 7] = float("inf")
        y = cpu.run(x, tensors, None, spec)
        assert y[0].isnan().all() and not y[-1].isfinite().any()
        assert y[1:-1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_and_huge_inputs(isa: str, dtype: torch.dtype) -> None:
    """Halving the exponent range is exact: results scale along, until they leave the range of the type."""
    q = random_weight((33, 260), TensorSpec("int4", Blocks(1, 64)), 3)
    tensors, spec = packed(q, "dense")
    x = torch.randn(6, 260, generator=torch.Generator().manual_seed(1)).to(dtype)
    tiny = torch.finfo(dtype).tiny
    for factor in (2.0**-10, 2.0**8) if dtype == torch.float16 else (2.0**-60, 2.0**60):
        y = cpu.run(x * factor, tensors, None, spec)
        exact = (x * factor).double() @ q.dequantize().double().T
        assert ((y.double() - exact).norm() / exact.norm()) <= BOUND[dtype], factor
    subnormal = torch.full((2, 260), tiny / 4, dtype=dtype)
    y = cpu.run(subnormal, tensors, None, spec)
    exact = subnormal.double() @ q.dequantize().double().T
    # Hardware may take subnormal bfloat16 numbers for 0: what is lost then is below the smallest normal one a product.
    assert (y.double() - exact).abs().max() <= 260 * tiny


def test_zeros_give_the_bias(isa: str) -> None:
    q = random_weight((20, 96), TensorSpec("uint4", Blocks(1, 32), True), 0)
    tensors, spec = packed(q, "dense")
    bias = torch.arange(20.0)
    for rows in (1, 9):
        assert torch.equal(cpu.run(torch.zeros(rows, 96), tensors, bias, spec), bias.expand(rows, -1))
    assert cpu.run(torch.zeros(0, 96), tensors, bias, spec).shape == (0, 20)
    assert cpu.run(torch.zeros(2, 0, 96), tensors, bias, spec).shape == (2, 0, 20)


def test_inputs_of_any_shape_and_stride(isa: str) -> None:
    q = random_weight((24, 64), TensorSpec("nf4", Blocks(1, 32)), 0)
    tensors, spec = packed(q, "dense")
    x = torch.randn(64, 3, 5, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0)
    torch.testing.assert_close(cpu.run(x, tensors, None, spec), x @ q.dequantize().T)


def test_order_levels_and_outliers(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = random_weight((40, 96), TensorSpec("int4", Blocks(1, 32)), 0)
    order = torch.randperm(96, generator=generator).int()
    levels = torch.randn(16, generator=generator).sort().values
    fitted = random_weight((40, 96), TensorSpec("nf4", Blocks(1, 32)), 0)
    kept = Outliers(torch.tensor([3, 50], dtype=torch.int32), torch.randn(40, 2, generator=generator).bfloat16())
    x = torch.randn(7, 96, generator=generator)
    x[:, 3] *= 100
    for q in (
        QTensor(plain.codes, plain.scale, None, order, plain.spec),
        QTensor(fitted.codes, fitted.scale, None, None, TensorSpec("quantile4", Blocks(1, 32)), levels),
        QTensor(plain.codes, plain.scale, None, None, plain.spec, None, kept),
        QTensor(plain.codes, plain.scale, None, order, plain.spec, None, kept),
    ):
        tensors, spec = packed(q, "dense")
        exact = unpack(tensors, spec).dequantize()
        for rows in (1, 7):
            assert error(cpu.run(x[:rows], tensors, None, spec), x[:rows], exact, None) <= 1e-5


def test_what_it_declines_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    q = random_weight((16, 64), TensorSpec("int4", Blocks(1, 32)), 0)
    _, spec = packed(q, "dense")
    device = torch.device("cpu")
    assert choose(spec.key(), device, torch.bfloat16).name == "cpu"
    seen = Scheme(q.spec, InputSpec(TensorSpec("int8", Blocks(1, -1))))
    cases = {
        "inputs in floating point": (PackedSpec("dense", (16, 64), seen, spec.names), torch.float32),
        "not torch.float64": (spec, torch.float64),
        "layouts bytes and dense": (PackedSpec("tiles", (16, 64), spec.scheme, spec.names), torch.float32),
    }
    for text, (asked, dtype) in cases.items():
        assert text in str(declined(asked, device, dtype)["cpu"])
    monkeypatch.setattr(cpu, "library", lambda: "the library is not built")
    assert declined(spec, device, torch.float32)["cpu"] == "cpu: the library is not built"
    assert "cpu" in KERNELS


def test_unknown_instruction_sets_are_refused() -> None:
    before = LIBRARY.isa
    with pytest.raises(UnsupportedError, match="'sse9' is nothing that runs here"), LIBRARY.using("sse9"):
        raise AssertionError("must not get here")
    assert LIBRARY.isa == before
