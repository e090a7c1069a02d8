"""A rotated model computes what it did before, and says why where it cannot be rotated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, GemmaConfig, LlamaConfig, Phi3Config, PreTrainedModel

from hfquant import HfQuantConfig, UnsupportedError
from hfquant.blockview import BlockView, OutsideView, outside_view
from hfquant.chain import calls, find_chain, first_call, no_cache
from hfquant.hadamard import random_hadamard
from hfquant.matrices import trace
from hfquant.rotation import rotate, rotate_outside
from hfquant.testing.tiny import tiny_inputs, tiny_model
from tests.models import MODEL_DIR
from tests.models.outliers import inject

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, Callable[..., Any]] = {"gemma": GemmaConfig, "gemma2": Gemma2Config, "phi3": Phi3Config}
SAME = ("llama", "qwen3", "mixtral", "qwen3_moe", "gemma", "phi3", "biased", "trained")


def built(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with random gains and biases, so that a forgotten one shows."""
    if kind == "trained":
        return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=dtype)
    if kind == "biased":
        made = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), dtype=dtype)
    elif kind in CONFIGS:
        made = AutoModelForCausalLM.from_config(CONFIGS[kind](**SIZES), dtype=dtype)
    else:
        return tiny_model(kind, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            scale = 0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            around = 1.0 if parameter.dim() == 1 and kind != "gemma" else 0.0
            parameter.copy_(around + scale * torch.randn(parameter.shape, generator=generator))
    return made.eval()


@torch.no_grad()
def rotated(model: PreTrainedModel, **options: Any) -> tuple[OutsideView, list[BlockView]]:
    """Rotate a model in place, without quantizing anything."""
    chain, batch, views = find_chain(model), tiny_inputs(model), []
    with no_cache(model):
        call, hidden = first_call(model, chain, batch)
        tupled = isinstance(call.output(chain.holder[0], hidden), tuple)
        block_calls, probe = calls(model, chain, batch, tupled)
        outside = outside_view(model, chain, batch)
        rotate_outside(outside, **options)
        for name, block, call in zip(chain.names(), chain.holder, block_calls, strict=True):
            targets = [f"{name}.{inner}" for inner, _ in block.named_modules()]
            groups = trace(name, block, targets, lambda: call.run(block, probe))  # noqa: B023
            recipe = HfQuantConfig("int4").recipe
            view = BlockView(name, block, groups, recipe, call, probe, lambda groups, needs: None, outside.shared)
            probe = view.expected.clone()
            rotate(view, **options)
            views.append(view)
    return outside, views


@torch.no_grad()
def divergence(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """Mean KL over the positions of a few tokens, in float64."""
    logits, again = (m(**tiny_inputs(model)).logits.double() for m in (model, other))
    return float(
        F.kl_div(again.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    )


def read_by_norms(model: PreTrainedModel) -> dict[str, Tensor]:
    """What every linear layer outside of attention's and the MLP's own paths reads, for some tokens."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: found.__setitem__(name, args[0].flatten(0, 1)))
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "gate_proj", "lm_head"))
    ]
    with torch.no_grad():
        model(**tiny_inputs(model))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", SAME)
def test_function_stays_the_same(kind: str) -> None:
    model = built(kind)
    original = copy.deepcopy(model)
    _, views = rotated(model)
    assert divergence(original, model) < 1e-9
    assert all(trial.held for view in views for trial in view.trials if trial.what == "rotation of the hidden states")
    # It is another model: every matrix of the blocks has changed, gains are one.
    before, now = dict(original.named_parameters()), dict(model.named_parameters())
    for name, parameter in now.items():
        if parameter.dim() > 1 and ".layers." in name and not name.endswith(("q_norm.weight", "k_norm.weight")):
            assert not torch.allclose(parameter, before[name], atol=1e-3), name
        if name.endswith("layernorm.weight") or name.endswith("model.norm.weight"):
            assert torch.equal(parameter, torch.full_like(parameter, 0.0 if kind == "gemma" else 1.0)), name


@pytest.mark.parametrize("options", [{"residual": False}, {"value_heads": False}, {"online": False}, {"seed": 3}])
def test_parts_can_be_left_out(options: dict[str, Any]) -> None:
    model, whole = built("llama"), built("llama")
    original = copy.deepcopy(model)
    outside, (view, _) = rotated(model, **options)
    rotated(whole)
    assert divergence(original, model) < 1e-9
    same = torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert same == (options == {"residual": False}) and ("basis" in outside.shared) != same
    turned = [group.name.rpartition(".")[2] for group in view.groups if group.rotated]
    assert turned == ([] if options == {"online": False} else ["down_proj"])
    v, expected = (m.model.layers[0].self_attn.v_proj.weight for m in (model, whole))
    assert torch.allclose(v, expected, atol=1e-5) == (options == {"online": False})


def test_hidden_states_are_in_the_basis_that_is_passed_on() -> None:
    model = built("trained")
    original = copy.deepcopy(model)
    basis = rotated(model, seed=5)[0].shared["basis"]
    assert torch.equal(basis, random_hadamard(256, 5))
    states, again = (m.model(**tiny_inputs(m), output_hidden_states=True).hidden_states for m in (original, model))
    for before, now in zip(states[:-1], again[:-1], strict=True):  # the last one is behind the norm, with its gain
        torch.testing.assert_close(now.double(), before.double() @ basis, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "phi3", "mixtral"])
def test_value_heads_are_found_with_their_width(kind: str) -> None:
    _, views = rotated(built(kind))
    for view in views:
        assert view.notes == []
        assert view.shared["value path"][1:] == (".self_attn.o_proj", 32, 16)
        assert view.trials[-1].what == "rotation of the values" and view.trials[-1].held


def test_experts_are_all_marked_for_the_online_rotation_and_routers_are_not() -> None:
    for kind in ("mixtral", "qwen3_moe"):
        _, views = rotated(built(kind))
        for view in views:
            marked = {matrix.name for group in view.groups if group.rotated for matrix in group.matrices}
            assert marked == {f"{view.name}.mlp.experts.down_proj[{expert}]" for expert in range(4)}


def test_tokens_that_rounding_sends_to_another_expert_do_not_matter() -> None:
    model = built("mixtral")
    for layer in model.model.layers:
        router = next(m for m in layer.mlp.modules() if m._parameters.get("weight") is not None)
        with torch.no_grad():
            noise = torch.randn(64, generator=torch.Generator().manual_seed(0))
            router.weight[1] = router.weight[0] + 1e-8 * noise  # a tie for every token, but for rounding
    original = copy.deepcopy(model)
    _, views = rotated(model, value_heads=False)
    assert divergence(original, model) > 1e-6  # the experts of a tie are strangers
    assert all(view.trials[0].held and view.moved() < 1e-6 for view in views)


def test_outlier_channels_are_spread() -> None:
    model = inject(built("trained"), factor=64.0, channels=4, final_norm=True)
    before = read_by_norms(model)
    original = copy.deepcopy(model)
    rotated(model)
    assert divergence(original, model) < 1e-6
    after = read_by_norms(model)
    assert before.keys() == after.keys() and len(before) == 9
    for name, x in before.items():
        peak, spread = ((y.abs().amax() / y.pow(2).mean().sqrt()) for y in (x, after[name]))
        assert float(spread) < 0.4 * float(peak), name


def test_rotation_undoes_an_injection_bit_for_bit() -> None:
    """Factors are powers of two and gains move into the matrices first, so that nothing is left of the outliers."""
    plain, injected = built("trained"), inject(built("trained"), factor=64.0, channels=4, final_norm=True)
    rotated(plain)
    rotated(injected)
    other = dict(injected.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, other[name]), name


def test_tied_embeddings_are_taken_apart_and_the_model_reloads(tmp_path: Path) -> None:
    model = built("gemma")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    outside, _ = rotated(model)
    assert outside.notes == ["lm_head was tied to the embeddings and is a matrix of its own now"]
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert divergence(model, again) == 0


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gpt2", r"transformer.ln_f \(LayerNorm\) adds a bias, as LayerNorm does"),
        ("vit", r"vit.layernorm \(LayerNorm\) adds a bias, as LayerNorm does"),
        ("bert", r"no norm reads what leaves the last block"),
    ],
)
def test_models_that_cannot_be_rotated_are_refused_unchanged(kind: str, reason: str) -> None:
    model = built(kind)
    original = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedError, match=f"cannot be rotated: {reason}"):
        rotated(model)
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())


def test_norms_behind_attention_are_found_out() -> None:
    with pytest.raises(UnsupportedError, match=r"layers.0 cannot be rotated: its output changes .* leave it out"):
        rotated(built("gemma2"))


def test_layernorm_without_bias_is_refused() -> None:
    model = built("llama")
    model.model.norm = torch.nn.LayerNorm(64, bias=False)
    with pytest.raises(UnsupportedError, match=r"model.norm \(LayerNorm\) subtracts the mean"):
        rotated(model)


def test_model_without_its_head_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"no output layer reads norm, .* Load it with its head"):
        rotated(built("llama").model)


def test_tie_that_the_configuration_does_not_tell_is_refused() -> None:
    model = built("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(UnsupportedError, match="a rotation needs them apart"):
        rotated(model)


def test_matrices_that_share_a_tensor_are_refused() -> None:
    model = built("llama")
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight = attention.k_proj.weight
    with pytest.raises(UnsupportedError, match=r"v_proj and .*k_proj share one tensor"):
        rotated(model)


def test_bfloat16_model_stays_close() -> None:
    model = built("trained", torch.bfloat16)
    original = copy.deepcopy(model).float()
    rotated_outside = outside_view(model, find_chain(model), tiny_inputs(model))
    with torch.no_grad():
        rotate_outside(rotated_outside)
    basis = rotated_outside.shared["basis"]
    table = model.model.embed_tokens.weight.double()
    torch.testing.assert_close(table, original.model.embed_tokens.weight.double() @ basis, rtol=2**-8, atol=1e-6)
