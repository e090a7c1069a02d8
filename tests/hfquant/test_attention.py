"""Attention with quantized operands: what its two products see, and the module that says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from hfquant.attention import CHILD, OPERANDS, Operands, attend, leave, note_callers, use
from hfquant.blocks import Blocks
from hfquant.errors import UnsupportedError
from hfquant.input_ranges import input_params
from hfquant.reference import static_round_trip
from hfquant.spec import InputSpec, TensorSpec
from hfquant.testing.tiny import HIDDEN, LAYERS, tiny_inputs, tiny_model

TENSOR, TOKEN = Blocks(-1, -1), Blocks(1, -1)
GRIDS = ("int4", "int8", "e2m1", "e3m0", "e4m3")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

seeds = st.integers(0, 10**6)
grids = st.sampled_from(GRIDS)
shapes = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 7), st.integers(1, 9))
"""B, key heads, query heads of each, tokens, D."""


def static(grid: str) -> InputSpec:
    return InputSpec(TensorSpec(grid, TENSOR), dynamic=False)


def dynamic(grid: str) -> InputSpec:
    return InputSpec(TensorSpec(grid, TOKEN))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands_of(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, H * each, L, D], key and value [B, H, L, D]."""
    b, heads, each, tokens, d = shape
    q, k, v = (drawn(b, h, tokens, d, seed=seed + n) for n, h in enumerate((heads * each, heads, heads)))
    return q, k, v


def operands_in(module: nn.Module) -> Operands:
    found = module.get_submodule(CHILD)
    assert isinstance(found, Operands)
    return found


def with_operands(specs: dict[str, InputSpec], high: float = 1.5) -> nn.Module:
    """A module with operands, static ones in [-high, high]; that of the probabilities is 0.8 of 1."""
    operands = Operands()
    for name, spec in specs.items():
        bound = 0.8 if name == "probability" else high
        operands.choose(name, spec, None if spec.dynamic else input_params(-bound, bound, spec.tensor))
    module = nn.Module()
    module.add_module(CHILD, operands)
    return module


def rounded(x: Tensor, spec: InputSpec, high: float) -> Tensor:
    return static_round_trip(x, spec.tensor, input_params(-high, high, spec.tensor))


def near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-5)


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention [B, H, L, D] and its probabilities [B, H, L, L'], one head after the other."""
    b, heads = q.shape[:2]
    each = heads // k.shape[1]
    pairs = [(n, h) for n in range(b) for h in range(heads)]
    scores = [q[n, h] @ k[n, h // each].T / q.shape[3] ** 0.5 for n, h in pairs]
    chances = [s.softmax(-1) if mask is None else (s + mask[0, 0]).softmax(-1) for s in scores]
    out = [p @ v[n, h // each] for p, (n, h) in zip(chances, pairs, strict=True)]
    return tuple(torch.stack(x).unflatten(0, (b, heads)) for x in (out, chances))


# ---- without operands it is plain attention


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "bert", "vit", "mixtral"])
def test_without_operands_a_model_computes_what_it_did(kind: str) -> None:
    model = tiny_model(kind)
    inputs = tiny_inputs(model)
    keep = slice(None)
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, 9:] = 0
        keep = inputs["attention_mask"].bool() if kind != "bert" else keep
    with torch.no_grad():
        before = model(**inputs).logits[keep]
        use(model)
        with note_callers() as callers:
            after = model(**inputs).logits[keep]
    assert len(callers) == LAYERS, "or the model still computed attention in another way"
    assert (after - before).abs().max() <= 1e-5


def test_callers_are_noted_once_each_in_the_order_of_their_calls() -> None:
    first, second = nn.Module(), nn.Module()
    x = drawn(1, 1, 2, 3)
    with note_callers() as outer:
        attend(second, x, x, x, None)
        with note_callers() as inner:
            attend(first, x, x, x, None)
        attend(first, x, x, x, None)
        attend(second, x, x, x, None)
    attend(nn.Module(), x, x, x, None)
    assert inner == [first] and outer == [second, first]


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices"])
def test_attention_of_another_kind_is_refused(name: str) -> None:
    x = drawn(1, 1, 2, 3)
    attend(nn.Linear(1, 1), x, x, x, None, **{name: None}, sliding_window=7)
    with pytest.raises(UnsupportedError, match=f"Linear uses {name}"):
        attend(nn.Linear(1, 1), x, x, x, None, **{name: drawn(2)})


def test_a_model_with_capped_scores_is_refused_when_it_runs() -> None:
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma2Config(hidden_size=16, intermediate_size=16, vocab_size=32, attn_logit_softcapping=50.0, **sizes)
    model = Gemma2ForCausalLM(config)
    use(model)
    with pytest.raises(UnsupportedError, match="Gemma2Attention uses softcap"):
        model(torch.tensor([[1, 2]]))


def test_a_model_with_an_attention_of_its_own_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=32))
    with pytest.raises(UnsupportedError, match=r"BloomForCausalLM computes attention in a way of its own.*leave"):
        use(model)


def test_a_model_without_attention_is_refused() -> None:
    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=2))
    with pytest.raises(UnsupportedError, match=r"MambaForCausalLM computes .* or none"):
        use(model)


# ---- what the products see


