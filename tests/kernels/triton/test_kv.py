"""Tokens of a KV cache are quantized as torch does it, and attended to as if they were dequantized."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfquant.blocks import Blocks
from hfquant.gpu import kv as gpu
from hfquant.kernels.triton import kv_attention, launch
from hfquant.kernels.triton.kv_quantize import quantize
from hfquant.kv_states import Packed, quantized
from hfquant.spec import TensorSpec

from ..problems import DTYPES
from .compiled import TARGETS, Launch, recording
from .interpret import interpreted
from .products import LAST, as_if_on

GRIDS = ("uint2", "uint3", "uint4", "uint8", "int2", "int4n", "int8", "e4m3", "e2m1", "e5m2ieee", "e4m3fn", "nf4")
SCALES = ("float16", "bfloat16", "float32")
WIDTHS = (4, 8, 16, 20, 64, 80)


@st.composite
def specs(draw: st.DrawFn, width: int) -> TensorSpec:
    """Numbers that keys or values of `width` channels may have."""
    grid = draw(st.sampled_from(GRIDS))
    blocks = draw(st.sampled_from([Blocks(16, 1), Blocks(32, 1), Blocks(1, -1), Blocks(1, 8), Blocks(1, 32)]))
    spec = TensorSpec(grid, blocks, grid.startswith("uint"), draw(st.sampled_from(SCALES)))
    assert gpu.why_not_blocks(spec, width) is None
    return spec


def tokens(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Tokens [B, H, T, D] with channels and heads of very different sizes, in the memory order of a projection."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, heads, count, width = shape
    x = torch.randn(batch, count, heads, width, generator=generator)
    x = x * torch.exp(2 * torch.randn(heads, width, generator=generator)) + torch.randn(width, generator=generator)
    return x.to(dtype).transpose(1, 2)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(WIDTHS), st.data())
def test_tokens_are_quantized_to_the_last_bit_as_torch_does(width: int, data: st.DataObject) -> None:
    spec, dtype = data.draw(specs(width)), data.draw(st.sampled_from(DTYPES))
    count = spec.blocks.rows * data.draw(st.integers(1, 3))
    x = tokens(data.draw, (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), count, width), dtype)
    specials = st.sampled_from([0.0, -0.0, 1e-42, 1e-7, 6e4, float("nan"), float("inf")])
    for special in data.draw(st.lists(specials, max_size=3)):
        x.transpose(1, 2).view(-1)[data.draw(st.integers(0, x.numel() - 1))] = special
    x[:, :, data.draw(st.integers(0, count - 1))] *= data.draw(st.sampled_from([0.0, 1.0]))
    expected = quantized(x, spec)
    with interpreted():
        found = quantize(x, spec)
    torch.testing.assert_close(found["scale"], expected["scale"], rtol=0, atol=0, equal_nan=True)
    numbers = [Packed(spec, width, tensors).read(torch.float32) for tensors in (found, expected)]
    torch.testing.assert_close(*numbers, rtol=0, atol=0, equal_nan=True)
    if bool(x.isfinite().all()):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def sides(draw: st.DrawFn, batch: int, heads: int, dtype: torch.dtype) -> list[gpu.Side]:
    """Keys and values that are packed up to the same token, and any number of newer ones."""
    step, widths = draw(st.sampled_from([16, 32])), [draw(st.sampled_from(WIDTHS)) for _ in range(2)]
    count = step * draw(st.integers(1, 9))
    found = []
    for width in widths:
        spec = draw(
            specs(width).filter(lambda spec: spec.blocks.rows in (1, step) and launch.fits(spec.numbers(), dtype))
        )
        x = tokens(draw, (batch, heads, count, width), dtype)
        tail = tokens(draw, (batch, heads, draw(st.just(0)), width), dtype)
        found.append((spec, quantized(x, spec), tail))
    newest = draw(st.integers(0, 40))
    return [(spec, packed, tokens(draw, (batch, heads, newest, tail.shape[3]), dtype)) for spec, packed, tail in found]


def exact(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention [B, L, H, D'] in float64, and how far a result may be from it."""
    heads = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(heads, 1) for x in (keys, values))
    score = scale * query.double() @ keys.mT
    size = scale * query.double().abs() @ keys.abs().mT
    seen = torch.ones_like(score, dtype=torch.bool) if mask is None else mask.expand(score.shape)
    weight = torch.softmax(score.masked_fill(~seen, -torch.inf), -1).nan_to_num(0)
    # Scores are float32 sums; weights and results are rounded to the dtype, small weights to its smallest number.
    off = torch.expm1(2 * 2.0**-21 * size.masked_fill(~seen, 0).amax(-1, keepdim=True))
    terms = weight @ values.abs()
    tiny = torch.finfo(query.dtype)
    least = tiny.smallest_normal * tiny.eps * values.abs().sum(-2, keepdim=True)
    allowed = ((1 + LAST[query.dtype]) ** 2 - 1 + 2.0**-19 + 2 * off) * terms + least
    return (weight @ values).transpose(1, 2), allowed.transpose(1, 2)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(DTYPES), st.data())
