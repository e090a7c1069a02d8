"""Tokens of a KV cache are quantized as torch does it, and attended to as if they were dequantized."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import hfquant
import hfquant.kv_cache
from hfquant.blocks import Blocks
from hfquant.errors import UnsupportedError
from hfquant.gpu import kv as gpu
from hfquant.kernels.triton import kv_attention, launch
from hfquant.kernels.triton.kv_quantize import quantize
from hfquant.kv_states import Packed, quantized
from hfquant.spec import TensorSpec

from ..problems import DTYPES
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


# Scales of float16 at both of its ends, too.
SIZES = [("float16", 1.0), ("float16", 3e-5), ("float16", 1e7), ("bfloat16", 1.0), ("float32", 1e7)]


@pytest.mark.parametrize(("scale", "size"), SIZES)
@settings(max_examples=8, deadline=None)
@given(width=st.sampled_from(WIDTHS), data=st.data())
def test_tokens_are_quantized_to_the_last_bit_as_torch_does(
    scale: str, size: float, width: int, data: st.DataObject
) -> None:
    spec, dtype = replace(data.draw(specs(width)), scale=scale), data.draw(st.sampled_from(DTYPES))
    count = spec.blocks.rows * data.draw(st.integers(1, 3))
    x = tokens(data.draw, (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), count, width), dtype)
    x = x * size
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


@settings(max_examples=20, deadline=None)
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


def decoded(model: LlamaForCausalLM, ids: Tensor, seen: Tensor) -> tuple[Tensor, hfquant.KVCache]:
    """Logits of a text that is read as a prompt, one by one, and two at once; and the cache."""
    past = hfquant.KVCache(model.config, keys="uint4", values="int8", group_size=16, residual=8)
    ends = [40, 41, 42, 44, 45]
    with torch.no_grad():
        parts = [
            model(ids[:, first:last], attention_mask=seen[:, :last], past_key_values=past).logits
            for first, last in pairwise([0, *ends])
        ]
    return torch.cat(parts, 1), past


def test_a_model_runs_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded batch with shared heads: the cache is the same to the last bit, logits up to the order of sums."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="hfquant_kv",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids, seen = torch.randint(32, (2, 45)), torch.ones(2, 45, dtype=torch.long)
    seen[0, :5] = 0
    expected, torch_cache = decoded(model, ids, seen)
    monkeypatch.setattr(gpu, "why_not_here_now", lambda x: None)
    monkeypatch.setattr(gpu, "attend", counted := Mock(side_effect=gpu.attend))
    with interpreted():
        found, past = decoded(model, ids, seen)
    assert counted.call_count == 2 * 4  # layers, and calls behind the prompt
    torch.testing.assert_close(found[seen == 1], expected[seen == 1], atol=1e-5, rtol=1e-5)
    for mine, other in zip(past.layers, torch_cache.layers, strict=True):
        assert torch.equal(mine.states[0].packed.tensors["codes"][1], other.states[0].packed.tensors["codes"][1])


def why_not(**changed: Any) -> str | None:
    """Why keys and values like these are not attended to, on a GPU that could."""
    given = {"dtype": torch.bfloat16, "heads": 4, "queries": 1, "grid": "uint4", "blocks": Blocks(32, 1), "width": 64}
    given |= {"mask": None} | changed
    spec = TensorSpec(given["grid"], given["blocks"], given["grid"].startswith("uint"), "float16")
    query = torch.empty(1, given["heads"], given["queries"], given["width"], dtype=given["dtype"])
    return gpu.why_not_attend(query, given["heads"], spec, spec, given["width"], given["mask"])


DECLINED: dict[str, tuple[dict[str, Any], str]] = {
    "many queries": ({"queries": 17}, "up to 64 queries for the same keys, here 68"),
    "mask": ({"mask": torch.zeros(1, 1, 1, 8)}, "boolean masks, not torch.float32"),
    "tile": ({"blocks": Blocks(32, 32)}, "scales for channels of"),
    "tokens": ({"blocks": Blocks(24, 1)}, "scales for channels of"),
    "channels": ({"blocks": Blocks(1, 12)}, "groups of 8 channels or a larger power of two"),
    "width": ({"width": 512}, "up to 256 channels"),
    "range": ({"grid": "e6m1", "dtype": torch.float16}, "do not fit into float16"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_the_kernel_does_not_take_has_a_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not() == "is for GPUs, the cache is on cpu"
    monkeypatch.setattr(gpu, "why_not_here_now", lambda x: None)
    assert why_not() is None
    changed, what = DECLINED[name]
    assert what in str(why_not(**changed))


def test_a_gpu_without_kernels_says_why_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for device in (cuda, cuda, torch.device("cpu")):
        gpu.report(device, "quantized", "has a reason")
    assert [record.getMessage() for record in caplog.records] == [
        "keys and values of the cache are not quantized by a kernel: it has a reason"
    ]
    monkeypatch.setenv("HFQUANT_STRICT", "1")
    gpu.report(torch.device("cpu"), "quantized", "has a reason")
    with pytest.raises(UnsupportedError, match="HFQUANT_STRICT=1 and keys and values are not quantized"):
        gpu.report(cuda, "quantized", "has a reason")
