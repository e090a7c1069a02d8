"""Rounding to nearest under the parameters as stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hfquant  # noqa: F401  registers the tables of the core
from hfquant import blocks as module
from hfquant.blocks import Blocks
from hfquant.quantize import quantize_linear
from hfquant.ranges import absmax
from hfquant.recipe import Recipe
from hfquant.rounders import nearest
from hfquant.spec import Scheme, TensorSpec
from hfquant.stats import Stats

DOUBLE = TensorSpec("uint8", Blocks(1, 256))
scales = st.sampled_from(["float32", "float16", "bfloat16", DOUBLE])
blocks = st.builds(Blocks, st.sampled_from([1, 1, 3, -1]), st.sampled_from([4, 7, 16, -1]))
symmetric = st.sampled_from(["int2", "int3n", "int4", "int8", "nf4", "fp4", "e2m1", "e3m0", "e4m3fn", "dyn8"])
specs = st.one_of(
    st.builds(TensorSpec, symmetric, blocks, st.just(False), scales),
    st.builds(TensorSpec, st.sampled_from(["uint2", "uint4", "uint8"]), blocks, st.just(True), scales),
)


@given(specs, st.integers(0, 10**6), st.sampled_from([1e-6, 1e-3, 1.0, 1e4]))
def test_no_other_code_is_nearer_under_the_stored_scale(spec: TensorSpec, seed: int, size: float) -> None:
    w = torch.randn(5, 21, generator=torch.Generator().manual_seed(seed)) * size
    q = quantize_linear(w, Recipe(Scheme(spec)))
    scale = spec.blocks.expand(q.scale_values(), (5, 21)).expand(5, 21).double()
    levels = spec.numbers().levels().double().expand(5, 21, -1)
    if q.zero is not None:
        levels = levels - spec.blocks.expand(q.zero, (5, 21)).expand(5, 21).double()[..., None]
    best = (levels * scale[..., None] - w.double()[..., None]).abs().amin(-1)
    error = (q.dequantize().double() - w.double()).abs()
    # The division by the scale and the product with it are rounded to float32 once each.
    assert (error <= best + 4 * 2**-24 * w.abs()).all()


@given(st.integers(0, 10**6), st.integers(1, 64))
def test_chunks_do_not_show(seed: int, chunk: int) -> None:
    w = torch.randn(9, 14, generator=torch.Generator().manual_seed(seed))
    for spec in (
        TensorSpec("uint4", Blocks(2, 5), True),
        TensorSpec("nf4", Blocks(1, 4)),
        TensorSpec("quantile3", Blocks(1, 4)),
    ):
        whole = quantize_linear(w, Recipe(Scheme(spec)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_CHUNK", chunk)
            parts = quantize_linear(w, Recipe(Scheme(spec)))
        assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.dequantize(), parts.dequantize())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fitted_levels_travel_with_the_weight_in_a_known_shape(bits: int) -> None:
    spec = TensorSpec(f"quantile{bits}", Blocks(1, 8))
    w = torch.tensor([[1.0, -1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]])  # fewer distinct values than levels
    q = nearest(w, spec, absmax, Stats())
    assert q.levels is not None and q.levels.shape == (2**bits,) and q.levels.dtype == torch.float32
    assert (q.levels.diff() >= 0).all() and int(q.codes.max()) < 2**bits


def test_codes_and_zero_points_are_bytes() -> None:
    w = torch.randn(4, 16)
    q = quantize_linear(w, Recipe(Scheme(TensorSpec("uint8", Blocks(1, 8), True))))
    assert q.codes.dtype == torch.uint8 and q.zero is not None and q.zero.dtype == torch.uint8
    assert q.zero.shape == (4, 2) and q.shape == (4, 16)
