"""Products of a quantized weight that the CPU kernels are tried on, and how far from the exact result they may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from hfquant import cpu, reference
from hfquant.blocks import Blocks
from hfquant.errors import FormatError
from hfquant.layouts import LAYOUTS, pack_inputs, packed_spec, unpack_inputs
from hfquant.qtensor import InputParams, Outliers, QTensor
from hfquant.spec import InputSpec, PackedSpec, Scheme, TensorSpec

INTEGERS = ("int2", "uint2", "int3", "int4", "uint4", "int4n", "int5", "uint5", "int6", "int7", "int8", "uint8")
FLOATS = ("e1m1", "e2m0", "e2m1", "e1m2", "e3m0", "e2m2", "e3m2", "e2m3", "e3m3", "e4m3", "e4m3fn", "e5m2ieee")
GRIDS = (*INTEGERS, *FLOATS, "nf4", "fp4", "dyn8")
LIBRARY = cpu.library()
assert not isinstance(LIBRARY, str), LIBRARY  # the suite is for machines with a compiler
ISAS = LIBRARY.isas()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (1, 2, 3, 4, 5, 7, 13, 30)
# Of the norm of the result, for inputs as models have them.
BOUND = {torch.bfloat16: 3e-3, torch.float16: 6e-4, torch.float32: 1e-5}
HALF = 2.0**-8  # of a last place of bfloat16
# Of sum |x w|, for any input and each result: half a last place of the result, of a weight where it is rounded to
# bfloat16, and float32 sums.
WORST = {torch.bfloat16: (1 + HALF) ** 2 - 1, torch.float16: 2.0**-11, torch.float32: 0.0}
# The same where weights are rounded to the type of the result, whatever it is.
WORST_WEIGHTS = {**WORST, torch.float16: (1 + 2.0**-11) ** 2 - 1}
WORST_LEVELS = {**WORST, torch.bfloat16: (1 + HALF) ** 3 - 1}  # levels that bfloat16 does not have are rounded, too
WORST_VALUES = {**WORST, torch.bfloat16: (1 + HALF) ** 4 - 1}  # inputs times their scale are rounded to it as well
WORST_INT = {**WORST, torch.bfloat16: HALF}
SUMS = 2.0**-20
# Of inputs: integers, floating point whose step is found by arithmetic, and those that are looked up.
SEEN = ("int8", "int4", "int5n", "uint8", "uint4", "e4m3fn", "e5m2ieee", "e4m3", "e2m1", "e2m1b7", "ue2m2")
SEEN = (*SEEN, "e3m0", "ue4m0", "e6m0", "nf4", "fp4", "dyn4", "dyn8")


def random_weight(shape: tuple[int, int], spec: TensorSpec, seed: int) -> QTensor:
    """Any codes of a grid with scales of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    counts = spec.blocks.counts(shape)
    codes = torch.randint(spec.numbers().size, shape, generator=generator, dtype=torch.uint8)
    scale: Any = torch.exp(torch.randn(counts, generator=generator)) / spec.numbers().top
    if isinstance(spec.scale, TensorSpec):
        row = (1, counts[0] * counts[1])
        inner = torch.randint(spec.scale.numbers().size, row, generator=generator, dtype=torch.uint8)
        # As above, so that weights are numbers of float16.
        outer = (torch.rand(spec.scale.blocks.counts(row), generator=generator) + 0.5) / spec.numbers().top
        scale = QTensor(inner, outer, None, None, spec.scale)
    else:
        scale = scale.to(spec.scale_dtype)
    zero = None
    if spec.zero is True:
        zero = torch.randint(spec.numbers().size, counts, generator=generator, dtype=torch.uint8)
    elif spec.zero:
        zero = (spec.numbers().size * (torch.randn(counts, generator=generator) + 0.5)).to(spec.zero_dtype)
    return QTensor(codes, scale, zero, None, spec)


def packed(
    q: QTensor, layout: str, input: InputSpec | None = None, inputs: InputParams | None = None
) -> tuple[list[Tensor], PackedSpec]:
    """The tensors of a layer and what they are."""
    scheme = Scheme(q.spec, input)
    tensors = {**LAYOUTS.get(layout).pack(q), **pack_inputs(inputs, scheme)}
    return list(tensors.values()), packed_spec(tensors, layout, q.shape, scheme)


def kinds() -> dict[str, tuple[QTensor, str]]:
    """Weights that are stored in every way there is."""
    generator = torch.Generator().manual_seed(0)
    plain = random_weight((40, 96), TensorSpec("int4", Blocks(1, 32)), 0)
    order = torch.randperm(96, generator=generator).int()
    kept = Outliers(torch.tensor([3, 50], dtype=torch.int32), torch.randn(40, 2, generator=generator).half())
    fitted = replace(plain, spec=TensorSpec("quantile4", Blocks(1, 32)), levels=torch.arange(16.0) / 7 - 1)
    return {
        "plain": (plain, "dense"),
        "fitted": (fitted, "dense"),
        "order": (replace(plain, order=order), "bytes"),
        "outliers": (replace(plain, outliers=kept), "dense"),
        "both": (replace(plain, order=order, outliers=kept), "dense"),
    }


