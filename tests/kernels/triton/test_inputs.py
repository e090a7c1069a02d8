"""Inputs quantized on a GPU are those of the reference, to the last bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfquant import reference
from hfquant.blocks import Blocks
from hfquant.grids import grid as named
from hfquant.kernels.triton.inputs import (
    Quantized,
    list_kernel,
    mark_kernel,
    outlying,
    peak_kernel,
    quantize,
    quantize_kernel,
)
from hfquant.qtensor import InputParams, Outliers
from hfquant.spec import InputSpec, TensorSpec

from .compiled import TARGETS, recording
from .interpret import interpreted

EIGHT = {"e4m3fn": torch.float8_e4m3fn, "e5m2ieee": torch.float8_e5m2}
FLOATS = ("e2m1", "e3m0", "e1m2", "e2m1b7", "e3m2b-4", "e4m3", "e2m5", "e5m0b20", "ue2m2", "e3m0b40")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def values(found: Quantized, grid: str, columns: int, width: int, planes: bool = False) -> torch.Tensor:
    """The quantized input [M, K] float32."""
    codes = found.codes.view(EIGHT[grid]) if found.codes.dtype == torch.uint8 else found.codes
    if planes:
        codes = torch.stack(codes.chunk(2, 1), 2).flatten(1)
    width = columns if width == -1 else width
    return codes[:, :columns].float() * found.scale.repeat_interleave(width, 1)[:, :columns]


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@st.composite
def inputs(draw: st.DrawFn, most: int = 300) -> torch.Tensor:
    """Rows of very different sizes with values of all kinds, those in the middle of two levels among them."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp(4 * torch.randn(rows, 1, generator=generator))
    if draw(st.booleans()):  # halves of a row's largest level: ties
        x = (torch.randint(-254, 255, (rows, columns), generator=generator)) / 2
        x[:, 0] = draw(st.sampled_from([127.0, 448.0, 6.0, 64.0]))
    for special in draw(st.lists(st.sampled_from([0.0, -0.0, 1e-42, 1e-38, float("nan"), float("inf")]), max_size=3)):
        x[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] = special
    x[draw(st.integers(0, rows - 1))] *= draw(st.sampled_from([0.0, 1.0]))
    return x.to(draw(st.sampled_from(DTYPES)))


@settings(max_examples=50, deadline=None)
@given(inputs(), st.sampled_from(["int8", "int8n", "int4", *EIGHT, *FLOATS]), st.data())
def test_ranges_found_at_run_time(x: torch.Tensor, grid: str, data: st.DataObject) -> None:
    """For each token, group or all: blocks with NaN or infinity become NaN, no others do."""
    blocks = data.draw(st.sampled_from([Blocks(1, -1), Blocks(1, 128), Blocks(1, 32), Blocks(1, 20), Blocks(-1, -1)]))
    planes = data.draw(st.booleans())
    width = min(blocks.cols, x.shape[1]) if blocks.cols > 0 else -1
    store = "int8" if grid.startswith("int") else "float8" if grid in EIGHT else "bfloat16"
    store = data.draw(st.sampled_from([store, "bfloat16"]))
    with interpreted():
        found = quantize(x, named(grid), store, width, whole=blocks.rows == -1, planes=planes)
    expected = reference.round_trip(x.float(), TensorSpec(grid, blocks))
    same(values(found, grid, x.shape[1], width, planes), expected)


@settings(max_examples=25, deadline=None)
@given(inputs(), st.sampled_from(["int8", "int4n", *EIGHT, *FLOATS]), st.sampled_from([0.02, 0.3, 1e-12]))
def test_ranges_found_by_calibration(x: torch.Tensor, grid: str, scale: float) -> None:
    """A row with a value that is not finite is NaN as a whole: its products would be."""
    store = "int8" if grid.startswith("int") else "float8" if grid in EIGHT else "bfloat16"
    params = InputParams(torch.tensor([scale]))
    with interpreted():
        found = quantize(x, named(grid), store, given=params.scale)
    expected = reference.static_round_trip(x.float(), TensorSpec(grid, Blocks(-1, -1)), params)
    expected = expected + (x.float() - x.float()).sum(1, keepdim=True)
    same(values(found, grid, x.shape[1], -1), expected)


