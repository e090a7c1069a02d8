"""Which inputs can be scaled in which architecture, that models stay the same, and why the rest is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GptOssConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from hfquant.blockview import BlockView
from hfquant.folds import Fold, apply_folds, find_folds
from hfquant.probing import UNTOUCHED, Probing, Producer
from hfquant.testing import tiny
from hfquant.testing.tiny import KINDS, tiny_inputs, tiny_model
from hfquant.testing.views import block_views

DECODER: dict[str, Any] = tiny._DECODER
MORE: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "gemma": (GemmaConfig, DECODER),
    "gpt_neox": (GPTNeoXConfig, DECODER),
    "cohere": (CohereConfig, DECODER),
    "phi3": (Phi3Config, DECODER),
    "olmo2": (Olmo2Config, DECODER),
    "opt": (OPTConfig, {**DECODER, "ffn_dim": tiny.RAGGED, "word_embed_proj_dim": tiny.HIDDEN, "dropout": 0.0}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        {**tiny._QWEN3_MOE, "num_experts": tiny.EXPERTS, "shared_expert_intermediate_size": 96},
    ),
    "gpt_oss": (GptOssConfig, {**DECODER, "num_local_experts": tiny.EXPERTS, "num_experts_per_tok": 2}),
}
EVERY = (*KINDS, *MORE)

ATTENTION = ["v_proj -> o_proj"]
EXPERTS = [f"gate_up_proj[{i}] -> down_proj[{i}]" for i in range(tiny.EXPERTS)]
LLAMA = [
    "input_layernorm -> q_proj, k_proj, v_proj",
    *ATTENTION,
    "post_attention_layernorm -> gate_proj, up_proj",
    "up_proj -> down_proj",
]
BANKS = ", ".join(f"gate_up_proj[{i}]" for i in range(tiny.EXPERTS))
SPARSE = [*LLAMA[:2], f"post_attention_layernorm -> gate, {BANKS}", *EXPERTS]
FOLDS = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "gpt2": ["ln_1 -> c_attn", "c_attn -> c_proj", "ln_2 -> c_fc"],
    "bert": ["value -> dense"],
    "vit": ["layernorm_before -> q_proj, k_proj, v_proj", *ATTENTION, "layernorm_after -> fc1"],
    "mixtral": SPARSE,
    "qwen3_moe": SPARSE,
    "gemma": LLAMA,
    "gpt_neox": [
        "input_layernorm -> query_key_value",
        "query_key_value -> dense",
        "post_attention_layernorm -> dense_h_to_4h",
    ],
    # One norm for attention and MLP.
    "cohere": ["input_layernorm -> q_proj, k_proj, v_proj, gate_proj, up_proj", *ATTENTION, "up_proj -> down_proj"],
    "phi3": [
        "input_layernorm -> qkv_proj",
        "qkv_proj -> o_proj",
        "post_attention_layernorm -> gate_up_proj",
        "gate_up_proj -> down_proj",
    ],
    "olmo2": [*ATTENTION, "up_proj -> down_proj"],
    # ReLU lets positive factors through.
    "opt": [
        "self_attn_layer_norm -> q_proj, k_proj, v_proj",
        "v_proj -> out_proj",
        "final_layer_norm -> fc1",
        "fc1 -> fc2",
    ],
    "qwen2_moe": [
        *LLAMA[:2],
        f"post_attention_layernorm -> gate_proj, up_proj, gate, shared_expert_gate, {BANKS}",
        "up_proj -> down_proj",
        *EXPERTS,
    ],
    "gpt_oss": [*LLAMA[:2], f"post_attention_layernorm -> router, {BANKS}"],
}
PROPORTIONAL, ELSE, NOTHING = "they are not proportional", "feeds something else too", "nothing in the block makes them"
REFUSED = {
    "gpt2": [("mlp.c_proj", PROPORTIONAL)],  # GELU
    "bert": [
        ("query", NOTHING),
        ("intermediate.dense", ELSE),
        ("output.dense", PROPORTIONAL),
    ],  # norms feed the residual
    "vit": [("fc2", PROPORTIONAL)],
    "gpt_neox": [("dense_4h_to_h", PROPORTIONAL)],
    "olmo2": [("q_proj", NOTHING), ("gate_proj", PROPORTIONAL)],  # no norm before the layers
    "gpt_oss": [("experts.down_proj", PROPORTIONAL)],  # (up + 1) times the gate
}


def build(kind: str) -> PreTrainedModel:
    if kind in KINDS:
        return tiny_model(kind)
    config, sizes = MORE[kind]
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config(**sizes), dtype=torch.float32, attn_implementation="eager")
    tiny._randomize(model, torch.Generator().manual_seed(0))
    return model.eval()


def short(fold: Fold) -> str:
    made_by = fold.producer.name if fold.rows is None else fold.rows.name
    readers = ", ".join(matrix.name.rpartition(".")[2] for matrix in fold.matrices())
    return f"{made_by.rpartition('.')[2]} -> {readers}"


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(**tiny_inputs(model)).logits


def divergence(before: Tensor, after: Tensor) -> float:
    log_p, log_q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def first_view(kind: str, **options: Any) -> BlockView:
    model = build(kind)
    return next(block_views(model, tiny_inputs(model), **options))


@pytest.mark.parametrize("kind", EVERY)
def test_what_is_found_and_what_is_refused(kind: str) -> None:
    for view in block_views(model := build(kind), tiny_inputs(model)):
        assert [short(fold) for fold in find_folds(view)] == FOLDS[kind]
        assert len(view.notes) == len(REFUSED.get(kind, []))
        for note, (layer, reason) in zip(view.notes, REFUSED.get(kind, []), strict=True):
            assert f"{layer}: inputs not scaled" in note and reason in note


@pytest.mark.parametrize("kind", EVERY)
def test_looking_leaves_every_parameter_as_it_is(kind: str) -> None:
    model = build(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for view in block_views(model, tiny_inputs(model)):
        find_folds(view)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def scale_all(model: PreTrainedModel, draw: Callable[[int], Tensor]) -> int:
    """Scale every fold of every block; returns how many."""
    count = 0
    for view in block_views(model, tiny_inputs(model)):
        folds = find_folds(view)
        assert all(apply_folds(view, [(fold, draw(fold.producer.size))], "test") for fold in folds)
        count += len(folds)
    return count


@pytest.mark.parametrize("kind", EVERY)
def test_any_scales_leave_the_logits(kind: str) -> None:
    model, generator = build(kind), torch.Generator().manual_seed(1)
    before, weights = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    assert scale_all(model, lambda size: torch.exp(torch.randn(size, generator=generator))) > 0
    assert 0 <= divergence(before, logits(model)) + 1e-12 < 1e-6
    assert any(not torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind != "gemma"])
def test_powers_of_two_leave_the_logits_bit_for_bit(kind: str) -> None:
    model, generator = build(kind), torch.Generator().manual_seed(2)
    before = logits(model)
    scale_all(model, lambda size: torch.exp2(torch.randint(-6, 7, (size,), generator=generator).float()))
    assert torch.equal(before, logits(model))


def test_gains_of_one_plus_weight_are_told_from_plain_ones() -> None:
    assert [fold.offset for fold in find_folds(first_view("gemma")) if fold.is_norm] == [True, True]
    assert [fold.offset for fold in find_folds(first_view("llama")) if fold.is_norm] == [False, False]


def test_norms_only_looks_at_norms() -> None:
    view = first_view("bert")
    assert find_folds(view, norms_only=True) == []
    assert any("query: inputs not scaled, no norm before them in the block" in note for note in view.notes)
    assert [short(fold) for fold in find_folds(first_view("llama"), norms_only=True)] == [LLAMA[0], LLAMA[2]]


def test_query_heads_that_share_a_value_head_share_its_channels() -> None:
    (fold,) = [fold for fold in find_folds(first_view("llama")) if short(fold) == ATTENTION[0]]
    head, share = tiny.HIDDEN // tiny.HEADS, tiny.HEADS // tiny.KV_HEADS
    expected = torch.arange(tiny.KV_HEADS * head).reshape(tiny.KV_HEADS, 1, head).expand(-1, share, -1)
    assert torch.equal(fold.columns, expected.flatten())


def test_rows_of_fused_weights_are_those_of_values_and_of_the_linear_half() -> None:
    columns = {short(fold): fold.columns for fold in find_folds(first_view("phi3"))}
    head, heads = tiny.HIDDEN // tiny.HEADS, tiny.KV_HEADS
    rows = tiny.HIDDEN + heads * head + torch.arange(heads * head).reshape(heads, 1, head).expand(-1, heads, -1)
    assert torch.equal(columns["qkv_proj -> o_proj"], rows.flatten())
    assert torch.equal(columns["gate_up_proj -> down_proj"], tiny.RAGGED + torch.arange(tiny.RAGGED))
    # GPT-NeoX has q, k and v of one head next to each other.
    (fold,) = [fold for fold in find_folds(first_view("gpt_neox")) if short(fold) == "query_key_value -> dense"]
    size = tiny.HIDDEN // tiny.HEADS
    assert fold.columns.tolist() == [3 * size * h + 2 * size + i for h in range(tiny.HEADS) for i in range(size)]


def test_layers_that_are_not_quantized_follow_but_are_no_reason_to_scale() -> None:
    folds = find_folds(first_view("llama", skip=["q_proj", "v_proj", "o_proj", "lm_head"]))
    assert [short(fold) for fold in folds] == [LLAMA[0], *LLAMA[2:]]
    folds = find_folds(first_view("llama", skip=["v_proj", "lm_head"]))
    assert [short(fold) for fold in folds] == LLAMA


def test_a_reader_that_was_overlooked_is_noticed() -> None:
    view = first_view("mixtral")
    for group in view.groups:
        group.matrices = [matrix for matrix in group.matrices if not matrix.name.endswith("mlp.gate")]
    view.groups = [group for group in view.groups if group.matrices]
    assert not any(fold.producer.name.endswith("post_attention_layernorm") for fold in find_folds(view))
    assert any("post_attention_layernorm feeds something else too" in note for note in view.notes)


def test_padding_does_not_hide_folds() -> None:
    model = build("llama")
    inputs = tiny_inputs(model)
    inputs["attention_mask"][0, :6] = 0
    assert [short(fold) for fold in find_folds(next(block_views(model, inputs)))] == LLAMA


def test_rotated_weights_are_left_alone() -> None:
    view = first_view("llama")
    for group in view.groups:
        group.rotated = group.name.endswith("down_proj")
    assert [short(fold) for fold in find_folds(view)] == LLAMA[:-1]
    assert any("another basis" in note for note in view.notes)


def test_columns_that_are_always_zero_keep_to_their_channel() -> None:
    """A dead channel of a norm is still its channel; one of ReLU is only not seen, and stays as it is."""
    model = build("llama")
    norm = model.model.layers[0].input_layernorm
    norm.weight.data[[3, 7]] = 0
    fold = find_folds(next(block_views(model, tiny_inputs(model))))[0]
    assert torch.equal(fold.columns, torch.arange(tiny.HIDDEN))
    model = build("llama")
    model.model.layers[0].self_attn.v_proj.weight.data[2] = 0  # of several columns
    view = next(block_views(model, tiny_inputs(model)))
    assert ATTENTION[0] not in [short(fold) for fold in find_folds(view)]


class Halves(nn.Module):
    """Values and a constant side by side: half of the columns do not depend on the producer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.cat([x.tanh()[..., :4], self.up(x)], dim=-1))


