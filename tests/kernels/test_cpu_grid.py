"""Layers that quantize their input to any grid, on every instruction set that runs here: what `reference` defines."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from hfquant import HfQuantConfig, cpu, explain, reference, use_kernel
from hfquant.blocks import Blocks
from hfquant.cpu.inputs import describe_input
from hfquant.errors import FormatError
from hfquant.grids import Grid, grid
from hfquant.layouts import LAYOUTS, Bytes
from hfquant.qtensor import InputParams, Outliers, QTensor
from hfquant.spec import InputSpec, PackedSpec, Scheme, TensorSpec
from hfquant.testing.tiny import tiny_inputs, tiny_model

from .problems import (
    BOUND,
    DTYPES,
    ISAS,
    LIBRARY,
    SEEN,
    assert_grid_product,
    assert_same_on_threads,
    error,
    grid_problems,
    kept_columns,
    normal,
    packed,
    random_weight,
    seen_inputs,
)

ROW, ALL = Blocks(1, -1), Blocks(-1, -1)


def identity(size: int, kept: list[int], order: Tensor | None) -> QTensor:
    """A layer whose result is what it sees of its input; of a floating-point weight, so that none are integers."""
    spec = TensorSpec("e4m3fn", ROW)
    one = int(spec.numbers().encode(torch.ones(1)))
    codes = torch.where(torch.eye(size, dtype=torch.bool), one, spec.numbers().zero_code).to(torch.uint8)
    outliers = None
    if kept:
        codes[:, kept] = 77  # never looked at
        outliers = Outliers(torch.tensor(kept, dtype=torch.int32), torch.eye(size)[:, kept].bfloat16())
    codes = codes if order is None else codes[:, order.long()]
    return QTensor(codes, torch.ones(size, 1), None, order, spec, outliers=outliers)


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=150, deadline=None)
@given(problem=grid_problems(st.sampled_from([1, 2, 3, 4, 5, 13, 30])))
def test_products_are_those_of_what_the_layer_sees(name: str, problem: tuple) -> None:
    with LIBRARY.using(name):
        assert_grid_product(problem)


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 12),
    size=st.integers(1, 200),
    exponent=st.sampled_from([-145, -130, -60, -3, 0, 2, 90]),
    ties=st.booleans(),
    given_input=seen_inputs(),
    kept=st.integers(0, 6),
    ordered=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_the_layer_sees_its_input_as_defined_bit_for_bit(
    name: str,
    seed: int,
    rows: int,
    size: int,
    exponent: int,
    ties: bool,
    given_input: tuple[InputSpec, InputParams | None],
    kept: int,
    ordered: bool,
    dtype: torch.dtype,
) -> None:
    input, inputs = given_input
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=generator) * 2
    if ties:  # levels, and the middles between two of them
        levels = input.tensor.numbers().levels()
        middles = torch.cat([levels, (levels[1:] + levels[:-1]) / 2])
        x = middles[torch.randint(middles.numel(), (rows, size), generator=generator)]
        x[:, 0] = levels[-1]
        inputs = None if inputs is None else replace(inputs, scale=torch.ones(1))
    x[:, :: max(1, seed % 9)] = 0 if seed % 5 == 0 else x[:, :: max(1, seed % 9)]
    # Hardware may take subnormal bfloat16 numbers for 0, and float16 has few.
    lowest = {torch.float32: -145, torch.bfloat16: -90, torch.float16: -2}[dtype]
    exponent = max(lowest, min(exponent, 2 if dtype == torch.float16 else 90))
    x = (x * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)).to(dtype)
    x = x.clamp(-6e4, 6e4) if dtype == torch.float16 else x
    order = torch.randperm(size, generator=generator).int() if ordered else None
    q = identity(size, torch.randperm(size, generator=generator)[:kept].sort().values.tolist(), order)
    tensors, spec = packed(q, "bytes", input, inputs)
    with LIBRARY.using(name):
        y = cpu.run(x, tensors, None, spec)
    assert torch.equal(y, reference.quantize_input(x.float(), input, q.outliers, inputs).to(dtype))


@pytest.mark.parametrize("name", SEEN)
def test_each_input_is_seen_at_its_edges(isa: str, name: str) -> None:
    """Every float32 around each threshold, and far beyond both ends."""
    middles = (grid(name).levels()[1:].double() + grid(name).levels()[:-1].double()) / 2
    near = middles.float()
    around = [torch.nextafter(near, torch.tensor(end)) for end in (-math.inf, math.inf)]
    x = torch.cat([near, *around, torch.tensor([0.0, -0.0, 1e30, -1e30, 1e-40])])[None]
    input, inputs = InputSpec(TensorSpec(name, ALL), dynamic=False), InputParams(torch.ones(1))
    q = identity(x.shape[1], [], None)
    tensors, spec = packed(q, "bytes", input, inputs)
    seen = cpu.run(x, tensors, None, spec)
    assert torch.equal(seen, grid(name).decode(grid(name).encode(x)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 33])
def test_errors_at_the_sizes_of_models(isa: str, dtype: torch.dtype, rows: int) -> None:
    x = normal(rows, 512, seed=1)
    x[:, 77] *= 50
    x = x.to(dtype)
    kinds = {
        "channel": (Blocks(1, -1), InputSpec(TensorSpec("e4m3fn", ROW))),
        "tensor": (ALL, InputSpec(TensorSpec("e4m3fn", ALL))),
        "tile": (Blocks(128, 128), InputSpec(TensorSpec("e4m3fn", Blocks(1, 128)))),
    }
    for name, (blocks, input) in kinds.items():
        q = random_weight((256, 512), TensorSpec("e4m3fn", blocks), 0)
        tensors, spec = packed(q, "float8", input)
        seen = reference.quantize_input(x.float(), input, None).double()
        off = cpu.run(x, tensors, None, spec).double() - (exact := seen @ q.dequantize().double().T)
        assert off.norm() <= BOUND[dtype] * exact.norm(), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [ROW, ALL, Blocks(1, 32), Blocks(2, -1), None], ids=str)
@pytest.mark.parametrize("name", ["e4m3fn", "e3m0", "dyn8"])
def test_values_that_are_not_finite_spoil_what_shares_their_scale(
    isa: str, name: str, value: float, dtype: torch.dtype, blocks: Blocks | None
) -> None:
    input = InputSpec(TensorSpec(name, blocks or ALL), dynamic=blocks is not None)
    q = random_weight((37, 70), TensorSpec("int4", Blocks(1, 32)), 0)
    tensors, spec = packed(q, "dense", input, None if input.dynamic else InputParams(torch.tensor([0.02])))
    for rows in (3, 9):
        x = normal(rows, 70, seed=1).to(dtype)
        x[1, 41] = value
        y, wanted = cpu.run(x, tensors, None, spec), reference.linear(x, tensors, None, spec)
        assert wanted[1].isnan().all()
        assert torch.equal(y.isnan(), wanted.isnan())


def test_kept_values_that_are_not_finite_stay_visible(isa: str) -> None:
    q = kept_columns(random_weight((37, 70), TensorSpec("int4", Blocks(1, 32)), 0), 3, torch.bfloat16, 1)
    assert q.outliers is not None
    for split in (None, 4.0):
        tensors, spec = packed(q, "dense", InputSpec(TensorSpec("e4m3fn", ROW), split=split))
        for rows in (3, 9):
            x = normal(rows, 70, seed=1)
            x[1, int(q.outliers.index[1])] = math.inf
            y, wanted = cpu.run(x, tensors, None, spec), reference.linear(x, tensors, None, spec)
            assert not wanted[1].isfinite().any()
            torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_zeros_give_the_bias(isa: str) -> None:
    bias, q = torch.arange(19.0), random_weight((19, 65), TensorSpec("e2m1", ROW), 0)
    for input in (InputSpec(TensorSpec("e4m3fn", ROW)), InputSpec(TensorSpec("uint8", Blocks(1, 16), True), split=2.0)):
        tensors, spec = packed(q, "dense", input)
        for rows in (1, 8, 0):
            assert torch.equal(cpu.run(torch.zeros(rows, 65), tensors, bias, spec), bias.expand(rows, -1))


@pytest.mark.parametrize("input", [TensorSpec("e4m3fn", ROW), TensorSpec("uint8", Blocks(3, 64), True)], ids=str)
@pytest.mark.parametrize("rows", [1, 6, 30])
def test_results_do_not_depend_on_threads(isa: str, input: TensorSpec, rows: int) -> None:
    q = kept_columns(random_weight((150, 333), TensorSpec("e4m3fn", Blocks(128, 128)), 0), 4, torch.float16, 0)
    tensors, spec = packed(q, "float8", InputSpec(input, split=3.0))
    assert_same_on_threads(normal(rows, 333, seed=1).bfloat16(), tensors, spec)


def test_tokens_with_scales_of_their_own_do_not_depend_on_each_other(isa: str) -> None:
    q, x = random_weight((40, 130), TensorSpec("e4m3fn", ROW), 0), normal(20, 130, seed=2)
    x[11, 9] = 1e4
    for blocks in (ROW, Blocks(1, 32)):
        tensors, spec = packed(q, "float8", InputSpec(TensorSpec("e4m3fn", blocks)))
        y = cpu.run(x, tensors, None, spec)
        assert all(torch.equal(cpu.run(x[i : i + 1], tensors, None, spec)[0], y[i]) for i in range(20))


def test_results_with_a_scale_for_each_row_are_rounded_once(isa: str) -> None:
    """Levels are whole numbers, scales powers of two: sums are exact, so that the nearest number is the only result."""
    q = random_weight((40, 260), TensorSpec("int5", Blocks(1, 64)), 0)
    q = replace(q, scale=torch.exp2(torch.randint(-6, 3, q.scale.shape, generator=torch.Generator()).float()))
    x = torch.randint(-7, 8, (9, 260), generator=torch.Generator().manual_seed(1)).bfloat16()
    x[:, 0] = 7
    scale = torch.exp2(torch.arange(-4, 5).float())[:, None]
    tensors, spec = packed(q, "dense", InputSpec(TensorSpec("int4", ROW)))
    bias = torch.randint(-9, 9, (40,), generator=torch.Generator().manual_seed(2)).float()
    exact = (x * scale).double() @ q.dequantize().double().T + bias
    for rows in (slice(0, 1), slice(0, 9)):
        assert torch.equal(cpu.run((x * scale).bfloat16()[rows], tensors, bias, spec), exact.bfloat16()[rows])


class Scrambled(Bytes):
    """A layout of a plugin: one byte a code, each with all of its bits turned over."""

    name = "scrambled"

    def encode(self, codes: Tensor, grid: Grid) -> Tensor:
        return ~codes

    def decode(self, stored: Tensor, grid: Grid, count: int) -> Tensor:
        return ~stored

    def levels_of_bytes(self, grid: Grid) -> Tensor:
        levels = Bytes().levels_of_bytes(grid)
        assert levels is not None
        return levels.flip(0)


class Silent(Bytes):
    """The same, but it does not say what its bytes stand for."""

    name = "silent"
    encode, decode = Scrambled.encode, Scrambled.decode


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {**LAYOUTS.entries(), "scrambled": (Scrambled(), "test"), "silent": (Silent(), "test")}
    monkeypatch.setattr(LAYOUTS, "_entries", entries)


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("name", ["int8", "int4", "e4m3", "dyn8"])
@pytest.mark.parametrize("input", [None, InputSpec(TensorSpec("int8", ROW)), InputSpec(TensorSpec("e5m2ieee", ALL))])
def test_layouts_of_bytes_are_read_by_what_they_say(isa: str, name: str, input: InputSpec | None) -> None:
    q = random_weight((40, 130), TensorSpec(name, ROW), 0)
    tensors, spec = packed(q, "scrambled", input)
    assert cpu.why_not(spec, torch.float32, None) is None
    for rows in (1, 9):
        x = normal(rows, 130)
        seen = x if input is None else reference.quantize_input(x, input, None)
        assert error(cpu.run(x, tensors, None, spec), seen, q.dequantize(), None) <= BOUND[torch.float32]


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2ieee"])
def test_bytes_of_no_number_give_no_number(isa: str, name: str) -> None:
    q = random_weight((20, 40), TensorSpec(name, ROW), 0)
    tensors, spec = packed(q, "float8")
    for row, pattern in enumerate({"e4m3fn": (0x7F, 0xFF), "e5m2ieee": (0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFF)}[name]):
        tensors[0].view(torch.uint8)[row, row] = pattern
    for rows in (1, 9):
        y = cpu.run(torch.ones(rows, 40), tensors, None, spec)
        assert y[:, : row + 1].isnan().all() and y[:, row + 1 :].isfinite().all()


def described(layout: str, weight: str, input: str | None = None) -> PackedSpec:
    seen = None if input is None else InputSpec(TensorSpec(input, ROW))
    return PackedSpec(layout, (32, 64), Scheme(TensorSpec(weight, ROW), seen), ("codes", "scale"))


@pytest.mark.usefixtures("plugin")
def test_what_it_declines_it_says_why() -> None:
    cases = {
        "layout 'silent' is neither": described("silent", "int8"),
        "layout 'nowhere' is neither": described("nowhere", "int8"),
        "layout 'scrambled' is neither": described("scrambled", "quantile8"),
        "quantile4 would be fitted to each input": described("bytes", "int8", "quantile4"),
    }
    for reason, asked in cases.items():
        assert reason in str(cpu.why_not(asked, torch.float32, None))


def test_columns_that_are_not_there_are_refused() -> None:
    q = kept_columns(random_weight((16, 64), TensorSpec("e2m1", ROW), 0), 2, torch.bfloat16, 0)
    q = replace(q, order=torch.arange(64, dtype=torch.int32))
    for name in ("order", "outlier_index"):
        for value in (-1, 64):
            tensors, spec = packed(q, "dense", InputSpec(TensorSpec("e4m3fn", ROW)))
            at = spec.names.index(name)
            tensors[at] = tensors[at].clone()
            tensors[at][-1] = value
            with pytest.raises(FormatError, match=f"{name} names columns beyond the 64"):
                cpu.run(torch.ones(1, 64), tensors, None, spec)


def test_integers_are_still_multiplied_as_integers() -> None:
    """Where that is exact, also with columns in another order and some of them kept."""
    q = random_weight((16, 64), TensorSpec("int8", ROW), 0)
    for weight in (q, replace(kept_columns(q, 2, torch.float16, 0), order=torch.arange(64, dtype=torch.int32))):
        for input in ("int8", "e4m3fn"):
            tensors, spec = packed(weight, "bytes", seen := InputSpec(TensorSpec(input, ROW)))
            held = describe_input(dict(zip(spec.names, tensors, strict=True)), spec, seen)
            assert held.integers == (input == "int8")


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("fp8", {}),
    "fp8 tensor": ("fp8", {"granularity": "tensor"}),
    "fp8 tile": ("fp8", {"granularity": "tile", "weights": "e5m2"}),
    "fp8 weights": ("fp8", {"activations": False}),
    "fpq tokens": ("fpq", {"act_bits": 8, "inputs": "token", "search": "minmax", "preshift": False}),
    "fpq groups": ("fpq", {"act_bits": 4, "inputs": "group", "search": "minmax", "preshift": False}),
}


@pytest.fixture(scope="module", params=METHODS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder, source = tmp_path_factory.mktemp("model"), tiny_model("llama")
    source.save_pretrained(folder)
    method, options = METHODS[request.param]
    return type(source).from_pretrained(folder, quantization_config=HfQuantConfig(method, **options)).eval()


@torch.no_grad()
def test_models_agree_with_the_reference(isa: str, model: PreTrainedModel) -> None:
    results = {}
    for name in ("cpu", "reference"):
        with use_kernel(name):
            results[name] = model(**tiny_inputs(model)).logits
    torch.testing.assert_close(results["cpu"], results["reference"], rtol=0, atol=2e-2)
    assert {use.kernel for use in explain(model)} == {"cpu"}
