"""Layouts are exact inverses for every grid, block shape and optional part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hfquant  # noqa: F401  registers the tables of the core
from hfquant.blocks import Blocks
from hfquant.errors import FormatError, SpecError
from hfquant.layouts import LAYOUTS, Dense, default_layout, packed_spec, unpack
from hfquant.qtensor import QTensor
from hfquant.quantize import bits_per_weight, pack, pack_empty, quantize_linear
from hfquant.recipe import Recipe, Step
from hfquant.spec import SCALE_DTYPES, Scheme, TensorSpec
from hfquant.stats import Stats

GRIDS = [
    "int2",
    "int3",
    "int4",
    "int4n",
    "int5",
    "int6",
    "int7",
    "int8",
    "nf4",
    "fp4",
    "e2m1",
    "e3m2",
    "e4m3fn",
    "dyn6",
]
UNSIGNED = [f"uint{b}" for b in range(2, 9)]
FITTED = ["quantile2", "quantile3", "quantile8"]
DOUBLE = TensorSpec("uint8", Blocks(1, 5), scale="float32")
NESTED = TensorSpec("e4m3fn", Blocks(1, 16), scale=TensorSpec("uint8", Blocks(1, -1), scale="float16"))

scales = st.sampled_from(["float32", "float16", "bfloat16", DOUBLE, NESTED])
blocks = st.builds(Blocks, st.sampled_from([-1, 1, 1, 1, 3, 4]), st.sampled_from([-1, 1, 4, 5, 16]))
specs = st.one_of(
    st.builds(TensorSpec, st.sampled_from(GRIDS + FITTED), blocks, st.just(False), scales),
    st.builds(TensorSpec, st.sampled_from(UNSIGNED), blocks, st.sampled_from([True, *SCALE_DTYPES]), scales),
)
shapes = st.tuples(st.integers(1, 9), st.integers(2, 21))


@st.composite
def weights(draw: st.DrawFn) -> tuple[QTensor, Recipe]:
    """A quantized weight with any mixture of parts, and its recipe."""
    spec, shape = draw(specs), draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    w = torch.randn(shape, generator=generator)
    columns = draw(st.sampled_from([Step("none"), Step("proxy", {"fraction": 0.1})]))
    layout = draw(st.sampled_from(["bytes", None]))
    recipe = Recipe(Scheme(spec), columns=columns, layout=layout)
    return quantize_linear(w, recipe, Stats("w", torch.rand(shape[1], generator=generator))), recipe


def same(one: QTensor, other: QTensor) -> bool:
    """Whether two quantized weights are equal in every part."""

    def equal(x: object, y: object) -> bool:
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        if isinstance(x, QTensor) and isinstance(y, QTensor):
            return same(x, y)
        return x is None and y is None

    parts = [(one.codes, other.codes), (one.scale, other.scale), (one.zero, other.zero), (one.order, other.order)]
    parts.append((one.levels, other.levels))
    if one.outliers is not None and other.outliers is not None:
        parts += [(one.outliers.index, other.outliers.index), (one.outliers.weight, other.outliers.weight)]
    alike = (one.outliers is None) == (other.outliers is None) and one.spec == other.spec
    return alike and all(equal(x, y) for x, y in parts)


@given(weights())
def test_unpack_inverts_pack(weight: tuple[QTensor, Recipe]) -> None:
    q, recipe = weight
    packed, spec = pack(q, recipe)
    restored = unpack(list(packed.values()), spec)
    assert same(restored, q)
    assert torch.equal(restored.dequantize(), q.dequantize())


@given(weights())
def test_what_is_packed_is_known_from_the_shape_alone(weight: tuple[QTensor, Recipe]) -> None:
    q, recipe = weight
    packed, spec = pack(q, recipe)
    empty, empty_spec = pack_empty(
        q.shape, recipe, torch.float32, 0 if q.outliers is None else q.outliers.index.numel()
    )
    assert all(value.is_meta for value in empty.values()) and empty_spec == spec
    assert {k: (v.shape, v.dtype) for k, v in empty.items()} == {k: (v.shape, v.dtype) for k, v in packed.items()}


@given(weights(), st.lists(st.integers(0, 8), min_size=0, max_size=5))
def test_rows_are_rows_of_the_matrix(weight: tuple[QTensor, Recipe], chosen: list[int]) -> None:
    q, recipe = weight
    packed, spec = pack(q, recipe)
    index = torch.tensor(chosen, dtype=torch.int64) % q.shape[0]
    rows = LAYOUTS.get(spec.layout).rows(packed, index, q.shape, recipe.scheme.weight)
    assert torch.equal(rows, q.dequantize()[index])


def test_rows_follow_the_order_of_columns() -> None:
    recipe = Recipe(Scheme(TensorSpec("int4", Blocks(1, 4))))
    q = quantize_linear(torch.randn(6, 11, generator=torch.Generator().manual_seed(0)), recipe)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    shuffled = replace(q, order=order)
    packed, spec = pack(shuffled, recipe)
    assert same(unpack(list(packed.values()), spec), shuffled)
    index = torch.tensor([5, 0, 5])
    rows = LAYOUTS.get(spec.layout).rows(packed, index, q.shape, recipe.scheme.weight)
    assert torch.equal(rows[:, order.long()], q.dequantize()[index])


@pytest.mark.parametrize("bits", range(2, 8))
def test_dense_leaves_no_gaps(bits: int) -> None:
    recipe = Recipe(Scheme(TensorSpec(f"int{bits}", Blocks(1, -1))))
    packed, spec = pack(quantize_linear(torch.randn(16, 64), recipe), recipe)
    assert spec.layout == "dense" and packed["codes"].shape == (16, 8 * bits)
    assert bits_per_weight(packed, (16, 64)) == bits + 32 / 64


def test_bytes_hold_what_dense_cannot() -> None:
    spec = TensorSpec("int8", Blocks(1, -1))
    assert default_layout(spec) == "bytes" and default_layout(TensorSpec("nf4", Blocks(1, 64))) == "dense"
    assert "this grid has 8: use 'bytes'" in str(Dense().why_not(spec))
    q = quantize_linear(torch.randn(4, 8), Recipe(Scheme(spec)))
    with pytest.raises(SpecError, match=r"layout 'dense' cannot store int8.*use 'bytes'"):
        Dense().pack(q)


@pytest.mark.parametrize("width", [7, 9])
def test_a_stored_row_of_the_wrong_width_is_refused(width: int) -> None:
    spec = TensorSpec("int4", Blocks(1, -1))
    packed = {"codes": torch.zeros(3, width, dtype=torch.uint8), "scale": torch.ones(3, 1)}
    with pytest.raises(FormatError, match=f"16 codes with 4 bits take 8 bytes, found {width}"):
        Dense().unpack(packed, (3, 16), spec)


def test_packed_spec_counts_outliers() -> None:
    recipe = Recipe(Scheme(TensorSpec("int4", Blocks(1, -1))), columns=Step("proxy", {"fraction": 0.25}))
    q = quantize_linear(torch.randn(4, 8), recipe, Stats("w", torch.arange(8.0)))
    packed, spec = pack(q, recipe)
    assert spec == packed_spec(packed, "dense", (4, 8), recipe.scheme) and spec.outliers == 2
    assert set(spec.names) == {"codes", "scale", "outlier_index", "outlier_weight"}