def view_of(block: nn.Module, width: int) -> BlockView:
    from hfquant.chain import Call
    from hfquant.config import HfQuantConfig
    from hfquant.matrices import trace

    probe = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(3))
    names = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    groups = trace("", block, names, lambda: block(probe))
    return BlockView("", block, groups, HfQuantConfig("int4").recipe, Call(), probe, lambda *_: None, {})


@torch.no_grad()
def test_columns_from_elsewhere_stay_as_they_are() -> None:
    view = view_of(block := Halves(), 8)
    (fold,) = find_folds(view)
    assert fold.columns.tolist() == [UNTOUCHED] * 4 + [0, 1, 2, 3]
    before = block.down.weight.clone()
    assert apply_folds(view, [(fold, torch.tensor([2.0, 4, 8, 16]))], "test")
    assert torch.equal(block.down.weight, before * torch.tensor([1, 1, 1, 1, 2.0, 4, 8, 16]))


@torch.no_grad()
def test_more_channels_than_one_run_can_tell_apart() -> None:
    width = 600
    block = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8))
    block[0].weight.abs_()
    view = view_of(block, 8)
    view.probe.abs_()  # no channel is dead
    view.expected = view.output()
    probing = Probing(view)
    (producer,) = [p for p in probing.producers(view.groups[1]) if p.size == width]
    assert torch.equal(probing.columns(producer, view.groups[1]), torch.arange(width))


