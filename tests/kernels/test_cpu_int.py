"""Layers that quantize their input, on every instruction set that runs here: what `reference.linear` defines."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from hfquant import HfQuantConfig, cpu, explain, reference, use_kernel
from hfquant.blocks import Blocks
from hfquant.cpu.inputs import MOST_COLUMNS, why_not_integers
from hfquant.errors import FormatError
from hfquant.qtensor import InputParams, Outliers, QTensor
from hfquant.spec import InputSpec, PackedSpec, Scheme, TensorSpec
from hfquant.testing.tiny import tiny_inputs, tiny_model

from .problems import (
    DTYPES,
    ISAS,
    LIBRARY,
    assert_int_product,
    assert_same_on_threads,
    int_problems,
    normal,
    packed,
    random_weight,
)

ROW, ALL = Blocks(1, -1), Blocks(-1, -1)
# Both round their result to its dtype once: where they fall on two sides of a tie, they differ by one last place.
LAST_PLACE = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
seeds = st.integers(0, 2**31)


def dynamic(grid: str = "int8", split: float | None = None) -> InputSpec:
    return InputSpec(TensorSpec(grid, ROW), split=split)


def static(grid: str = "int8") -> InputSpec:
    return InputSpec(TensorSpec(grid, ALL), dynamic=False)


def range_of(step: float) -> InputParams:
    return InputParams(torch.tensor([step]))


def identity(size: int, kept: list[int] | None = None) -> QTensor:
    """A layer whose result is what it sees of its input."""
    spec = TensorSpec("int8", ROW)
    codes = torch.eye(size, dtype=torch.uint8) + spec.numbers().zero_code
    outliers = None
    if kept is not None:
        codes[:, kept] = 77  # never looked at
        outliers = Outliers(torch.tensor(kept, dtype=torch.int32), torch.eye(size)[:, kept].bfloat16())
    return QTensor(codes, torch.ones(size, 1), None, None, spec, outliers=outliers)


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=int_problems(st.integers(1, 30)))
def test_agrees_with_the_definition(name: str, problem: tuple) -> None:
    with LIBRARY.using(name):
        assert_int_product(problem)
    q, layout, input, inputs, x, bias = problem
    tensors, spec = packed(q, layout, input, inputs)
    with LIBRARY.using(name):
        assert cpu.why_not(spec, x.dtype, None) is None
        y = cpu.run(x, tensors, bias, spec)
    wanted = reference.linear(x, tensors, bias, spec).double()
    seen = reference.quantize_input(x.float(), input, q.outliers, inputs)
    terms = seen.double().abs() @ q.dequantize().double().abs().T + (0 if bias is None else bias.abs())
    assert y.dtype == x.dtype and y.shape == wanted.shape
    off, sums = (y.double() - wanted).abs(), (x.shape[1] + 8) * 2.0**-24  # the reference adds up in float32
    assert (off <= LAST_PLACE[x.dtype] * wanted.abs() + sums * terms + torch.finfo(x.dtype).tiny).all()
    if x.dtype == torch.float32:
        assert off.norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=seeds,
    rows=st.integers(1, 30),
    size=st.integers(1, 200),
    exponent=st.sampled_from([-145, -130, -60, -3, 0, 2, 90]),
    half_steps=st.booleans(),
    input=st.sampled_from([*map(dynamic, ["int8", "int8n", "int4"]), *map(static, ["int8", "int8n", "int4"])]),
    split=st.sampled_from([None, 0.0, 2.0, 6.0]),
    kept=st.integers(0, 6),
    dtype=st.sampled_from(DTYPES),
)
def test_the_layer_sees_its_input_as_defined_bit_for_bit(
    name: str,
    seed: int,
    rows: int,
    size: int,
    exponent: int,
    half_steps: bool,
    input: InputSpec,
    split: float | None,
    kept: int,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=generator) * 2
    if half_steps:  # every second value is a tie
        x = torch.randint(-254, 255, (rows, size), generator=generator) / 2
        x[:, 0] = input.tensor.numbers().top
    # Hardware may take subnormal bfloat16 numbers for 0.
    lowest = {torch.float32: -145, torch.bfloat16: -100, torch.float16: -12}[dtype]
    exponent = max(lowest, min(exponent, 2 if dtype == torch.float16 else 90))
    x = (x * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)).to(dtype)
    inputs = None if input.dynamic else range_of(0.03125)
    input = replace(input, split=split) if input.dynamic else input
    columns = torch.randperm(size, generator=generator)[:kept].sort().values.tolist()
    q = identity(size, columns or None)
    tensors, spec = packed(q, "bytes", input, inputs)
    with LIBRARY.using(name):
        y = cpu.run(x, tensors, None, spec)
    assert torch.equal(y, reference.quantize_input(x.float(), input, q.outliers, inputs).to(dtype))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=seeds,
    rows=st.integers(1, 30),
    shape=st.tuples(st.integers(1, 80), st.integers(1, 900)),
    weight=st.sampled_from([("int8", "bytes"), ("int8n", "bytes"), ("int4", "dense"), ("int4n", "bytes")]),
    kind=st.sampled_from([dynamic("int8"), dynamic("int8n"), dynamic("int4"), static("int8")]),
)
def test_integer_products_are_exact(
    seed: int, rows: int, shape: tuple[int, int], weight: tuple[str, str], kind: InputSpec
) -> None:
    """Scales are powers of two, so that the product of integers, rounded once, is the only right result."""
    generator = torch.Generator().manual_seed(seed)
    top = int(kind.tensor.numbers().top)
    whole = torch.randint(-top, top + 1, (rows, shape[1]), generator=generator)
    whole[torch.arange(rows), torch.randint(shape[1], (rows,), generator=generator)] = top
    powers = torch.randint(-20, 20, (rows, 1), generator=generator) if kind.dynamic else torch.tensor(-4)
    spec = TensorSpec(weight[0], ROW)
    codes = torch.randint(spec.numbers().size, shape, generator=generator, dtype=torch.uint8)
    scale = torch.exp2(torch.randint(-12, 3, (shape[0], 1), generator=generator).float())
    step = torch.exp2(powers.float())
    q, inputs = QTensor(codes, scale, None, None, spec), None if kind.dynamic else range_of(2.0**-4)
    tensors, described = packed(q, weight[1], kind, inputs)
    levels = spec.numbers().levels()[codes.int()].long()
    exact = (whole @ levels.T).float() * (step * scale.T)
    for name in ISAS:
        with LIBRARY.using(name):
            assert torch.equal(cpu.run(whole * step, tensors, None, described), exact), name


@pytest.mark.parametrize("code", [0, 255])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_longest_sums_fit(isa: str, code: int, rows: int) -> None:
    width = MOST_COLUMNS
    spec = TensorSpec("int8", ROW)
    q = QTensor(torch.full((17, width), code, dtype=torch.uint8), torch.ones(17, 1), None, None, spec)
    tensors, described = packed(q, "bytes", static(), range_of(1.0))
    for x, seen in ((-200.0, -128), (200.0, 127)):
        y = cpu.run(torch.full((rows, width), x), tensors, None, described)
        assert torch.equal(y, torch.full((rows, 17), float(seen * (code - 128) * width)))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_a_static_range_without_a_scale_is_refused(scale: float) -> None:
    q = random_weight((20, 64), TensorSpec("int8", ROW), 0)
    tensors, described = packed(q, "bytes", static(), range_of(scale))
    with pytest.raises(FormatError, match="the checkpoint is damaged"):
        cpu.run(torch.ones(1, 64), tensors, None, described)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input", [dynamic(), dynamic(split=6.0), static()], ids=["dynamic", "split", "static"])
@pytest.mark.parametrize("kept", [[], [3, 40]], ids=["", "outliers"])
def test_values_that_are_not_finite_spoil_their_row_alone(
    isa: str, value: float, dtype: torch.dtype, input: InputSpec, kept: list[int]
) -> None:
    q = random_weight((37, 70), TensorSpec("int8", ROW), 0)
    if kept:
        q = replace(q, outliers=Outliers(torch.tensor(kept, dtype=torch.int32), normal(37, 2).bfloat16()))
    inputs = None if input.dynamic else range_of(0.02)
    tensors, spec = packed(q, "bytes", input, inputs)
    for rows in (3, 9):
        for column in (40, 41):
            x = normal(rows, 70, seed=1).to(dtype)
            x[1, column] = value
            y, wanted = cpu.run(x, tensors, None, spec), reference.linear(x, tensors, None, spec)
            assert not wanted[1].isfinite().any() and wanted[2:].isfinite().all()
            assert torch.equal(y.isnan(), wanted.isnan())
            torch.testing.assert_close(y, wanted, rtol=2 * LAST_PLACE[dtype], atol=1e-4, equal_nan=True)


def test_a_value_that_is_not_finite_changes_no_other_row(isa: str) -> None:
    tensors, spec = packed(random_weight((20, 90), TensorSpec("int4", ROW), 0), "dense", dynamic())
    x = normal(5, 90)
    clean = cpu.run(x, tensors, None, spec)
    x[2, 7] = math.inf
    y = cpu.run(x, tensors, None, spec)
    assert y[2].isnan().all() and torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("input", [dynamic(), dynamic(split=6.0), static()], ids=["dynamic", "split", "static"])
def test_zeros_give_the_bias(isa: str, input: InputSpec) -> None:
    q = random_weight((19, 65), TensorSpec("int8", ROW), 0)
    tensors, spec = packed(q, "bytes", input, None if input.dynamic else range_of(0.5))
    bias = torch.arange(19.0)
    for rows in (1, 8, 0):
        assert torch.equal(cpu.run(torch.zeros(rows, 65), tensors, bias, spec), bias.expand(rows, -1))
    x = normal(3, 65)
    x[1] = 0  # a row of zeros among others
    assert torch.equal(cpu.run(x, tensors, bias, spec)[1], bias)


@pytest.mark.parametrize("weight", [("int8", "bytes"), ("int4", "dense")])
@pytest.mark.parametrize("rows", [1, 6, 30])
def test_results_do_not_depend_on_threads(isa: str, weight: tuple[str, str], rows: int) -> None:
    q = random_weight((150, 333), TensorSpec(weight[0], ROW), 0)
    q = replace(q, outliers=Outliers(torch.tensor([5, 300], dtype=torch.int32), normal(150, 2).half()))
    tensors, spec = packed(q, weight[1], dynamic(split=3.0))
    assert_same_on_threads(normal(rows, 333, seed=1).bfloat16(), tensors, spec)


def test_results_do_not_depend_on_other_rows_but_for_the_split(isa: str) -> None:
    q, x = random_weight((40, 130), TensorSpec("int8", ROW), 0), normal(20, 130, seed=2)
    x[11, 9] = 50
    tensors, spec = packed(q, "bytes", dynamic())
    y = cpu.run(x, tensors, None, spec)
    assert all(torch.equal(cpu.run(x[i : i + 1], tensors, None, spec)[0], y[i]) for i in range(20))
    tensors, spec = packed(q, "bytes", dynamic(split=6.0))
    alone, together = cpu.run(x[:1], tensors, None, spec), cpu.run(x, tensors, None, spec)[:1]
    assert not torch.equal(alone, together)  # column 9 is kept for the token in row 11


@pytest.mark.parametrize("split", [None, 2.5])
def test_columns_in_another_order(isa: str, split: float | None) -> None:
    q = random_weight((30, 75), TensorSpec("int8", ROW), 0)
    q = replace(q, order=torch.randperm(75, generator=torch.Generator().manual_seed(1)).int())
    tensors, spec = packed(q, "bytes", dynamic(split=split))
    x = normal(8, 75, seed=2)
    wanted = reference.linear(x, tensors, None, spec)
    assert (cpu.run(x, tensors, None, spec) - wanted).norm() <= 1e-5 * wanted.norm()


def described(weight: TensorSpec, input: InputSpec, layout: str = "bytes", **more: object) -> PackedSpec:
    return PackedSpec(layout, (32, 64), Scheme(weight, input), ("codes", "scale"), **more)  # type: ignore[arg-type]


INT8 = TensorSpec("int8", ROW)
DECLINED = {
    "multiplies signed integers, this layer uint8 and int8": described(replace(INT8, grid="uint8"), dynamic()),
    "multiplies signed integers, this layer int8 and e4m3": described(INT8, dynamic("e4m3")),
    "one scale for each row": described(TensorSpec("int8", Blocks(1, 32)), dynamic()),
    "weights with one scale for each row": described(replace(INT8, scale=TensorSpec("e4m3", ALL)), dynamic()),
    "one scale for each token, or for all": described(INT8, InputSpec(TensorSpec("int8", Blocks(1, 32)))),
    "and no zero point": described(INT8, InputSpec(TensorSpec("int8", ALL))),
    "rounds them to bfloat16": described(INT8, InputSpec(TensorSpec("int8", ROW, scale="bfloat16"))),
    "integers of 4 and 8 bits, the weight has 5": described(TensorSpec("int5", ROW), dynamic(), "dense"),
}


@pytest.mark.parametrize("reason", DECLINED)
def test_what_is_no_product_of_integers_has_a_reason_and_runs_all_the_same(reason: str) -> None:
    asked = DECLINED[reason]
    assert asked.scheme.input is not None
    assert reason in str(why_not_integers(asked, asked.scheme.input))
    assert cpu.why_not(asked, torch.float32, None) is None


def test_sums_that_may_not_fit_are_no_integers() -> None:
    good, input, most = described(INT8, dynamic()), dynamic(), MOST_COLUMNS
    assert why_not_integers(good, input) is None
    assert why_not_integers(replace(good, shape=(32, most)), input) is None
    assert f"{most + 1} columns" in str(why_not_integers(replace(good, shape=(32, most + 1)), input))
    assert "not torch.float64" in str(cpu.why_not(good, torch.float64, None))


@pytest.fixture(scope="module", params=["llm_int8", "w8a8"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder, source = tmp_path_factory.mktemp(request.param), tiny_model("llama")
    source.save_pretrained(folder)
    options = {"llm_int8": {"threshold": 2.0}, "w8a8": {"transform": None}}[request.param]
    config = HfQuantConfig(request.param, **options)
    return type(source).from_pretrained(folder, quantization_config=config).eval()


@torch.no_grad()
def test_models_agree_with_the_reference(isa: str, model: PreTrainedModel) -> None:
    results = {}
    for name in ("cpu", "reference"):
        with use_kernel(name):
            results[name] = model(**tiny_inputs(model)).logits
    assert (results["cpu"] - results["reference"]).abs().max() <= 1e-4
    assert {use.kernel for use in explain(model)} == {"cpu"}
