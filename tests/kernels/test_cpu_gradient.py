"""Gradients of inputs through frozen weights are those of the dequantized matrix, which is never made as a whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from hfquant import HfQuantConfig, reference
from hfquant.backend import load_all
from hfquant.blocks import Blocks
from hfquant.cpu import gradient, input_grad, linear
from hfquant.errors import FormatError
from hfquant.kernel import use_kernel
from hfquant.layouts import unpack
from hfquant.nn import QLinear
from hfquant.qtensor import QTensor
from hfquant.recipe import PRESETS
from hfquant.spec import InputSpec, Scheme, TensorSpec
from hfquant.testing.weight_checks import pack_sample, quantized

from .problems import (
    DTYPES,
    ISAS,
    LIBRARY,
    WORST_LEVELS,
    WORST_WEIGHTS,
    assert_close,
    kinds,
    normal,
    packed,
    problems,
    random_weight,
)

NF4 = TensorSpec("nf4", Blocks(1, 64), False, TensorSpec("dyn8", Blocks(1, 256)))
LARGE = (
    NF4,
    TensorSpec("uint4", Blocks(1, 32), "bfloat16"),
    TensorSpec("int3", Blocks(1, 64)),
    TensorSpec("int8", Blocks(1, -1)),
)
load_all()
METHODS = PRESETS.names()


def worst_of(q: QTensor) -> dict[torch.dtype, float]:
    """How far from the exact product results may be."""
    levels = q.spec.numbers().levels() if q.levels is None else q.levels
    exact = torch.equal(levels, levels.bfloat16().float())
    return {**WORST_WEIGHTS, torch.bfloat16: (WORST_WEIGHTS if exact else WORST_LEVELS)[torch.bfloat16]}


def layout_of(spec: TensorSpec) -> str:
    return "dense" if spec.numbers().bits < 8 else "bytes"


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_the_gradient_is_that_of_the_dequantized_weight(name: str, problem: tuple) -> None:
    q, layout, x, _ = problem
    tensors, spec = packed(q, layout)
    grad = normal(len(x), q.shape[0]).to(x.dtype)
    with LIBRARY.using(name):
        found = input_grad(grad, tensors, spec)
    assert_close(found, grad, q.dequantize().T, None, worst_of(q))


@pytest.mark.parametrize("scheme", LARGE, ids=lambda scheme: scheme.grid)
def test_many_rows_of_large_weights(isa: str, scheme: TensorSpec) -> None:
    """More than are decoded, or multiplied, at once, and as many threads as there may be: the same to the last bit."""
    q = random_weight((591, 1157), scheme, 0)
    tensors, spec = packed(q, layout_of(scheme))
    grad = normal(403, 591).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 13):
            torch.set_num_threads(threads)
            found.append(input_grad(grad, tensors, spec))
    finally:
        torch.set_num_threads(before)
    assert_close(found[0], grad, q.dequantize().T, None, worst_of(q))
    if isa in ("avx512_bf16", "amx"):
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_row_is_the_same_among_many_and_alone(isa: str) -> None:
    q = random_weight((75, 200), NF4, 0)
    tensors, spec = packed(q, "dense")
    x = normal(801, 200).bfloat16()
    run = linear.bind(tensors, spec)
    assert torch.equal(run(x, tensors, None), torch.cat([run(part, tensors, None) for part in x.split(89)]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_weight(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "PANEL", 1)  # as few columns at a time as there may be
    q, layout = kinds()[kind]
    tensors, spec = packed(q, layout)
    exact, grad = unpack(tensors, spec).dequantize(), normal(5, 3, 40).to(dtype)
    found = torch.ops.hfquant.input_grad(grad, tensors, spec.key())
    assert found.shape == (5, 3, 96) and found.is_contiguous()
    assert_close(found.reshape(15, 96), grad.reshape(15, 40), exact.T, None, worst_of(q))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rotated_weight_is_multiplied_before_it_is_turned_back(dtype: torch.dtype) -> None:
    tensors, plain = packed(random_weight((40, 96), NF4, 0), "dense")
    spec, grad = replace(plain, rotated=True), normal(15, 40).to(dtype)
    wanted = grad.double() @ unpack(tensors, spec).dequantize().double()
    found = torch.ops.hfquant.input_grad(grad, tensors, spec.key())
    assert float((found.double() - wanted).norm() / wanted.norm()) <= 2 * (WORST_LEVELS[dtype] + 1e-6)


def test_the_library_multiplies_itself_in_bfloat16(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors that multiply in it; what else there is goes through panels, and both agree on the matrix."""
    tensors, spec = packed(random_weight((40, 96), NF4, 0), "dense")
    panels: list[torch.dtype] = []
    whole = gradient._in_panels
    monkeypatch.setattr(gradient, "_in_panels", lambda rows, *rest: (panels.append(rows.dtype), whole(rows, *rest)))
    for dtype in DTYPES:
        input_grad(normal(2, 40).to(dtype), tensors, spec)
    own = isa in ("avx512_bf16", "amx")
    assert panels == [dtype for dtype in DTYPES if not (own and dtype == torch.bfloat16)]


