"""The compiled CPU kernels compute what `QTensor.dequantize` says, on every instruction set that runs here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from hfquant import cpu
from hfquant.blocks import Blocks
from hfquant.cpu import linear
from hfquant.errors import UnsupportedError
from hfquant.kernel import KERNELS, choose, declined
from hfquant.layouts import unpack
from hfquant.qtensor import Outliers, QTensor
from hfquant.spec import InputSpec, PackedSpec, Scheme, TensorSpec

from .problems import (
    BOUND,
    DTYPES,
    GRIDS,
    ISAS,
    LIBRARY,
    assert_product,
    assert_refuses_short,
    assert_same_on_threads,
    error,
    packed,
    problems,
    random_weight,
)


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=120, deadline=None)
@given(problem=problems())
def test_the_product_is_that_of_the_dequantized_weight(name: str, problem: tuple) -> None:
    with LIBRARY.using(name):
        assert_product(problem)


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
    assert_same_on_threads(x, tensors, spec)


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
    seen = Scheme(q.spec, InputSpec(TensorSpec("quantile8", Blocks(1, -1))))
    cases = {
        "would be fitted to each input": (PackedSpec("dense", (16, 64), seen, spec.names), torch.float32),
        "not torch.float64": (spec, torch.float64),
        "layout 'tiles' is neither": (PackedSpec("tiles", (16, 64), spec.scheme, spec.names), torch.float32),
    }
    for text, (asked, dtype) in cases.items():
        assert text in str(declined(asked, device, dtype)["cpu"])
    monkeypatch.setattr(linear, "library", lambda: "the library is not built")
    assert declined(spec, device, torch.float32)["cpu"] == "cpu: the library is not built"
    assert "cpu" in KERNELS


@pytest.mark.parametrize("name", ["codes", "scale", "zero"])
def test_tensors_that_are_too_short_are_refused(name: str) -> None:
    """The library reads what it is told to."""
    assert_refuses_short(cpu.run, name)


def test_unknown_instruction_sets_are_refused() -> None:
    before = LIBRARY.isa
    with pytest.raises(UnsupportedError, match="'sse9' is nothing that runs here"), LIBRARY.using("sse9"):
        raise AssertionError("must not get here")
    assert LIBRARY.isa == before