def test_attention_is_that_to_the_dequantized_tokens(dtype: torch.dtype, data: st.DataObject) -> None:
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    group = data.draw(st.sampled_from([1, 3, 4]))
    keys, values = sides(data.draw, batch, heads, dtype)
    queries, width = data.draw(st.sampled_from([1, 1, 2, 5])), keys[2].shape[-1]
    whole = [torch.cat([Packed(s, t.shape[-1], p).read(dtype), t], 2) for s, p, t in (keys, values)]
    query = tokens(data.draw, (batch, heads * group, queries, width), dtype)
    query = query / query.float().norm(dim=-1, keepdim=True).clamp_min(1e-3).to(dtype) / whole[0].float().abs().amax()
    query = (query * data.draw(st.sampled_from([1.0, 20.0]))).to(dtype)
    mask = None
    if data.draw(st.booleans()):
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        shape = (batch, data.draw(st.sampled_from([1, heads * group])), queries, whole[0].shape[2])
        mask = torch.rand(shape, generator=generator) < data.draw(st.sampled_from([0.05, 0.7]))
    with interpreted(), as_if_on(data.draw(st.sampled_from(["none", "sm_90"]))):
        found = kv_attention.attend(query, keys, values, mask, 0.7)
    expected, allowed = exact(query, *whole, mask, 0.7)
    assert found.dtype == dtype and found.shape == expected.shape
    assert ((found.double() - expected).abs() <= allowed).all()


class On(NamedTuple):
    """A launch of attention over 4096 packed and 130 newer tokens, for a target."""

    target: str
    keys: TensorSpec
    values: TensorSpec
    dtype: torch.dtype = torch.bfloat16
    width: int = 128
    queries: int = 1

    def launches(self) -> list[Launch]:
        """Both quantizations, the attention to what they give, and the end of it."""
        x = torch.empty(1, 8, 4096, self.width, dtype=self.dtype)
        tail = x[:, :, :130].contiguous()
        query = torch.empty(1, 32, self.queries, self.width, dtype=self.dtype)
        mask = torch.ones(1, 1, self.queries, 4226, dtype=torch.bool)
        with as_if_on(self.target), recording() as recorded:
            sides = [(spec, quantize(x, spec), tail) for spec in (self.keys, self.values)]
            kv_attention.attend(query, *sides, mask, 0.1)
        return recorded


def numbers(grid: str, *blocks: Blocks) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(grid, block, grid.startswith("uint"), "float16") for block in blocks)


KIVI = (Blocks(32, 1), Blocks(1, 32))
MATRIX = {"gfx942": "v_mfma_f32"}
CONVERSION = r"I2F|v_cvt_f(16|32)_[iu]"
WIDE = r"(LDG|LDGSTS)\.E.*\.(64|128)|(global|buffer)_load_dwordx[24]"


@pytest.mark.parametrize("target", TARGETS)
def test_four_bits_are_read_widely_multiplied_in_matrices_and_never_converted(target: str) -> None:
    *quantizing, attention, combining = (
        launch.compile(target) for launch in On(target, *numbers("uint4", *KIVI)).launches()
    )
    assert [binary.spilled for binary in (*quantizing, attention, combining)] == [0, 0, 0, 0]
    assert attention.count(MATRIX.get(target, "HMMA"), attention.loop) >= 2
    assert not attention.count(CONVERSION, attention.loop)
    assert attention.count(WIDE, attention.loop)
    assert not combining.count(r"ATOM|RED|global_atomic|buffer_atomic")


OTHERS = {
    "two bits": On("sm_90", *numbers("uint2", *KIVI)),
    "three bits": On("sm_80", *numbers("uint3", *KIVI)),
    "eight bits": On("gfx942", *numbers("int8", *KIVI), torch.float16),
    "lookup, several queries": On("sm_89", *numbers("nf4", *KIVI), queries=8),
    "floating point by token": On("sm_100", *numbers("e4m3", Blocks(1, 64), Blocks(1, -1))),
    "float32": On("sm_80", *numbers("uint4", *KIVI), torch.float32, 64),
    "wide heads": On("sm_90", *numbers("uint4", *KIVI), torch.bfloat16, 256),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_numbers_do_not_spill_and_integers_are_never_converted(name: str) -> None:
    given = OTHERS[name]
    for launch_ in given.launches():
        binary = launch_.compile(given.target)
        assert binary.spilled == 0
        assert "attend" not in launch_.kernel.fn.__name__ or not binary.count(CONVERSION, binary.loop)
