"""SmoothQuant against its formula, its exact invariance to channel sizes, and what it does for 8-bit inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hfquant import HfQuantConfig
from hfquant.errors import SpecError
from hfquant.eval import Reference, token_batches
from hfquant.folds import Fold
from hfquant.matrices import Group, Matrix
from hfquant.probing import Producer
from hfquant.recipe import Step
from hfquant.smooth import smoothing, smoothquant
from hfquant.stats import InputStats
from hfquant.testing.tiny import HIDDEN, KINDS, tiny_inputs, tiny_model
from hfquant.testing.views import block_views
from hfquant.w8a8 import w8a8
from tests.models import HELDOUT, MODEL_DIR
from tests.models.outliers import inject, scale_channels, spread

exponents = st.lists(st.integers(-8, 8), min_size=HIDDEN, max_size=HIDDEN)
alphas = st.sampled_from([0.0, 0.3, 0.5, 0.85, 1.0])


@torch.no_grad()
def smoothed(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    for view in block_views(model, tiny_inputs(model)):
        smoothquant(view, **options)
        assert all(trial.held for trial in view.trials)
    return model


@torch.no_grad()
def inputs_of(model: PreTrainedModel, names: list[str]) -> dict[str, Tensor]:
    """What layers read, [T, K], by their names."""
    seen: dict[str, Tensor] = {}

    def noting(name: str) -> Callable[..., None]:
        return lambda module, args: seen.update({name: args[0].flatten(0, -2)})

    hooks = [model.get_submodule(name).register_forward_pre_hook(noting(name)) for name in names]
    model(**tiny_inputs(model))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_weights_are_multiplied_by_the_formula_of_the_paper(alpha: float) -> None:
    model = tiny_model("llama")
    attention = "model.layers.1.self_attn"
    readers = [f"{attention}.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")]
    x = inputs_of(model, readers)[readers[0]]
    before = {name: model.get_submodule(name).weight.detach().clone() for name in readers}
    weights = torch.cat(list(before.values()))
    scale = x.abs().amax(0) ** alpha / weights.abs().amax(0) ** (1 - alpha)
    gain = model.get_submodule("model.layers.1.input_layernorm").weight.detach().clone()
    smoothed(model, alpha=alpha)
    for name in readers:
        torch.testing.assert_close(model.get_submodule(name).weight.detach(), before[name] * scale)
    torch.testing.assert_close(model.get_submodule("model.layers.1.input_layernorm").weight.detach(), gain / scale)
    torch.testing.assert_close(inputs_of(model, readers)[readers[0]], x / scale, rtol=1e-4, atol=1e-5)


@given(exponents, alphas)
@settings(max_examples=10)
def test_smoothing_forgets_how_large_channels_were_bit_for_bit(powers: list[int], alpha: float) -> None:
    """In all inputs of a block, with powers of two: smoothed models are the same, whatever alpha."""
    plain, other = tiny_model("llama"), tiny_model("llama")
    factors = torch.exp2(torch.tensor(powers).float())
    for layer in other.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        scale_channels(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], factors)
        scale_channels(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], factors)
        with torch.no_grad():
            mlp.up_proj.weight[:HIDDEN] *= factors[:, None]
            mlp.down_proj.weight[:, :HIDDEN] /= factors
    smoothed(plain, alpha=alpha, layers="all")
    smoothed(other, alpha=alpha, layers="all")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", ["norm", "all"])
def test_smoothed_models_compute_the_same(kind: str, layers: str) -> None:
    model = tiny_model(kind)
    with torch.no_grad():
        before = model(**tiny_inputs(model)).logits.double().log_softmax(-1)
        after = smoothed(model, layers=layers)(**tiny_inputs(model)).logits.double().log_softmax(-1)
    assert abs(float((before.exp() * (before - after)).sum(-1).mean())) < 1e-6


def test_dead_channels_and_empty_columns_are_left_alone() -> None:
    model = tiny_model("llama")
    norm = model.model.layers[0].input_layernorm
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        norm.weight[3] = 0
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            layer.weight[:, 7] = 0
    before = attention.q_proj.weight.detach().clone(), norm.weight.detach().clone()
    smoothed(model)
    assert torch.equal(attention.q_proj.weight[:, 3], before[0][:, 3])
    assert torch.equal(norm.weight[[3, 7]], before[1][[3, 7]])
    assert torch.isfinite(attention.q_proj.weight).all() and torch.isfinite(norm.weight).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_sizes_at_the_ends_of_float32_give_usable_scales(alpha: float) -> None:
    x = torch.tensor([0.0, 0.0, 1.0, 1e-30, 1e30, 1e38, 1e-40])
    w = torch.tensor([0.0, 1.0, 0.0, 1e-30, 1e30, 1e-38, 1e-40])
    group = Group((0, 0, 0), [Matrix("w", nn.Linear(7, 1), "weight", True)], InputStats(7))
    group.stats.absmax = x  # type: ignore[union-attr]
    with torch.no_grad():
        group.matrices[0].values()[:] = w
    scale = smoothing(Fold(Producer("p", nn.Identity(), (), 7), torch.arange(7), (group,)), alpha)
    assert torch.isfinite(scale).all() and (scale > 0).all() and (scale[:3] == 1).all()


def test_only_inputs_of_norms_are_smoothed_unless_all_are_asked_for() -> None:
    def changed(layers: str) -> set[str]:
        model = smoothed(tiny_model("llama"), layers=layers)
        original = tiny_model("llama").state_dict()
        names = {name for name, value in model.state_dict().items() if not torch.equal(value, original[name])}
        return {name.split(".", 3)[3].removesuffix(".weight") for name in names}

    norm = {"input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj"}
    norm |= {f"self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")}
    assert changed("norm") == norm
    assert changed("all") == norm | {"self_attn.o_proj", "mlp.down_proj"}


def test_the_maxima_are_over_all_experts_and_leave_the_router_out() -> None:
    model = tiny_model("mixtral")
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate.weight[:, 5] *= 1000  # a router is not quantized: its size does not count
        mlp.experts.gate_up_proj[2, :, 9] *= 100
    router = mlp.gate.weight.detach().clone()
    largest = mlp.experts.gate_up_proj.detach().abs().amax((0, 1))
    x = inputs_of(model, ["model.layers.0.mlp"])["model.layers.0.mlp"]
    smoothed(model)
    torch.testing.assert_close(mlp.gate.weight.detach(), router * (x.abs().amax(0) / largest).sqrt())


def test_notes_say_what_was_scaled_and_what_was_not() -> None:
    model = tiny_model("bert")
    view = next(block_views(model, tiny_inputs(model)))
    smoothquant(view)
    assert any("query: inputs not scaled, no norm before them" in note for note in view.notes)
    model = tiny_model("llama")
    view = next(block_views(model, tiny_inputs(model)))
    smoothquant(view)
    assert [note.split(",")[0] for note in view.notes] == [
        "smoothquant: model.layers.0.post_attention_layernorm -> gate_proj",
        "smoothquant: model.layers.0.input_layernorm -> q_proj",
    ]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"alpha": 1.5}, "alpha of smoothquant is a number from 0 to 1, got 1.5"),
        ({"alpha": "half"}, "got 'half'"),
        ({"layers": "mlp"}, "layers of smoothquant is one of 'norm', 'all', got 'mlp'"),
        ({"transform": None, "alpha": 0.8}, "alpha and layers belong to the transform 'smoothquant'"),
        ({"input_range": "mse"}, "input_range is for static ranges"),
        ({"dynamic": "no"}, "dynamic is True or False"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], found: str) -> None:
    with pytest.raises(SpecError, match=found):
        HfQuantConfig("w8a8", **options)


def test_the_recipe_says_what_was_asked_for() -> None:
    recipe = w8a8(alpha=0.7, layers="all")
    assert recipe.transforms == (Step("smoothquant", {"alpha": 0.7, "layers": "all"}),)
    assert recipe.scheme.input is not None and recipe.scheme.input.dynamic
    assert recipe.input_range == Step("absmax") and w8a8(dynamic=False).input_range == Step("mse")
    static = w8a8(dynamic=False, input_range={"name": "percentile", "percentile": 99.9}, transform=None)
    assert static.transforms == () and static.scheme.input is not None and not static.scheme.input.dynamic
    assert static.input_range == Step("percentile", {"percentile": 99.9})


@cache
def trained_reference() -> tuple[Reference, list[Tensor]]:
    """Of the trained model on held-out text, and other held-out text to calibrate on."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    tokens = token_batches(AutoTokenizer.from_pretrained(MODEL_DIR), HELDOUT, sequences=12, length=128)
    rows = torch.cat(tokens)
    return Reference(model, [rows[:8]]), [rows[8:]]


def trained_kl(folder: Path, change: Callable[[Any], Any], **options: Any) -> float:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    change(model).save_pretrained(folder)
    reference, data = trained_reference()
    given = {} if options.get("transform", "") is None and options.get("dynamic", True) else {"data": data}
    config = HfQuantConfig("w8a8", **given, **options)
    quantized = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    return reference.compare(quantized).kl


@pytest.mark.parametrize(("dynamic", "change"), [(True, spread), (False, inject)])
def test_channel_sizes_do_not_matter_to_smoothed_models(
    tmp_path: Path, dynamic: bool, change: Callable[[Any], Any]
) -> None:
    """SmoothQuant of an injected model is SmoothQuant of the model: the whole pipeline keeps the exact identity."""
    plain = trained_kl(tmp_path / "plain", lambda model: model, dynamic=dynamic)
    assert trained_kl(tmp_path / "changed", change, dynamic=dynamic) == pytest.approx(plain, rel=0.01)
    assert trained_kl(tmp_path / "rough", change, dynamic=dynamic, transform=None) > 10 * plain
