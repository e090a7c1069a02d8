"""The reference kernel is the float64 product of what is stored, and of what the input is rounded to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hfquant  # noqa: F401  registers the tables of the core
from hfquant import reference
from hfquant.blocks import Blocks
from hfquant.qtensor import QTensor
from hfquant.quantize import pack, quantize_linear
from hfquant.recipe import Recipe, Step
from hfquant.spec import InputSpec, PackedSpec, Scheme, TensorSpec
from hfquant.stats import Stats

TOKEN = TensorSpec("int8n", Blocks(1, -1))
ROW = TensorSpec("int8n", Blocks(1, -1))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_weight(w: Tensor, scheme: Scheme, outliers: float = 0.0) -> tuple[QTensor, list[Tensor], PackedSpec]:
    columns = Step("proxy", {"fraction": outliers}) if outliers else Step("none")
    recipe = Recipe(scheme, columns=columns)
    q = quantize_linear(w, recipe, Stats("w", torch.arange(float(w.shape[1]))))
    packed, spec = pack(q, recipe)
    return q, list(packed.values()), spec


@pytest.mark.parametrize("name", ["int4", "nf4", "e2m1", "int8", "quantile3", "uint4"])
@given(seed=st.integers(0, 1000), kept=st.sampled_from([0.0, 0.1]), biased=st.booleans())
def test_linear_is_the_product_with_the_dequantized_weight(name: str, seed: int, kept: float, biased: bool) -> None:
    spec = TensorSpec(name, Blocks(1, 16), name.startswith("u"), "bfloat16")
    q, packed, packed_spec = packed_weight(random(11, 37, seed=seed), Scheme(spec), kept)
    x, bias = random(2, 3, 37, seed=seed + 1), random(11, seed=seed + 2) if biased else None
    exact = x.double() @ q.dequantize().double().T + (0 if bias is None else bias.double())
    y = reference.linear(x, packed, bias, packed_spec)
    assert y.shape == (2, 3, 11) and y.dtype == torch.float32
    # Rounding errors of a sum of 38 terms.
    size = x.double().abs() @ q.dequantize().double().abs().T + (0 if bias is None else bias.double().abs())
    assert ((y.double() - exact).abs() <= 38 * 2**-24 * size).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x, bias = random(4, 32).to(dtype), random(8)
    q, packed, spec = packed_weight(random(8, 32), Scheme(ROW))
    y = reference.linear(x, packed, bias, spec)
    exact = x.double() @ q.dequantize().double().T + bias.double()
    assert y.dtype == dtype
    assert (
        float((y.double() - exact).norm() / exact.norm()) < torch.finfo(dtype).eps
    )  # weight, bias and sum are rounded
    _, packed, spec = packed_weight(random(8, 32), Scheme(ROW, InputSpec(TOKEN)))
    # With a quantized input everything but the result is computed in float32.
    y = reference.linear(x, packed, bias, spec)
    assert torch.equal(y, reference.linear(x.float(), packed, bias, spec).to(dtype))


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 40))
def test_a_quantized_input_is_an_integer_product(seed: int, tokens: int, width: int) -> None:
    w, x = random(9, width, seed=seed), random(tokens, width, seed=seed + 1)
    _, packed, spec = packed_weight(w, Scheme(ROW, InputSpec(TOKEN)))
    # LLM.int8, equation 7, written out: codes and their 32-bit integer product, then both scales.
    x_scale = x.abs().amax(1, keepdim=True) / 127
    x_codes = (x / x_scale).round().to(torch.int32)
    w_scale = w.abs().amax(1, keepdim=True) / 127
    w_codes = (w / w_scale).round().to(torch.int32)
    accumulated = (x_codes[:, None, :] * w_codes[None, :, :]).sum(-1, dtype=torch.int32)
    expected = accumulated.double() * x_scale.double() * w_scale.double().T
    y = reference.linear(x, packed, None, spec)
    size = (x_codes.double() * x_scale).abs() @ (w_codes.double() * w_scale).abs().T
    assert ((y.double() - expected).abs() <= (width + 4) * 2**-24 * size).all()


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.1]))
def test_split_columns_are_not_rounded(seed: int, kept: float) -> None:
    x = random(5, 40, seed=seed)
    x[2, 7] = 8.0
    x[:, 21] = -6.0
    q, _, spec = packed_weight(random(6, 40, seed=seed + 1), Scheme(ROW, InputSpec(TOKEN, split=6.0)), kept)
    mask = reference.outlier_columns(x, 6.0, q.outliers)
    assert set(mask.nonzero()[:, 0].tolist()) == {7, 21, *([36, 37, 38, 39] if kept else [])}
    seen = reference.quantize_input(x, spec.scheme.input, q.outliers)
    assert torch.equal(seen[:, mask], x[:, mask])
    # The others are rounded as if the split columns were not there.
    alone = reference.round_trip(x[:, ~mask].contiguous(), TOKEN)
    assert torch.equal(seen[:, ~mask], alone)
    assert not torch.equal(alone, x[:, ~mask])


def test_split_of_everything_is_the_exact_product() -> None:
    q, packed, spec = packed_weight(random(6, 40), Scheme(ROW, InputSpec(TOKEN, split=0.0)))
    x = random(5, 40)
    torch.testing.assert_close(reference.linear(x, packed, None, spec), x @ q.dequantize().T)


def test_split_of_nothing_is_plain_rounding() -> None:
    x = random(5, 40)
    assert torch.equal(
        reference.quantize_input(x, InputSpec(TOKEN, split=1e9), None),
        reference.quantize_input(x, InputSpec(TOKEN), None),
    )


def test_tokens_do_not_influence_each_other_without_a_split() -> None:
    _, packed, spec = packed_weight(random(6, 40), Scheme(ROW, InputSpec(TOKEN)))
    x = random(5, 40)
    louder = x.clone()
    louder[3] *= 100
    one, other = (reference.linear(v, packed, None, spec) for v in (x, louder))
    assert torch.equal(one[[0, 1, 2, 4]], other[[0, 1, 2, 4]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_input_is_seen_in_its_own_tokens_only(bad: float) -> None:
    _, packed, spec = packed_weight(random(6, 40), Scheme(ROW, InputSpec(TOKEN)))
    x = random(5, 40)
    x[3, 9] = bad
    y = reference.linear(x, packed, None, spec)
    assert not y[3].isfinite().any() and y[[0, 1, 2, 4]].isfinite().all()


def test_zero_tokens_and_no_tokens() -> None:
    _, packed, spec = packed_weight(random(6, 40), Scheme(ROW, InputSpec(TOKEN)))
    assert (reference.linear(torch.zeros(3, 40), packed, None, spec) == 0).all()
    assert reference.linear(torch.zeros(0, 40), packed, None, spec).shape == (0, 6)


def test_input_grad_is_the_product_with_the_weight() -> None:
    q, packed, spec = packed_weight(random(6, 40), Scheme(TensorSpec("nf4", Blocks(1, 16))), 0.1)
    grad = random(2, 3, 6)
    assert torch.equal(reference.input_grad(grad, packed, spec), grad @ q.dequantize())
