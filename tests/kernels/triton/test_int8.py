"""Products of integers on a GPU are those of the quantized input and the dequantized weight."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfquant import reference
from hfquant.blocks import Blocks
from hfquant.errors import FormatError
from hfquant.gpu import inputs as gpu_inputs
from hfquant.kernels.triton import int8, launch
from hfquant.layouts import unpack_inputs
from hfquant.qtensor import Outliers
from hfquant.spec import InputSpec, PackedSpec, TensorSpec

from ..problems import WORST_INT, assert_close, int_problems, packed, random_weight
from .compiled import ATOMIC, TARGETS, Launch, recording
from .interpret import interpreted
from .products import as_if_on

TOKENS = InputSpec(TensorSpec("int8", Blocks(1, -1)))


def layer(
    grid: str, layout: str, shape: tuple[int, int], input: InputSpec = TOKENS, kept: int = 0
) -> tuple[list[torch.Tensor], PackedSpec]:
    q = random_weight(shape, TensorSpec(grid, Blocks(1, -1)), 0)
    if kept:
        q = replace(q, outliers=Outliers(torch.arange(kept).int(), torch.randn(shape[0], kept).bfloat16()))
    return packed(q, layout, input)


@settings(max_examples=40, deadline=None)
@given(int_problems(st.sampled_from([1, 2, 17, 70])), st.booleans())
def test_products(problem: tuple, ordered: bool) -> None:
    """Every integer grid, static and dynamic ranges, kept columns and those found at run time, ragged shapes."""
    q, layout, input, inputs, x, bias = problem
    if ordered and q.outliers is None:
        q = replace(q, order=torch.randperm(x.shape[1]).int())
    tensors, spec = packed(q, layout, input, inputs)
    reason = gpu_inputs.why_not_int8(spec, x.dtype, (8, 0))
    if q.order is not None and q.outliers is not None:
        assert reason is not None and "another order" in reason
        return
    assert reason is None
    seen = reference.quantize_input(x.float(), input, q.outliers, unpack_inputs(tensors, spec))
    with interpreted():
        y = gpu_inputs.run_int8(x, tensors, bias, spec)
    assert y.dtype == x.dtype
    assert_close(y, seen, q.dequantize(), bias, WORST_INT)


@pytest.mark.parametrize(
    ("grid", "layout", "split", "rows"),
    [("int8", "bytes", 3.0, 1), ("int8", "bytes", None, 20), ("int4", "dense", 3.0, 20), ("int4n", "dense", None, 1)],
)
def test_columns_split_among_programs_give_the_same_bits(
    grid: str, layout: str, split: float | None, rows: int
) -> None:
    """Sums of integers are exact: results are those of one program, however many there are and in which order."""
    tensors, spec = layer(grid, layout, (40, 2100), replace(TOKENS, split=split), 3)
    x = torch.randn(rows, 2100, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(40, generator=torch.Generator().manual_seed(2))
    with interpreted(), mock.patch.object(launch, "split", lambda *sizes: (1, sizes[4])):
        whole = gpu_inputs.run_int8(x, tensors, bias, spec)
    with as_if_on("sm_90"), recording() as launches:
        gpu_inputs.run_int8(x, tensors, bias, spec)
    assert [recorded.kernel for recorded in launches[-2:]] == [int8.int8_kernel, int8.finish_kernel]
    assert launches[-2].grid[1] > 1
    for backwards in (False, True):
        with as_if_on("sm_90"), interpreted(backwards=backwards):
            assert torch.equal(gpu_inputs.run_int8(x, tensors, bias, spec), whole)


@pytest.mark.parametrize("split", [None, 3.0])
def test_values_that_are_not_finite_are_seen_in_their_row_alone(split: float | None) -> None:
    tensors, spec = layer("int8", "bytes", (20, 48), replace(TOKENS, split=split))
    x = torch.ones(4, 48)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    with interpreted():
        y = gpu_inputs.run_int8(x, tensors, None, spec)
    expected = reference.linear(x, tensors, None, spec)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert y[1].isnan().all() and not y[2].isfinite().any() and y[::3].isfinite().all()


def test_batches_strides_and_no_rows() -> None:
    tensors, spec = layer("int4", "dense", (24, 40))
    x = torch.randn(3, 2, 80)[..., ::2]
    with interpreted():
        y = gpu_inputs.run_int8(x, tensors, None, spec)
        assert gpu_inputs.run_int8(x[:0], tensors, None, spec).shape == (0, 2, 24)
    torch.testing.assert_close(y, reference.linear(x, tensors, None, spec))


def test_packed_tensors_with_gaps() -> None:
    tensors, spec = layer("int8", "bytes", (24, 40))
    apart = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in tensors]
    assert not apart[0].is_contiguous()
    x = torch.randn(2, 40)
    with interpreted():
        y = gpu_inputs.run_int8(x, apart, None, spec)
    torch.testing.assert_close(y, reference.linear(x, tensors, None, spec))


def test_short_tensors_and_wrong_shapes_are_refused() -> None:
    tensors, spec = layer("int8", "bytes", (24, 40))
    with interpreted(), pytest.raises(RuntimeError, match=r"40 columns cannot take an input of shape \(2, 41\)"):
        int8.run(torch.zeros(2, 41), tensors, None, spec)
    with interpreted(), pytest.raises(FormatError, match="needs 960 codes, found 920"):
        int8.run(torch.zeros(2, 40), [tensors[0][:23], *tensors[1:]], None, spec)


def test_what_it_declines() -> None:
    """The reasons are true: what is not integers with one scale a row, other GPUs, other inputs."""
    spec = layer("int8", "bytes", (24, 40))[1]
    assert gpu_inputs.why_not_int8(spec, torch.float16, (9, 0)) is None
    assert "float16 inputs, not torch.float64" in gpu_inputs.why_not_int8(spec, torch.float64, (9, 0))
    assert "needs compute capability 8.0" in gpu_inputs.why_not_int8(spec, torch.float16, (7, 5))
    weight = replace(spec.scheme.weight, blocks=Blocks(1, 8))
    grouped = replace(spec, scheme=replace(spec.scheme, weight=weight))
    assert "one scale for each row" in gpu_inputs.why_not_int8(grouped, torch.float16, (9, 0))
    plain = replace(spec, scheme=replace(spec.scheme, input=None))
    assert "does not quantize its input" in gpu_inputs.why_not_int8(plain, torch.float16, (9, 0))
    assert "layouts bytes and dense" in gpu_inputs.why_not_int8(replace(spec, layout="x"), torch.float16, (9, 0))


def product(rows: int, grid: str, layout: str, split: float | None, architecture: str) -> Launch:
    """The launch of the product of a layer with 4096 columns."""
    tensors, spec = layer(grid, layout, (1024, 4096), replace(TOKENS, split=split), 8 if split else 0)
    with as_if_on(architecture), recording() as launches:
        int8.run(torch.empty(rows, 4096, dtype=torch.bfloat16), tensors, None, spec)
    return next(recorded for recorded in launches if recorded.kernel is int8.int8_kernel)


MATRIX = {"sm_90": "IGMMA|IMMA", "sm_100": "UTC.*MMA|IMMA", "gfx942": "v_mfma_i32.*i8"}
WIDE = r"(LDG|LDGSTS)\.E.*\.128|(global|buffer)_load_dwordx4"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("rows", "grid", "layout", "split"),
    [(1, "int8", "bytes", 6.0), (4096, "int4", "dense", None)],
)
def test_machine_code(target: str, rows: int, grid: str, layout: str, split: float | None) -> None:
    """Integer matrix instructions on integers that logic alone has made, four at once, loaded 16 bytes at a time."""
    binary = product(rows, grid, layout, split, target).compile(target)
    assert binary.spilled == 0 and binary.shared <= (64 if target == "gfx942" else 99) << 10
    assert binary.count(MATRIX.get(target, "IMMA")) and binary.count(WIDE)
    matrix = [number for number, line in enumerate(binary.lines) if binary.count(".*MMA|v_mfma", [line])]
    between = binary.lines[matrix[0] : matrix[-1]]
    if split is None:
        assert not binary.count("I2F|v_cvt|PRMT|v_perm", between)


@pytest.mark.parametrize("target", TARGETS)
def test_parts_are_finished_without_atomics(target: str) -> None:
    """With columns in floating point of both kinds, which the second launch takes."""
    tensors, spec = layer("int8", "bytes", (1024, 4096), replace(TOKENS, split=6.0), 8)
    with as_if_on(target), recording() as launches:
        int8.run(torch.empty(1, 4096, dtype=torch.bfloat16), tensors, None, spec)
    product, finish = (recorded.compile(target) for recorded in launches[-2:])
    assert launches[-1].kernel is int8.finish_kernel
    for binary in (product, finish):
        assert binary.spilled == 0 and not binary.count(ATOMIC) and binary.count(WIDE)
    assert finish.count("HMMA|HGMMA|UTC.*MMA|v_mfma")
