"""A packed weight that a Triton kernel writes as a matrix is what `QTensor.dequantize` says."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfquant import ops
from hfquant.blocks import Blocks
from hfquant.errors import FormatError
from hfquant.gpu import weight_only as gpu
from hfquant.kernel import use_kernel
from hfquant.kernels.triton import dequantize
from hfquant.spec import TensorSpec

from ..problems import DTYPES, packed, random_weight
from .compiled import TARGETS, recording
from .interpret import interpreted
from .products import problems, registered, with_outliers


@settings(max_examples=60, deadline=None)
@given(problem=problems(), share=st.tuples(st.floats(0, 1), st.floats(0, 1)), tiny=st.booleans())
def test_columns_are_those_of_the_dequantized_weight(problem: tuple, share: tuple, tiny: bool) -> None:
    q, layout, x, _ = problem
    if tiny and isinstance(q.scale, torch.Tensor):  # weights that are subnormal, and one scale that is no number
        q.scale.mul_(torch.finfo(q.scale.dtype).tiny)
        q.scale.view(-1)[0] = torch.nan
    tensors, spec = packed(q, layout)
    first, last = (0, q.shape[1]) if q.order is not None else sorted(round(at * q.shape[1]) for at in share)
    with interpreted():
        found = dequantize.columns(tensors, spec, x.dtype, first, last)
    torch.testing.assert_close(found, q.dequantize(x.dtype)[:, first:last], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fitted_levels_kept_columns_and_another_order(dtype: torch.dtype) -> None:
    plain = random_weight((40, 96), TensorSpec("int4", Blocks(1, 32)), 0)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)).int()
    fitted = replace(plain, spec=TensorSpec("quantile4", Blocks(1, 32)), levels=torch.arange(16.0) / 7 - 1)
    for q in (fitted, with_outliers(plain, 2, 0), replace(with_outliers(plain, 2, 0), order=order)):
        tensors, spec = packed(q, "dense")
        with interpreted():
            assert torch.equal(dequantize.columns(tensors, spec, dtype, 0, 96), q.dequantize(dtype))


def test_the_operator_takes_it_and_gradients_keep_their_kernel() -> None:
    """The kernel stands for "cpu" here, where the tests have their tensors."""
    q = random_weight((40, 96), TensorSpec("int4", Blocks(1, 32)), 0)
    tensors, spec = packed(q, "dense")
    here = replace(gpu.KERNEL, name="triton_here", device="cpu", priority=99)
    with mock.patch.object(dequantize, "columns", wraps=dequantize.columns) as used, registered(here), interpreted():
        assert torch.equal(ops.dequantize(tensors, spec.key(), torch.bfloat16), q.dequantize(torch.bfloat16))
        assert used.call_count == 1
        torch.ops.hfquant.input_grad(torch.ones(2, 40), tensors, spec.key())
        with use_kernel("reference"):
            assert torch.equal(ops.dequantize(tensors, spec.key(), torch.float32), q.dequantize())
    assert used.call_count == 1


def test_tensors_that_are_too_short_are_refused() -> None:
    tensors, spec = packed(random_weight((16, 64), TensorSpec("uint4", Blocks(1, 32), True), 0), "dense")
    for index in range(len(tensors)):
        short = [tensor[:-1] if at == index else tensor for at, tensor in enumerate(tensors)]
        with pytest.raises(FormatError, match="the checkpoint is damaged"):
            gpu.columns(short, spec, torch.float32, 0, 64)


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code(target: str) -> None:
    """Sixteen bytes are read and written at once, and only the place of a tile is divided, by converting."""
    tensors, spec = packed(
        random_weight((256, 1024), TensorSpec("uint4", Blocks(1, 128), True, "bfloat16"), 0), "dense"
    )
    with recording() as launches:
        dequantize.columns(tensors, spec, torch.bfloat16, 0, 1024)
    binary = launches[0].compile(target)
    assert binary.spilled == 0
    assert binary.count(r"LDG\.E.*\.128|(global|buffer)_load_dwordx[24]")
    assert binary.count(r"STG\.E.*\.128|(global|buffer)_store_dwordx4")
    assert binary.count("F2I|I2F|v_cvt_f32_[iu]") < 4