def kept_columns(q: QTensor, count: int, dtype: torch.dtype, seed: int) -> QTensor:
    """The same weight with other numbers in some columns, in 16 bits; for a `count` of 0 as it is."""
    if not count:
        return q
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(q.shape[1], generator=generator)[:count].sort().values.int()
    return replace(q, outliers=Outliers(index, torch.randn(q.shape[0], count, generator=generator).to(dtype)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_refuses_short(run: Callable[..., Tensor], name: str) -> None:
    """A kernel refuses a weight with too few numbers in the tensor `name`: "codes", "scale" or "zero"."""
    for zero in (True, "bfloat16"):
        q = random_weight((16, 64), TensorSpec("uint4", Blocks(1, 32), zero), 0)
        tensors, spec = packed(q, "dense")
        tensors[spec.names.index(name)] = tensors[spec.names.index(name)][:-1]
        with pytest.raises(FormatError, match="the checkpoint is damaged"):
            run(torch.ones(1, 64), tensors, None, spec)


def assert_same_on_threads(x: Tensor, tensors: list[Tensor], spec: PackedSpec) -> None:
    """Results are equal to the last bit, however many threads there are."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(cpu.run(x, tensors, None, spec))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def error(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """Norm of the error over that of the exact result."""
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert y.dtype == x.dtype and y.shape == exact.shape
    return float((y.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def drawn_input(draw: st.DrawFn, rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers with columns of other sizes between them."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x[:, :: draw(st.integers(2, 50))] *= draw(st.sampled_from([0.0, 1e-3, 300.0]))
    return (x * 1e-3 if dtype == torch.float16 else x).to(dtype)  # float16 overflows early


def drawn_bias(draw: st.DrawFn, rows: int, seed: int) -> Tensor | None:
    """A bias, or none."""
    return torch.randn(rows, generator=torch.Generator().manual_seed(seed)) if draw(st.booleans()) else None


@st.composite
def problems(
    draw: st.DrawFn, rows: st.SearchStrategy[int] | None = None, dtypes: Sequence[torch.dtype] = DTYPES
) -> tuple[QTensor, str, Tensor, Tensor | None]:
    """A weight, its layout, an input in floating point and a bias."""
    grid = draw(st.sampled_from(GRIDS))
    shape = draw(st.integers(16, 70)), draw(st.integers(1, 700))
    columns = draw(st.sampled_from([-1, 8, 16, 32, 64, 128, 256, 12, 40, 96, 1]))
    blocks = Blocks(draw(st.sampled_from([1, 1, 1, 16, -1])), columns)
    how: Any = draw(st.sampled_from(["float32", "bfloat16", "float16", TensorSpec("dyn8", Blocks(1, 256))]))
    if isinstance(how, TensorSpec) and blocks.rows != 1:
        how = "bfloat16"
    zero = grid.startswith("uint") and draw(st.sampled_from([False, True, "float32", "bfloat16", "float16"]))
    spec = TensorSpec(grid, blocks, zero, how)
    layout = draw(st.sampled_from(["dense", "bytes"])) if spec.numbers().bits < 8 else "bytes"
    seed = draw(st.integers(0, 2**31))
    dtype = draw(st.sampled_from(dtypes))
    x = drawn_input(draw, draw(st.sampled_from(ROWS) if rows is None else rows), shape[1], dtype, seed + 1)
    return random_weight(shape, spec, seed), layout, x, drawn_bias(draw, shape[0], seed + 2)


def assert_product(problem: tuple[QTensor, str, Tensor, Tensor | None]) -> None:
    """What `problems` draws, computed by the library in use, is the product of the dequantized weight."""
    q, layout, x, bias = problem
    tensors, spec = packed(q, layout)
    assert cpu.why_not(spec, x.dtype, None) is None
    levels = q.spec.numbers().levels()
    worst = WORST if torch.equal(levels, levels.bfloat16().float()) else WORST_LEVELS
    assert_close(cpu.run(x, tensors, bias, spec), x, q.dequantize(), bias, worst)


@st.composite
def int_problems(
    draw: st.DrawFn, rows: st.SearchStrategy[int]
) -> tuple[QTensor, str, InputSpec, InputParams | None, Tensor, Tensor | None]:
    """A weight, its layout, how the input is quantized and its range if that is static, an input and a bias."""
    grid = draw(st.sampled_from(["int8", "int8n", "int4", "int4n", "int3"]))
    spec = TensorSpec(grid, Blocks(1, -1), False, draw(st.sampled_from(["float32", "bfloat16", "float16"])))
    layout = draw(st.sampled_from(["dense", "bytes"])) if spec.numbers().bits == 4 else "bytes"
    shape = draw(st.integers(16, 70)), draw(st.integers(1, 1300))
    seed = draw(st.integers(0, 2**31))
    q = random_weight(shape, spec, seed)
    q = kept_columns(q, draw(st.integers(0, min(5, shape[1]))), draw(st.sampled_from(DTYPES[:2])), seed + 3)
    if draw(st.booleans()):
        q = replace(q, order=torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed + 4)).int())
    seen, dynamic = draw(st.sampled_from(["int8", "int8n", "int4"])), draw(st.booleans())
    split = draw(st.sampled_from([None, 3.0])) if dynamic else None
    input = InputSpec(TensorSpec(seen, Blocks(1, -1) if dynamic else Blocks(-1, -1)), dynamic, split)
    inputs = None if dynamic else InputParams(torch.tensor([draw(st.sampled_from([0.02, 0.3]))]))
    dtype = draw(st.sampled_from(DTYPES))
    x = drawn_input(draw, draw(rows), shape[1], dtype, seed + 1)
    return q, layout, input, inputs, x, drawn_bias(draw, shape[0], seed + 2)


def assert_int_product(problem: tuple) -> None:
    """The same for `int_problems`: the product with what the reference says that the layer sees of its input."""
    q, layout, input, inputs, x, bias = problem
    tensors, spec = packed(q, layout, input, inputs)
    assert cpu.why_not(spec, x.dtype, None) is None
    seen = reference.quantize_input(x.float(), input, q.outliers, unpack_inputs(tensors, spec))
    assert_close(cpu.run(x, tensors, bias, spec), seen, q.dequantize(), bias, WORST_INT)


@st.composite
def seen_inputs(draw: st.DrawFn) -> tuple[InputSpec, InputParams | None]:
    """Any way to quantize an input, and its range if that is static."""
    grid = draw(st.sampled_from(SEEN))
    zero, dynamic = grid.startswith("uint") and draw(st.booleans()), draw(st.booleans())
    if not dynamic:
        point = torch.tensor([draw(st.integers(0, 15))], dtype=torch.uint8) if zero else None
        step = torch.tensor([draw(st.sampled_from([0.02, 0.3]))])
        return InputSpec(TensorSpec(grid, Blocks(-1, -1), zero), dynamic=False), InputParams(step, point)
    blocks = Blocks(draw(st.sampled_from([1, 1, 1, -1, 3])), draw(st.sampled_from([-1, -1, 128, 32, 7])))
    how = draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"]))
    return InputSpec(TensorSpec(grid, blocks, zero, how), split=draw(st.sampled_from([None, None, 3.0]))), None


@st.composite
def grid_problems(
    draw: st.DrawFn, rows: st.SearchStrategy[int], dtypes: Sequence[torch.dtype] = DTYPES
) -> tuple[QTensor, str, InputSpec, InputParams | None, Tensor, Tensor | None]:
    """The same for inputs on any grid, and weights on any."""
    q, layout, x, bias = draw(problems(rows, dtypes))
    seed = draw(st.integers(0, 2**31))
    if q.spec.grid in ("e4m3fn", "e5m2ieee"):
        layout = draw(st.sampled_from(["float8", layout]))
    q = kept_columns(q, draw(st.integers(0, min(5, q.shape[1]))), draw(st.sampled_from(DTYPES[:2])), seed)
    if draw(st.booleans()):
        q = replace(q, order=torch.randperm(q.shape[1], generator=torch.Generator().manual_seed(seed)).int())
    input, inputs = draw(seen_inputs())
    return q, layout, input, inputs, x, bias


def assert_grid_product(problem: tuple) -> None:
    """The same for `grid_problems`."""
    q, layout, input, inputs, x, bias = problem
    tensors, spec = packed(q, layout, input, inputs)
    assert cpu.why_not(spec, x.dtype, None) is None
    seen = reference.quantize_input(x.float(), input, q.outliers, inputs)
    assert_close(cpu.run(x, tensors, bias, spec), seen, q.dequantize(), bias, WORST_VALUES)


def assert_close(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, worst: dict[torch.dtype, float]) -> None:
    """Each result is as near to x W^T + bias as its dtype allows."""
    offset = torch.zeros(1).double() if bias is None else bias.double()
    exact, terms = x.double() @ weight.double().T + offset, x.double().abs() @ weight.double().abs().T + offset.abs()
    tiny = torch.finfo(y.dtype).smallest_normal * x.shape[1]
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= (worst[y.dtype] + SUMS) * terms + tiny).all()