@settings(max_examples=25, deadline=None)
@given(inputs(), st.sampled_from([None, 0.5, 3.0]), st.booleans(), st.data())
def test_columns_that_stay_in_floating_point(
    x: torch.Tensor, split: float | None, planes: bool, data: st.DataObject
) -> None:
    """They are those of the reference, the others are quantized as if they were 0; sums are those of the codes."""
    stored = data.draw(st.lists(st.integers(0, x.shape[1] - 1), max_size=4, unique=True).map(sorted))
    index = torch.tensor(stored, dtype=torch.int32) if stored else None
    outliers = None if index is None else Outliers(index, torch.zeros(1, len(stored)))
    spec = InputSpec(TensorSpec("int8", Blocks(1, -1)), split=split)
    keep = reference.outlier_columns(x.float(), split, outliers)
    with interpreted():
        found = outlying(x, split, index)
        kept = None if found is None else found.keep
        codes = quantize(x, named("int8"), "int8", keep=kept, planes=planes, sums=True)
    assert torch.equal(torch.zeros_like(keep) if found is None else found.keep != 0, keep)
    seen = values(codes, "int8", x.shape[1], -1, planes)
    expected = reference.quantize_input(x.float(), spec, outliers)
    same(seen[:, ~keep], expected[:, ~keep])
    bare = torch.stack(codes.codes.chunk(2, 1), 2).flatten(1) if planes else codes.codes
    bare = bare[:, : x.shape[1]]
    assert torch.equal(bare.int().sum(1), codes.sums) and not bare[codes.scale.isfinite().flatten()][:, keep].any()
    if split is not None:
        large = keep.clone()
        large[[] if index is None else index.long()] = False
        assert torch.equal(found.index[: int(found.count)], large.nonzero().flatten().int())


@pytest.mark.parametrize("grid", EIGHT)
def test_patterns_of_float8_are_those_of_torch(grid: str) -> None:
    """Every level, every middle of two, and what lies next to it."""
    levels = named(grid).levels().double()
    middle = ((levels[1:] + levels[:-1]) / 2).float()
    near = [torch.nextafter(middle, torch.tensor(side)) for side in (-torch.inf, torch.inf)]
    x = torch.cat([levels.float(), middle, *near])[None]
    with interpreted():
        found = quantize(x, named(grid), "float8")
    assert found.scale.item() == 1.0
    same(found.codes[:, : x.shape[1]].view(EIGHT[grid]).float(), x.to(EIGHT[grid]).float())


def test_rows_longer_than_a_block() -> None:
    x = torch.randn(2, 5001, generator=torch.Generator().manual_seed(0))
    x[:, 4999] = 30
    with interpreted():
        found = quantize(x, named("int8"), "int8")
        whole = quantize(x, named("e4m3fn"), "float8", whole=True)
    same(values(found, "int8", 5001, -1), reference.round_trip(x, TensorSpec("int8", Blocks(1, -1))))
    same(values(whole, "e4m3fn", 5001, -1), reference.round_trip(x, TensorSpec("e4m3fn", Blocks(-1, -1))))


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code(target: str) -> None:
    """Values are loaded 16 bytes at a time and become codes without conversions between integers and numbers."""
    x = torch.empty(64, 4096, dtype=torch.bfloat16)
    with recording() as launches:
        quantize(x, named("int8"), "int8", keep=outlying(x, 6.0, None).keep, sums=True)
        quantize(x, named("e4m3fn"), "float8", 128)
        quantize(x, named("e2m1"), "bfloat16", whole=True)
    mark, listing, *others, _ = launches
    assert [launch.kernel for launch in (mark, listing)] == [mark_kernel, list_kernel]
    assert [launch.kernel for launch in others] == [quantize_kernel, quantize_kernel, peak_kernel]
    assert [launch.compile(target).spilled for launch in (mark, listing)] == [0, 0]
    for launch in others:
        binary = launch.compile(target)
        wide = r"(global|buffer)_load_dwordx4" if target == "gfx942" else r"LDG\.E.*\.128"
        assert binary.spilled == 0 and binary.count(wide), "16 bytes a load"
        assert not binary.count("F2I|I2F|v_cvt_f32_[iu]", binary.loop or binary.lines)