@given(shape=shapes, seed=seeds, names=st.tuples(grids, grids, grids), masked=st.booleans())
def test_static_operands_are_rounded_before_their_product(
    shape: tuple[int, ...], seed: int, names: tuple[str, ...], masked: bool
) -> None:
    q, k, v = operands_of(shape, seed)
    specs = dict(zip(("query", "key", "value"), map(static, names), strict=True))
    mask = torch.full((shape[0], 1, shape[3], shape[3]), -1e30).triu(1) if masked else None
    module = with_operands(specs)
    out, probability = attend(module, q, k, v, mask)
    seen = [rounded(x, spec, 1.5) for x, spec in zip((q, k, v), specs.values(), strict=True)]
    expected, chances = by_hand(*seen, mask)
    assert torch.allclose(probability, chances, rtol=0, atol=1e-5) and torch.allclose(
        out.transpose(1, 2), expected, rtol=0, atol=1e-5
    )
    # The probabilities too: those above, bit for bit, so that no tie is broken in two ways.
    operands_in(module).choose("probability", static("e2m2"), input_params(-0.8, 0.8, static("e2m2").tensor))
    out, coarse = attend(module, q, k, v, mask)
    assert torch.equal(coarse, rounded(probability, static("e2m2"), 0.8))
    values = seen[2].repeat_interleave(shape[2], 1)
    assert near(out.transpose(1, 2), coarse @ values)


def in_rows(x: Tensor, name: str) -> Tensor:
    """`x` [..., rows, k], each row rounded with a scale from its own largest magnitude."""
    grid = TensorSpec(name, TOKEN).numbers()
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        scale = row.abs().max() / grid.top
        rows.append(grid.nearest(row / scale) * scale)
    return torch.stack(rows).reshape(x.shape)


@given(shape=shapes, seed=seeds, names=st.tuples(grids, grids, grids))
def test_ranges_at_run_time_are_those_of_rows_along_the_sum(
    shape: tuple[int, ...], seed: int, names: tuple[str, ...]
) -> None:
    """Each token of each head for query and key; for the values each channel, over the tokens."""
    q, k, v = operands_of(shape, seed)
    specs = dict(zip(("query", "key", "value"), map(dynamic, names), strict=True))
    out, probability = attend(with_operands(specs), q, k, v, None)
    seen = in_rows(q, names[0]), in_rows(k, names[1]), in_rows(v.mT.contiguous(), names[2]).mT
    expected, chances = by_hand(*seen)
    assert torch.allclose(probability, chances, rtol=0, atol=1e-5) and torch.allclose(
        out.transpose(1, 2), expected, rtol=0, atol=1e-5
    )
    coarse = attend(with_operands({**specs, "probability": dynamic("e3m2")}), q, k, v, None)[1]
    assert torch.allclose(coarse, in_rows(probability, "e3m2"), rtol=1e-6, atol=0)


def test_what_overflows_is_seen() -> None:
    operands = operands_in(with_operands({"query": static("int8"), "key": dynamic("int8")}))
    x = torch.tensor([[[[1.0, torch.inf], [1.0, 2.0]]]])
    assert operands("query", x).isnan().tolist() == [[[[False, True], [False, False]]]]
    assert operands("key", x).isnan().tolist() == [[[[True, True], [False, False]]]]


# ---- training


@DTYPES
@given(seed=seeds, grid=grids)
def test_training_sees_the_values_that_inference_sees_and_their_gradient(
    dtype: torch.dtype, seed: int, grid: str
) -> None:
    module = with_operands({name: static(grid) for name in OPERANDS})
    operands = operands_in(module)
    x = drawn(2, 3, 5, 7, seed=seed).to(dtype)
    upstream = drawn(2, 3, 5, 7, seed=seed + 1).to(dtype)
    leaf = x.clone().requires_grad_()
    seen = operands("query", leaf)
    assert torch.equal(seen, operands("query", x)) and seen.dtype == dtype
    assert torch.equal(torch.autograd.grad(seen, leaf, upstream)[0], upstream)


@given(shape=shapes, seed=seeds, grid=grids)
def test_the_gradient_of_attention_is_that_at_the_rounded_values(shape: tuple[int, ...], seed: int, grid: str) -> None:
    module = with_operands({name: static(grid) for name in OPERANDS if name != "probability"})
    leaves = [x.requires_grad_() for x in operands_of(shape, seed)]
    seen = [rounded(x.detach(), static(grid), 1.5).requires_grad_() for x in leaves]
    out = attend(module, leaves[0], leaves[1], leaves[2], None)[0]
    expected = by_hand(*seen)[0].transpose(1, 2)
    upstream = drawn(*out.shape, seed=seed)
    ours, theirs = torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(expected, seen, upstream)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


# ---- the module


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_a_change_of_dtype_leaves_the_scales_as_they_are(move: Any) -> None:
    module = with_operands({name: static("int8") for name in OPERANDS})
    linear = nn.Linear(2, 2)
    module.add_module("linear", linear)
    operands = operands_in(module)
    before = operands.scale.data.clone()
    move(module)
    assert linear.weight.dtype != torch.float32
    assert operands.scale.dtype == torch.float32 and torch.equal(operands.scale.data, before)
    assert not operands.scale.requires_grad


def test_a_cache_changes_nothing_where_ranges_are_static() -> None:
    model = tiny_model("llama")
    assert isinstance(model, LlamaForCausalLM)
    use(model)
    for layer in model.model.layers:
        layer.self_attn.add_module(
            CHILD, with_operands({n: static("e2m1") for n in OPERANDS}, 4.0).get_submodule(CHILD)
        )
    ids = tiny_inputs(model)["input_ids"]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, -1]
        past = model(ids[:, :-1], use_cache=True).past_key_values
        last = model(ids[:, -1:], past_key_values=past).logits[:, -1]
        leave(model)
        plain = model(ids, use_cache=False).logits[:, -1]
    assert torch.allclose(last, whole, rtol=0, atol=1e-4) and (plain - whole).norm() > 0.01 * plain.norm()
    assert not any(isinstance(module, Operands) for module in model.modules())
    assert model.config.hidden_size == HIDDEN
