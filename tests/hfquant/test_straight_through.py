"""Fake quantization gives the values of real quantization, bit for bit, and the gradients of a dense layer."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hfquant import HfQuantConfig, WeightError, use_kernel
from hfquant.quantize import quantize_linear
from hfquant.recipe import Recipe
from hfquant.reference import quantize_input
from hfquant.stats import Stats
from hfquant.straight_through import fake_input, fake_weight

METHODS = (
    ("int4", {"block_size": 24}),
    ("int3", {"block_size": -1}),
    ("int2", {"symmetric": False, "block_size": 16}),
    ("int8", {"symmetric": False, "scale_dtype": "bfloat16"}),
    ("nf4", {"double_quant": True}),
    ("e2m1", {"block_size": 32, "scale_dtype": "float16"}),
    ("e4m3", {}),
    ("dynamic5", {"block_size": 40}),
    ("quantile4", {}),
    ("int4", {"block_size": 32, "range": {"name": "mse", "steps": 8}}),
    ("int3", {"block_size": -1, "range": {"name": "percentile", "percentile": 95}, "symmetric": False}),
    ("fp8", {"granularity": "tile"}),
    ("llm_int8", {}),
)
CLIPS = ("mse", "percentile")
methods = st.sampled_from(METHODS).map(lambda given: HfQuantConfig(given[0], **given[1]).recipe)
sides = st.tuples(st.integers(1, 40), st.integers(1, 90))
STATS = Stats("layer")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Numbers with a heavy tail, some of them 0."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return numbers**3 * (numbers.abs() > 0.1)


def gradients(recipe: Recipe, w: Tensor, x: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of weight and input of a fake-quantized layer."""
    w, x = w.clone().requires_grad_(), x.clone().requires_grad_()
    seen, outliers = fake_weight(w, recipe, STATS)
    given = recipe.scheme.input
    y = F.linear(x if given is None else fake_input(x, given, outliers), seen)
    return y, *torch.autograd.grad(y, (w, x), drawn(*y.shape, seed=seed))


def gradient_of_the_sum(recipe: Recipe, w: Tensor) -> Tensor:
    """What each weight gets where each value gets 1."""
    w = w.clone().requires_grad_()
    fake_weight(w, recipe, STATS)[0].sum().backward()
    return w.grad


@given(methods, sides, st.integers(0, 9), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_values_are_those_of_real_quantization(recipe, shape, seed, dtype, compiled):
    w = drawn(*shape, seed=seed).to(dtype)
    with nullcontext() if compiled else use_kernel("reference"):  # without the CPU library torch rounds
        seen, outliers = fake_weight(w, recipe, STATS)
    q = quantize_linear(w, recipe)
    assert torch.equal(seen, q.dequantize(dtype if recipe.scheme.input is None else torch.float32))
    assert (outliers is None) == (q.outliers is None)
    assert outliers is None or torch.equal(outliers.index, q.outliers.index)


@given(methods.filter(lambda recipe: recipe.range.name == "absmax"), sides, st.integers(0, 9))
def test_gradients_are_those_of_a_dense_layer_with_the_quantized_values(recipe, shape, seed):
    w, x = drawn(*shape, seed=seed), drawn(5, shape[1], seed=seed + 1)
    q, given = quantize_linear(w, recipe), recipe.scheme.input
    values = q.dequantize().requires_grad_()
    inputs = (x if given is None else quantize_input(x, given, q.outliers)).requires_grad_()
    y = F.linear(inputs, values)
    expected = torch.autograd.grad(y, (values, inputs), drawn(*y.shape, seed=seed))
    found = gradients(recipe, w, x, seed)
    assert [torch.equal(*pair) for pair in zip(found, (y, *expected), strict=True)] == [True] * 3


@given(methods.filter(lambda recipe: recipe.range.name in CLIPS), st.integers(0, 9))
def test_weights_that_the_range_clips_get_no_gradient(recipe, seed):
    w = drawn(24, 70, seed=seed)
    q = quantize_linear(w, recipe)
    blocks, grid = recipe.scheme.weight.blocks, recipe.scheme.weight.numbers()
    # Where rounding to all integers would end: outside of the grid, or at its ends.
    place = w.double() / blocks.expand(q.scale_values(), q.shape).double()
    place = place if q.zero is None else place + blocks.expand(q.zero, q.shape).double()
    low, high = (float(end) for end in grid.levels()[[0, -1]])
    beyond = torch.maximum(low - place, place - high)
    clear = (beyond - 0.5).abs() > 1e-4
    clipped = gradient_of_the_sum(recipe, w) == 0
    assert torch.equal(clipped[clear], (beyond > 0.5)[clear])
    assert 0 < int(clipped.sum()) < 0.2 * w.numel()


def test_weights_in_sixteen_bit_always_get_their_gradient():
    recipe = HfQuantConfig("llm_int8", outliers={"layer": [3, 5]}).recipe
    clipping = Recipe(recipe.scheme, HfQuantConfig("int8", range="percentile").recipe.range, columns=recipe.columns)
    w = drawn(16, 20)
    w[:, [3, 5]] *= 100
    gradient = gradient_of_the_sum(clipping, w)
    assert (gradient[:, [3, 5]] != 0).all() and (gradient == 0).any()


def test_gradients_keep_the_dtype_of_their_weights():
    recipe = HfQuantConfig("fp8").recipe  # with quantized inputs it multiplies in float32
    w = drawn(8, 32).bfloat16().requires_grad_()
    x = drawn(4, 32).bfloat16().requires_grad_()
    seen, outliers = fake_weight(w, recipe, STATS)
    F.linear(fake_input(x, recipe.scheme.input, outliers), seen).sum().backward()
    assert seen.dtype == torch.float32 and w.grad.dtype == x.grad.dtype == torch.bfloat16


def test_training_that_overflowed_is_told_with_the_layer():
    w = torch.full((4, 32), torch.nan)
    with pytest.raises(WeightError, match=r"model\.layers\.3 holds 128 NaN"):
        fake_weight(w, HfQuantConfig("int4").recipe, Stats("model.layers.3"))