def test_a_rewrite_that_changes_the_block_is_taken_back_and_noted() -> None:
    view = first_view("llama")
    before = {name: value.clone() for name, value in view.module.state_dict().items()}
    fold = find_folds(view)[0]
    wrong = replace(fold, columns=fold.columns.flip(0))
    assert not apply_folds(view, [(wrong, torch.linspace(1, 2, tiny.HIDDEN))], "test")
    assert "taken back" in view.notes[-1] and "input_layernorm" in view.notes[-1]
    assert all(torch.equal(value, before[name]) for name, value in view.module.state_dict().items())


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_scales_that_cannot_be_undone_are_refused(bad: float) -> None:
    view = first_view("llama")
    scale = torch.ones(tiny.HIDDEN)
    scale[5] = bad
    with pytest.raises(ValueError, match="positive and finite"):
        apply_folds(view, [(find_folds(view)[0], scale)], "test")


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=20), st.sampled_from(["amax", "mean"]))
def test_values_of_columns_and_channels(columns: list[int], how: str) -> None:
    producer = Producer("p", nn.Identity(), (), 5)
    fold = Fold(producer, torch.tensor(columns), ())
    values = torch.arange(1.0, len(columns) + 1)
    for channel, value in enumerate(fold.by_channel(values, how).tolist()):
        own = [values[i].item() for i, c in enumerate(columns) if c == channel]
        expected = 0.0 if not own else max(own) if how == "amax" else sum(own) / len(own)
        assert value == pytest.approx(expected)
    scale = torch.tensor([2.0, 3, 5, 7, 11])
    assert fold.by_column(scale).tolist() == [1.0 if c == -1 else scale[c].item() for c in columns]


def test_gradients_of_users_are_not_touched() -> None:
    model = build("gpt2")
    copied = copy.deepcopy(model)
    for view in block_views(model, tiny_inputs(model)):
        find_folds(view)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in copied.named_parameters()]
