"""Weights that the Triton kernels are tried on, and what their results may be off by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from hfquant.blocks import Blocks
from hfquant.kernel import KERNELS, Kernel, choose
from hfquant.kernels.triton import launch
from hfquant.qtensor import Outliers, QTensor
from hfquant.spec import TensorSpec

from ..problems import DTYPES, GRIDS, HALF, SUMS, drawn_bias, drawn_input, random_weight
from .interpret import interpreted

PROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "gfx942": 304, "none": 4}
# Of sum |x w|, for any input and each result: half a last place of the result where codes are integers; where levels
# are not numbers of the type, or a weight is scaled before the product, half a last place for each of these, too.
LAST = {torch.bfloat16: HALF, torch.float16: 2.0**-11, torch.float32: 0.0}


@contextmanager
def as_if_on(target: str) -> Iterator[None]:
    """Choose tiles as on a GPU of a target."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "hardware", lambda device: launch.Hardware(target, PROCESSORS[target]))
        yield


@contextmanager
def registered(kernel: Kernel) -> Iterator[None]:
    """A kernel in the table for the time of a test."""
    before = KERNELS.entries()
    KERNELS.add(kernel.name, kernel, "a test")
    choose.cache_clear()
    try:
        yield
    finally:
        KERNELS.restore(before)
        choose.cache_clear()


def interpret(q: QTensor, layout: str, x: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """The product that the kernels compute."""
    from ..problems import packed

    tensors, spec = packed(q, layout)
    with interpreted(**options):
        return launch.bind(tensors, spec)(x, tensors, bias)


def roundings(q: QTensor, dtype: torch.dtype) -> int:
    """How often a product is rounded to the dtype: the result, a level, a scaled weight."""
    levels = q.spec.numbers().levels() if q.levels is None else q.levels
    group = q.spec.blocks.sides(q.shape)[1]
    in_between = isinstance(q.spec.zero, str) or not torch.equal(levels, levels.to(dtype).float())
    return 1 + int(in_between) + int(group % 16 != 0 and group < q.shape[1])


def assert_near(y: Tensor, x: Tensor, q: QTensor, bias: Tensor | None) -> None:
    """Each result is as near to x W^T + bias as its dtype allows."""
    weight = q.dequantize().double()
    offset = torch.zeros(1).double() if bias is None else bias.double()
    exact, terms = x.double() @ weight.T + offset, x.double().abs() @ weight.abs().T + offset.abs()
    allowed = (1 + LAST[y.dtype]) ** roundings(q, y.dtype) - 1 + SUMS
    tiny = torch.finfo(y.dtype).smallest_normal * x.shape[1]
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert ((y.double() - exact).abs() <= allowed * terms + tiny).all()


@st.composite
def problems(draw: st.DrawFn) -> tuple[QTensor, str, Tensor, Tensor | None]:
    """A weight of any kind, its layout, an input and a bias."""
    grid, shape = draw(st.sampled_from(GRIDS)), (draw(st.integers(1, 80)), draw(st.integers(1, 400)))
    if draw(st.booleans()):
        shape = shape[0], draw(st.sampled_from([128, 256, 384, 512]))
    blocks = Blocks(draw(st.sampled_from([1, 1, 16, -1])), draw(st.sampled_from([-1, 16, 32, 64, 128, 12, 40, 96, 1])))
    how: Any = draw(st.sampled_from(["float32", "bfloat16", "float16", TensorSpec("dyn8", Blocks(1, 256))]))
    zero = grid.startswith("uint") and draw(st.sampled_from([False, True, "float32", "bfloat16"]))
    spec = TensorSpec(grid, blocks, zero, how)
    layout = draw(st.sampled_from(["dense", "bytes"])) if spec.numbers().bits < 8 else "bytes"
    seed, dtype = draw(st.integers(0, 2**31)), draw(st.sampled_from(DTYPES))
    q = random_weight(shape, spec, seed)
    generator = torch.Generator().manual_seed(seed + 3)
    if draw(st.booleans()):
        q = replace(q, order=torch.randperm(shape[1], generator=generator).int())
    x = drawn_input(draw, draw(st.sampled_from([1, 2, 4, 5, 17, 70])), shape[1], dtype, seed + 1)
    return q, layout, x, drawn_bias(draw, shape[0], seed + 2)


def with_outliers(q: QTensor, count: int, seed: int) -> QTensor:
    """The weight with some columns in 16 bit."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(q.shape[1], generator=generator)[:count].sort().values.int()
    return replace(q, outliers=Outliers(index, torch.randn(q.shape[0], count, generator=generator).bfloat16()))
