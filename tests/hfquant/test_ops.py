"""The operators: registered as PyTorch demands, and with the gradients of the dense layer they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hfquant import ops
from hfquant.blocks import Blocks
from hfquant.kernel import use_kernel
from hfquant.quantize import pack, quantize_linear
from hfquant.recipe import Recipe
from hfquant.spec import InputSpec, Scheme, TensorSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NESTED = TensorSpec("uint8", Blocks(1, 256))


@st.composite
def recipes(draw) -> Recipe:
    """Any weight numbers the core offers, in either layout, with and without a quantized input."""
    blocks = draw(st.sampled_from([Blocks(1, 8), Blocks(1, 32), Blocks(1, -1), Blocks(-1, -1), Blocks(16, 16)]))
    scale = draw(st.sampled_from(["float32", "float16", "bfloat16", NESTED]))
    if draw(st.booleans()):
        weight = TensorSpec(draw(st.sampled_from(["uint2", "uint4", "uint5", "uint8"])), blocks, True, scale)
    else:
        grids = ["int3", "int4", "int8", "nf4", "e2m1", "e4m3fn", "quantile4", "dyn8"]
        weight = TensorSpec(draw(st.sampled_from(grids)), blocks, False, scale)
    seen = draw(st.sampled_from([None, InputSpec(TensorSpec("int8", Blocks(1, -1)))]))
    return Recipe(Scheme(weight, seen))


SHAPES = st.sampled_from([(24, 40), (17, 33), (8, 64)])


def packed_weight(recipe: Recipe, shape: tuple[int, int]):
    """Packed tensors, their key, and the matrix [N, K] they stand for."""
    q = quantize_linear(drawn(*shape, seed=0), recipe)
    packed, spec = pack(q, recipe)
    return list(packed.values()), spec.key(), q.dequantize()


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Few examples, as each one is traced several times over.
@settings(max_examples=4)
@given(recipe=recipes(), shape=SHAPES, dtype=st.sampled_from(DTYPES), lead=st.sampled_from([(3,), (2, 3)]))
def test_opcheck_linear(recipe, shape, dtype, lead):
    packed, key, w = packed_weight(recipe, shape)
    x = drawn(*lead, w.shape[1], dtype=dtype).requires_grad_()
    bias = drawn(w.shape[0], dtype=dtype).requires_grad_()
    torch.library.opcheck(torch.ops.hfquant.linear.default, (x, packed, bias, key))


@settings(max_examples=5)
@given(recipe=recipes(), shape=SHAPES, dtype=st.sampled_from(DTYPES))
def test_opcheck_the_other_operators(recipe, shape, dtype):
    packed, key, w = packed_weight(recipe, shape)
    torch.library.opcheck(torch.ops.hfquant.input_grad.default, (drawn(2, 3, w.shape[0], dtype=dtype), packed, key))
    torch.library.opcheck(torch.ops.hfquant.dequantize.default, (packed, key, dtype))
    ids = torch.tensor([[0, 3, 3], [7, 1, 0]])
    torch.library.opcheck(torch.ops.hfquant.embedding.default, (ids, packed, key, dtype))


@given(recipe=recipes(), shape=SHAPES, lead=st.sampled_from([(), (5,), (2, 3), (0,)]))
def test_gradients_are_those_of_the_dense_layer(recipe, shape, lead):
    packed, key, w = packed_weight(recipe, shape)
    x, bias = drawn(*lead, w.shape[1]).requires_grad_(), drawn(w.shape[0]).requires_grad_()
    grad = drawn(*lead, w.shape[0], seed=2)
    got = torch.autograd.grad(ops.linear(x, packed, bias, key), (x, bias), grad)
    expected = torch.autograd.grad(F.linear(x, w, bias), (x, bias), grad)  # a quantized input counts as the identity
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@given(recipe=recipes(), shape=SHAPES, dtype=st.sampled_from(DTYPES))
def test_dequantize_and_embedding_read_the_same_matrix(recipe, shape, dtype):
    packed, key, w = packed_weight(recipe, shape)
    matrix = ops.dequantize(packed, key, dtype)
    assert torch.equal(matrix, w.to(dtype))
    for ids in (torch.arange(w.shape[0]), torch.tensor(5), torch.tensor([[[1], [0]]]), torch.empty(0, 2).long()):
        rows = ops.embedding(ids, packed, key, dtype)
        assert torch.equal(rows, F.embedding(ids, matrix)) and rows.dtype == dtype


def dense():
    return packed_weight(Recipe(Scheme(TensorSpec("int4", Blocks(1, 32)))), (24, 64))


def test_packed_tensors_get_no_gradient():
    packed, key, _ = dense()
    for tensor in packed:
        if tensor.is_floating_point():
            tensor.requires_grad_()  # even then: quantized weights are frozen
    ops.linear(drawn(3, 64).requires_grad_(), packed, None, key).sum().backward()
    assert all(tensor.grad is None for tensor in packed)


def test_bias_of_another_dtype_keeps_its_own_gradient_dtype():
    packed, key, _ = dense()
    x, bias = drawn(3, 64, dtype=torch.bfloat16), drawn(24).requires_grad_()
    y = ops.linear(x, packed, bias, key)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert bias.grad is not None and torch.equal(bias.grad, torch.full((24,), 3.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_the_lower_dtype_as_for_a_dense_layer(dtype):
    packed, key, w = dense()
    x, bias = drawn(5, 64).requires_grad_(), drawn(24)
    with torch.autocast("cpu", dtype=dtype):
        y = ops.linear(x, packed, bias, key)
        expected = F.linear(x, w, bias)
        with use_kernel("reference"):
            same = ops.linear(x, packed, bias, key)
    assert y.dtype == same.dtype == expected.dtype == dtype
    torch.testing.assert_close(same, expected)
    assert (y - expected).norm() <= 0.01 * expected.norm()  # kernels round elsewhere
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, w.sum(0).expand(5, 64), rtol=0.02, atol=0.2 if dtype == torch.bfloat16 else 0.02)
