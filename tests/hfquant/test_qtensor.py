"""`QTensor.dequantize` defines what is correct, so it is spelled out here element by element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hfquant  # noqa: F401  registers the grids of the core
from hfquant import blocks as module
from hfquant.blocks import Blocks
from hfquant.grids import grid
from hfquant.qtensor import Outliers, QTensor
from hfquant.spec import TensorSpec

sides = st.sampled_from([-1, 1, 2, 3, 8])


@st.composite
def tensors(draw: st.DrawFn) -> QTensor:
    """Random parts, not the result of quantizing something."""
    shape = draw(st.tuples(st.integers(1, 7), st.integers(2, 13)))
    name = draw(st.sampled_from(["int4", "uint3", "nf4", "e4m3fn", "quantile3"]))
    how = draw(st.sampled_from([True, "float32", "bfloat16"])) if name == "uint3" else False
    nested = draw(st.booleans())
    inner = TensorSpec("uint8", Blocks(1, draw(st.integers(1, 9))))
    spec = TensorSpec(name, draw(st.builds(Blocks, sides, sides)), how, inner if nested else "bfloat16")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    counts = spec.blocks.counts(shape)
    size = 8 if name == "quantile3" else grid(name).size

    def codes(shape: tuple[int, ...], count: int) -> torch.Tensor:
        return torch.randint(0, count, shape, generator=generator).to(torch.uint8)

    scale: torch.Tensor | QTensor = torch.rand(counts, generator=generator).to(torch.bfloat16)
    if nested:
        row = (1, counts[0] * counts[1])
        outer = torch.rand(inner.blocks.counts(row), generator=generator)
        scale = QTensor(codes(row, 256), outer, None, None, inner)
    outliers = None
    if draw(st.booleans()):
        index = torch.randperm(shape[1], generator=generator)[:2].sort().values.to(torch.int32)
        outliers = Outliers(index, torch.randn(shape[0], 2, generator=generator).to(torch.bfloat16))
    order = torch.randperm(shape[1], generator=generator).to(torch.int32) if draw(st.booleans()) else None
    levels = torch.randn(8, generator=generator).sort().values if name == "quantile3" else None
    zero = codes(counts, 8) if spec.zero else None
    if isinstance(how, str):
        zero = (9 * torch.randn(counts, generator=generator)).to(spec.zero_dtype)
    return QTensor(codes(shape, size), scale, zero, order, spec, levels, outliers)


def by_hand(q: QTensor) -> torch.Tensor:
    """One element at a time, in float32."""
    out = torch.empty(q.shape)
    height, width = q.spec.blocks.sides(q.shape)
    columns = q.spec.blocks.counts(q.shape)[1]
    levels = q.levels if q.levels is not None else q.spec.numbers().levels()
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            r, c = i // height, j // width
            number = levels[int(q.codes[i, j])]
            if q.zero is not None:
                number = number - q.zero[r, c].float()
            scale = by_hand(q.scale)[0, r * columns + c] if isinstance(q.scale, QTensor) else q.scale[r, c].float()
            out[i, j if q.order is None else int(q.order[j])] = number * scale
    if q.outliers is not None:
        for k, column in enumerate(q.outliers.index.tolist()):
            out[:, column] = q.outliers.weight[:, k].float()
    return out


@given(tensors())
def test_dequantize_is_levels_times_scale(q: QTensor) -> None:
    assert torch.equal(q.dequantize(), by_hand(q))


@given(tensors(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_other_dtypes_are_rounded_once(q: QTensor, dtype: torch.dtype) -> None:
    assert torch.equal(q.dequantize(dtype), q.dequantize().to(dtype))


@given(tensors(), st.integers(1, 40))
def test_chunks_do_not_show(q: QTensor, chunk: int) -> None:
    whole = q.dequantize()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        assert torch.equal(q.dequantize(), whole)


def test_no_rows_give_no_rows() -> None:
    q = QTensor(torch.empty(0, 4, dtype=torch.uint8), torch.ones(0, 1), None, None, TensorSpec("int4", Blocks(1, -1)))
    assert q.dequantize().shape == (0, 4)