def test_the_reference_is_asked_where_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, spec = packed(random_weight((40, 96), NF4, 0), "dense")
    grad, asked = normal(2, 40), []
    own = reference.input_grad
    monkeypatch.setattr(reference, "input_grad", lambda *rest: (asked.append(rest), own(*rest))[1])
    torch.ops.hfquant.input_grad(grad, tensors, spec.key())
    assert not asked
    with use_kernel("reference"):
        torch.ops.hfquant.input_grad(grad, tensors, spec.key())
    torch.ops.hfquant.input_grad(grad.double(), tensors, spec.key())
    assert len(asked) == 2


def test_quantization_of_the_input_counts_as_identity() -> None:
    """Also of the grids that the forward kernel declines."""
    q = random_weight((40, 96), TensorSpec("int8", Blocks(1, -1)), 0)
    tensors, plain = packed(q, "bytes")
    grad = normal(3, 40).bfloat16()
    for grid in ("int8", "e4m3fn", "quantile4"):
        spec = replace(plain, scheme=Scheme(q.spec, InputSpec(TensorSpec(grid, Blocks(1, -1)))))
        found = torch.ops.hfquant.input_grad(grad, tensors, spec.key())
        assert torch.equal(found, torch.ops.hfquant.input_grad(grad, tensors, plain.key()))


def test_values_that_are_not_numbers_stay_visible(isa: str) -> None:
    tensors, spec = packed(random_weight((20, 200), TensorSpec("e2m1", Blocks(1, 32)), 0), "dense")
    grad = normal(9, 20).bfloat16()
    grad[4, 7] = torch.nan
    found = input_grad(grad, tensors, spec)
    assert found[4].isnan().all() and found[:4].isfinite().all() and found[5:].isfinite().all()


def test_empty_gradients_and_tensors_that_are_too_short(isa: str) -> None:
    tensors, spec = packed(random_weight((40, 96), NF4, 0), "dense")
    assert input_grad(torch.empty(0, 3, 40).bfloat16(), tensors, spec).shape == (0, 3, 96)
    for index in range(len(tensors)):
        short = [tensor[:-1] if at == index else tensor for at, tensor in enumerate(tensors)]
        with pytest.raises(FormatError, match="the checkpoint is damaged"):
            input_grad(normal(1, 40).bfloat16(), short, spec)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_falls_back_to_the_reference(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would make the whole matrix. Gradients of every method go through the kernel that its layers have."""
    monkeypatch.setattr(reference, "input_grad", lambda *_: pytest.fail("the reference was asked"))
    recipe = HfQuantConfig(method).recipe
    q = quantized(normal(48, 128, seed=3), recipe)
    layer = QLinear(128, 48, None, torch.float32)
    layer.hold(*pack_sample(q, recipe))
    for dtype in DTYPES:
        x, grad = normal(5, 128).to(dtype).requires_grad_(), normal(5, 48, seed=2).to(dtype)
        layer(x).backward(grad)
        assert x.grad is not None
        wanted = grad.double() @ unpack(layer.packed(), layer.spec).dequantize().double()
        assert float((x.grad.double() - wanted).norm() / wanted.norm()) <= 2 * (WORST_LEVELS[dtype] + 1e-6)
