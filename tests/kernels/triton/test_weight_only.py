"""The weight-only kernel, interpreted, computes what `QTensor.dequantize` says."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfquant.blocks import Blocks
from hfquant.gpu import weight_only as gpu
from hfquant.kernel import Kernel, declined, use_kernel
from hfquant.kernels.triton import launch
from hfquant.ops import linear
from hfquant.qtensor import QTensor
from hfquant.spec import InputSpec, PackedSpec, Scheme, TensorSpec

from ..problems import BOUND, DTYPES, GRIDS, SUMS, assert_refuses_short, error, packed, random_weight
from .compiled import recording
from .interpret import interpreted
from .products import LAST, as_if_on, assert_near, interpret, problems, registered, with_outliers


@settings(max_examples=100, deadline=None)
@given(problem=problems(), architecture=st.sampled_from(["none", "sm_90"]))
def test_the_product_is_that_of_the_dequantized_weight(problem: tuple, architecture: str) -> None:
    q, layout, x, bias = problem
    with as_if_on(architecture):
        assert_near(interpret(q, layout, x, bias), x, q, bias)


@settings(max_examples=60, deadline=None)
@given(problem=problems(), architecture=st.sampled_from(["none", "sm_90"]))
def test_the_gradient_is_the_product_with_the_dequantized_weight(problem: tuple, architecture: str) -> None:
    q, layout, x, _ = problem
    tensors, spec = packed(q, layout)
    seed = torch.Generator().manual_seed(q.shape[0])
    grad = torch.randn(x.shape[0], q.shape[0], generator=seed).mul(1e-3 if x.dtype == torch.float16 else 1).to(x.dtype)
    with as_if_on(architecture), interpreted():
        found = gpu.input_grad(grad, tensors, spec)
    weight = q.dequantize().double()
    exact, terms = grad.double() @ weight, grad.double().abs() @ weight.abs()
    # Each weight is rounded once after it was scaled, and a level before, if the dtype does not have it.
    allowed = (1 + LAST[x.dtype]) ** 3 - 1 + SUMS
    tiny = torch.finfo(x.dtype).smallest_normal * q.shape[0]
    assert found.dtype == x.dtype and ((found.double() - exact).abs() <= allowed * terms + tiny).all()


@pytest.mark.parametrize("outliers", [0, 3])
@pytest.mark.parametrize("rotated", [False, True])
def test_training_through_a_layer_takes_the_gradient_of_the_kernel(outliers: int, rotated: bool) -> None:
    """The kernel stands for "cpu" here, where the tests have their tensors."""
    q = random_weight((40, 96), TensorSpec("int4", Blocks(1, 32)), 0)
    q = replace(with_outliers(q, outliers, 0) if outliers else q, rotated=rotated)
    tensors, spec = packed(q, "dense")
    key = replace(spec, rotated=rotated).key()
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(0), requires_grad=True)
    here = replace(gpu.KERNEL, name="triton_here", device="cpu", priority=99)
    upstream = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1))
    with mock.patch.object(launch, "gradient", wraps=launch.gradient) as used, registered(here), interpreted():
        linear(x, tensors, None, key).backward(upstream)
        first, x.grad = x.grad, None
        with use_kernel("reference"):
            linear(x, tensors, None, key).backward(upstream)
    assert used.call_count == 1 and first is not None
    torch.testing.assert_close(first, x.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_every_grid(dtype: torch.dtype) -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    x[:, 77] *= 50
    for grid in GRIDS:
        q = random_weight((64, 256), TensorSpec(grid, Blocks(1, 64), grid == "uint4"), 0)
        y = interpret(q, "dense" if q.spec.numbers().bits < 8 else "bytes", x.to(dtype), None)
        assert error(y, x.to(dtype), q.dequantize(), None) <= BOUND[dtype], grid


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [64, 40])
def test_columns_are_split_among_programs_and_summed_in_one_order(dtype: torch.dtype, group: int) -> None:
    """However the programs are scheduled, results are equal to the last bit."""
    q = random_weight((40, 1100), TensorSpec("uint4", Blocks(1, group), True), 0)
    x = torch.randn(3, 1100, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(40, generator=torch.Generator().manual_seed(2))
    added = mock.MagicMock()
    added.__getitem__.side_effect = launch.add_splits.__getitem__
    with as_if_on("sm_90"), mock.patch.object(launch, "add_splits", added):
        y = interpret(q, "dense", x, bias)
        assert torch.equal(y, interpret(q, "dense", x, bias, backwards=True))
    assert added.__getitem__.call_count == 2, "not split"
    assert_near(y, x, q, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", ["nf4", "fp4", "dyn4", "e2m1", "e1m2", "e3m0", "ue2m2", "e3m0b20", "quantile4"])
def test_levels_that_are_permuted_in_registers_are_those_of_the_table(grid: str, dtype: torch.dtype) -> None:
    """Every code at every place of a word, to the last bit."""
    codes = torch.stack([torch.arange(16).roll(-shift) for shift in range(16)]).to(torch.uint8)
    fitted = torch.randn(16, generator=torch.Generator().manual_seed(0)).sort().values
    levels = fitted if grid == "quantile4" else None
    spec = TensorSpec(grid, Blocks(1, -1))
    codes = codes if levels is not None else codes % spec.numbers().size
    q = QTensor(codes, torch.ones(16, 1), None, None, spec, levels)
    found = []
    for architecture in ("none", "sm_90"):
        with as_if_on(architecture), recording() as launches:
            launch.bind(*packed(q, "dense"))(torch.eye(16).to(dtype), packed(q, "dense")[0], None)
        assert (launches[0].options["KIND"] == "permute") == (architecture == "sm_90")
        with as_if_on(architecture):
            found.append(interpret(q, "dense", torch.eye(16).to(dtype), None))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1].T, q.dequantize().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_levels_and_outliers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = random_weight((40, 96), TensorSpec("int4", Blocks(1, 32)), 0)
    order = torch.randperm(96, generator=generator).int()
    levels = torch.randn(16, generator=generator).sort().values
    fitted = random_weight((40, 96), TensorSpec("nf4", Blocks(1, 32)), 0)
    x = torch.randn(7, 96, generator=generator).to(dtype)
    x[:, 3] *= 100
    for q in (
        replace(plain, order=order),
        QTensor(fitted.codes, fitted.scale, None, None, TensorSpec("quantile4", Blocks(1, 32)), levels),
        with_outliers(plain, 2, 0),
        replace(with_outliers(plain, 2, 0), order=order),
    ):
        for rows in (1, 7):
            assert error(interpret(q, "dense", x[:rows], None), x[:rows], q.dequantize(), None) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_numbers_stay_visible(dtype: torch.dtype) -> None:
    q = random_weight((20, 200), TensorSpec("e2m1", Blocks(1, 32)), 0)
    q.codes[q.codes == q.spec.numbers().zero_code] = 0  # no weight is 0, so that none hides an infinity
    for rows in (1, 8, 20):
        x = torch.randn(rows, 200, generator=torch.Generator().manual_seed(1)).to(dtype)
        x[0, 150] = float("nan")
        x[-1, 7] = float("inf")
        y = interpret(q, "dense", x, None)
        assert y[0].isnan().all() and not y[-1].isfinite().any()
        assert y[1:-1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_give_the_bias(dtype: torch.dtype) -> None:
    q = random_weight((20, 96), TensorSpec("uint4", Blocks(1, 32), True), 0)
    tensors, spec = packed(q, "dense")
    bias = torch.arange(20.0)
    with interpreted():
        run = launch.bind(tensors, spec)
        for shape in ((1, 96), (9, 96), (0, 96), (2, 0, 96), (2, 3, 96)):
            y = run(torch.zeros(shape, dtype=dtype), tensors, bias)
            assert torch.equal(y, bias.to(dtype).expand(*shape[:-1], 20))


def test_packed_tensors_of_any_stride() -> None:
    q = random_weight((24, 64), TensorSpec("uint4", Blocks(1, 16), True, TensorSpec("dyn8", Blocks(1, 16))), 0)
    tensors, spec = packed(q, "dense")
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    with interpreted():
        y = launch.bind(tensors, spec)(x, tensors, None)
        apart = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in tensors]
        assert not any(tensor.is_contiguous() for tensor in apart)
        assert torch.equal(y, launch.bind(apart, spec)(x, apart, None))
        odd = [torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].reshape(tensor.shape) for tensor in tensors]
        assert odd[0].is_contiguous() and odd[0].data_ptr() % 4 == 1
        assert torch.equal(y, launch.bind(odd, spec)(x, odd, None))


def test_inputs_of_any_shape_and_stride() -> None:
    q = random_weight((24, 64), TensorSpec("nf4", Blocks(1, 32)), 0)
    x = torch.randn(64, 3, 5, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0)
    for view in (x, x[::2], x[:, :1].expand(-1, 4, -1)):
        torch.testing.assert_close(interpret(q, "dense", view, None), view @ q.dequantize().T)


@pytest.mark.parametrize("grid", ["e4m3", "e5m2ieee", "ue2m2", "e5m2", "dyn8", "e1m6b5", "e2m1b40"])
def test_every_float16_level_is_exact_or_the_grid_is_declined(grid: str) -> None:
    q = random_weight((16, 32), TensorSpec(grid, Blocks(1, 32)), 0)
    assert launch.fits(q.spec.numbers(), torch.float16)
    x = torch.eye(32)
    y = interpret(replace(q, scale=torch.full((16, 1), 2.0**-7)), "bytes", x, None)
    assert torch.equal(y.T, q.spec.numbers().decode(q.codes) * 2.0**-7)
    assert_near(interpret(q, "bytes", x.half(), None), x.half(), q, None)


def test_what_it_declines_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    q = random_weight((16, 64), TensorSpec("int4", Blocks(1, 32)), 0)
    _, spec = packed(q, "dense")
    seen = Scheme(q.spec, InputSpec(TensorSpec("int8", Blocks(1, -1))))
    twice = TensorSpec(
        "nf4", Blocks(1, 32), False, TensorSpec("dyn8", Blocks(1, 8), False, TensorSpec("e4m3", Blocks(1, 8)))
    )
    wide = replace(spec, scheme=Scheme(TensorSpec("e6m1", Blocks(1, 32))))
    half, new = torch.float16, (9, 0)
    assert gpu.why_not(spec, half, new) is None and gpu.why_not(wide, torch.bfloat16, new) is None
    for text, asked, dtype, capability in (
        ("quantizes its input", PackedSpec("dense", (16, 64), seen, spec.names), half, new),
        ("not torch.float64", spec, torch.float64, new),
        ("layouts bytes and dense", replace(spec, layout="tiles"), half, new),
        ("once, not twice", replace(spec, scheme=Scheme(twice)), half, new),
        ("this GPU has 7.5", spec, half, (7, 5)),
        ("e6m1 do not fit into float16", wide, half, new),
        ("real zero points", replace(spec, scheme=Scheme(TensorSpec("uint4", Blocks(1, 32), "float32"))), half, new),
    ):
        assert text in str(gpu.why_not(asked, dtype, capability))
    assert declined(spec, torch.device("cpu"), half)["triton"] == "triton: is for cuda, the weight is on cpu"
    gpu.missing.cache_clear()
    monkeypatch.setattr(gpu, "launcher", mock.Mock(side_effect=ImportError("no symbol")))
    assert "cannot be imported (no symbol)" in str(gpu.why_not(spec, half, new))
    gpu.missing.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu.why_not(spec, half, new) == "triton is not installed: pip install hfquant[triton]"
    gpu.missing.cache_clear()
    assert isinstance(gpu.KERNEL, Kernel) and gpu.KERNEL.priority > 0


@pytest.mark.parametrize("name", ["codes", "scale", "zero"])
def test_tensors_that_are_too_short_are_refused(name: str) -> None:
    """A kernel reads what it is told to."""
    assert_refuses_short(gpu.run, name)


def test_damaged_codes_read_no_memory_of_others() -> None:
    q = random_weight((16, 64), TensorSpec("int4", Blocks(1, 32)), 0)
    q.codes.fill_(255)
    for grid in ("nf4", "e2m1", "int4", "dyn3"):
        assert interpret(replace(q, spec=TensorSpec(grid, Blocks(1, 32))), "bytes", torch.ones(2, 64), None).shape == (
            2,
            16,
        )
