"""FPQ of attention's operands: the search for each given the other, and the way through checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

import hfquant
from hfquant import HfQuantConfig, SpecError, products
from hfquant.attention import IMPLEMENTATION, OPERANDS, PRODUCTS, Operands
from hfquant.blocks import Blocks
from hfquant.chain import find_chain
from hfquant.histogram import Histogram
from hfquant.input_ranges import INPUT_RANGES, InputChoice, SeenInput, input_params
from hfquant.inspection import inspect_checkpoint
from hfquant.recipe import Recipe
from hfquant.reference import as_seen
from hfquant.report import REPORT_NAME
from hfquant.source import model_class
from hfquant.spec import InputSpec, TensorSpec
from hfquant.swap import packed_modules
from hfquant.testing.tiny import HEADS, LAYERS, tiny_inputs, tiny_model
from hfquant_fpq.inputs import find
from hfquant_fpq.preset import fpq as preset
from hfquant_fpq.space import Space, formats, usual

STATIC = InputSpec(TensorSpec("e2m1", Blocks(-1, -1)), dynamic=False)
TOKEN = InputSpec(TensorSpec("e2m1", Blocks(1, -1)))
KINDS = pytest.mark.parametrize("kind", ["bert", "vit", "llama"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the search


def loss(seen: SeenInput, choice: InputChoice) -> float:
    """Squared change of the products x w^T [H, S, N] of all heads, per row, in float64."""
    (exact,), (quantized,) = seen.weights, seen.quantized
    x, made = seen.sample, as_seen(seen.sample, choice.tensor, choice.params)
    total = 0.0
    for head in range(len(x)):
        right = x[head].double() @ exact[head].double().T
        total += float((made[head].double() @ quantized[head].double().T - right).square().sum())
    return total / (x.shape[0] * x.shape[1])


def unclipped(seen: SeenInput, given: InputSpec, name: str) -> InputChoice:
    tensor = TensorSpec(name, given.tensor.blocks)
    return InputChoice(tensor, None if given.dynamic else input_params(-seen.absmax, seen.absmax, tensor))


@pytest.mark.parametrize("given", [STATIC, TOKEN], ids=["tensor", "token"])
@pytest.mark.parametrize("seed", range(3))
def test_an_operand_has_the_smallest_error_of_all_heads_together(seed: int, given: InputSpec) -> None:
    x, w = normal(3, 16, 8, seed=seed).exp(), normal(3, 10, 8, seed=seed + 1)
    counted = Histogram()
    counted.add(x)
    seen = SeenInput("q", counted, x, float(x.abs().max()), (w,), (w + 0.1 * normal(3, 10, 8, seed=seed + 2),))
    choice, found = find(seen, given, Space(formats(4)))
    assert found == pytest.approx(loss(seen, choice), rel=1e-4)
    assert all(found <= loss(seen, unclipped(seen, given, name)) * (1 + 1e-5) for name in formats(4))


@pytest.mark.parametrize("inputs", ["tensor", "token"])
def test_what_is_chosen_is_no_worse_than_the_usual_format_without_clipping(
    inputs: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each time that an operand is looked at, for what was found for the other one so far."""
    asked: list[tuple[SeenInput, InputSpec, InputChoice]] = []
    original = INPUT_RANGES.get("fpq")

    @functools.wraps(original)
    def watched(seen: SeenInput, given: InputSpec, **options: Any) -> InputChoice:
        asked.append((seen, given, original(seen, given, **options)))
        return asked[-1][2]

    monkeypatch.setattr(products, "INPUT_RANGES", SimpleNamespace(get=lambda name: watched))
    model = quantized("llama", saved("llama", tmp_path), act_bits=4, attention=True, inputs=inputs, rounds=2)
    assert len(asked) >= LAYERS * len(OPERANDS)
    better = 0
    for seen, given, choice in asked:
        plain = loss(seen, unclipped(seen, given, usual(4)))
        assert loss(seen, choice) <= plain * (1 + 1e-4)
        better += loss(seen, choice) < 0.9 * plain
    assert better, "or nothing was searched"
    latest = {seen.name: choice for seen, _, choice in asked}
    for name, record in model.config.quantization_config.attention.items():
        for operand in OPERANDS:
            choice = latest[f"{name} ({operand})"]
            assert InputSpec.from_dict(record[operand]) == InputSpec(choice.tensor, choice.params is None)
            scale = model.get_submodule(f"{name}.operands").scale[OPERANDS.index(operand)]
            assert choice.params is None or torch.equal(scale.reshape(1), choice.params.scale)


def test_the_other_operand_is_the_one_that_was_quantized(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[SeenInput, InputChoice]] = []
    original = INPUT_RANGES.get("fpq")

    @functools.wraps(original)
    def watched(seen: SeenInput, given: InputSpec, **options: Any) -> InputChoice:
        asked.append((seen, original(seen, given, **options)))
        return asked[-1][1]

    monkeypatch.setattr(products, "INPUT_RANGES", SimpleNamespace(get=lambda name: watched))
    quantized("bert", saved("bert", tmp_path), act_bits=4, attention=True, rounds=1)
    by_name = {seen.name: (seen, choice) for seen, choice in asked}
    assert len(asked) == len(by_name) == LAYERS * len(OPERANDS), "one round asks once"
    for name, (seen, _) in by_name.items():
        for one, other in PRODUCTS:
            if name.endswith(f"({other})"):  # the second of the pair
                first, choice = by_name[name.replace(f"({other})", f"({one})")]
                assert torch.equal(seen.quantized[0], as_seen(first.sample, choice.tensor, choice.params))
                assert len(seen.sample) == 2 * HEADS


# ---- the option


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": True}, "attention=True is for quantized inputs: give act_bits too"),
        ({"attention": True, "act_bits": 16}, "give act_bits too"),
        ({"attention": "all", "act_bits": 8}, "attention is True or False"),
        ({"attention": 1, "act_bits": 8}, "attention is True or False"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        HfQuantConfig("fpq", **options)


def test_the_recipe_survives_json() -> None:
    for inputs in ("tensor", "token", "group"):
        recipe = preset(act_bits=6, attention=True, inputs=inputs)
        assert recipe.attention is not None and Recipe.from_dict(recipe.to_dict()) == recipe
    assert preset(act_bits=6).attention is None


# ---- from end to end


def saved(kind: str, folder: Path) -> Path:
    tiny_model(kind).save_pretrained(folder / "source")
    return folder / "source"


def batch(kind: str) -> dict[str, Tensor]:
    inputs = tiny_inputs(tiny_model(kind))
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, 9:] = 0
    return inputs


def config(kind: str, **options: Any) -> HfQuantConfig:
    return HfQuantConfig("fpq", data=[batch(kind)], **{"act_bits": 4, "attention": True, "rounds": 1, **options})


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32, **options)


def quantized(kind: str, folder: Path, **options: Any) -> PreTrainedModel:
    return load(folder, quantization_config=config(kind, **options))


def logits(model: PreTrainedModel, kind: str) -> Tensor:
    with torch.no_grad():
        return model(**batch(kind)).logits


def operands(model: torch.nn.Module) -> list[Operands]:
    return [module for module in model.modules() if isinstance(module, Operands)]


class Interrupt(Exception):
    pass


@KINDS
def test_loaded_saved_streamed_and_resumed_are_one_model(kind: str, tmp_path: Path) -> None:
    source = saved(kind, tmp_path)
    model = quantized(kind, source)
    expected = logits(model, kind)
    assert len(operands(model)) == LAYERS and model.config._attn_implementation == IMPLEMENTATION
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again, kind), expected)
    assert again.config.quantization_config.attention == model.config.quantization_config.attention

    hfquant.quantize(source, config(kind), tmp_path / "whole", dtype="float32")
    assert torch.equal(logits(load(tmp_path / "whole"), kind), expected)

    second = find_chain(model).names()[1]

    def tick(what: str, share: float) -> None:
        if what == second:
            raise Interrupt

    with pytest.raises(Interrupt):
        hfquant.quantize(source, config(kind), tmp_path / "resumed", dtype="float32", tick=tick)
    worked: list[str] = []
    hfquant.quantize(
        source, config(kind), tmp_path / "resumed", dtype="float32", tick=lambda what, share: worked.append(what)
    )
    assert worked.count(find_chain(model).names()[0]) == 1, "it was not quantized again"
    files = {file.name for file in (tmp_path / "whole").iterdir()} - {REPORT_NAME}
    for name in files:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    told = inspect_checkpoint(tmp_path / "whole")
    assert {layer.name for layer in told.layers} == {name for name, _ in packed_modules(model)}
    held = [spec.tensor.grid for part in model.modules() if isinstance(part, Operands) for spec in part.specs.values()]
    assert len(held) == len(OPERANDS) * LAYERS and sorted(told.operands.values()) == sorted(held)
    counted = told.formats["operand"]
    assert set(counted) == set(OPERANDS) and all(sum(row.values()) == LAYERS for row in counted.values())


@KINDS
def test_a_base_model_has_the_operands_and_dequantize_has_none(kind: str, tmp_path: Path) -> None:
    model = quantized(kind, saved(kind, tmp_path))
    model.save_pretrained(tmp_path / "saved")
    parts = {"add_pooling_layer": False} if kind == "vit" else {}  # what the whole model does not have either
    base = AutoModel.from_pretrained(tmp_path / "saved", dtype=torch.float32, **parts)
    with torch.no_grad():
        found, expected = (m(**batch(kind)).last_hidden_state for m in (base, model.base_model))
    assert torch.equal(found, expected) and len(operands(base)) == LAYERS
    model.dequantize()
    plain = logits(model, kind)
    assert not operands(model) and not list(packed_modules(model))
    model.set_attn_implementation("sdpa")
    assert torch.allclose(logits(model, kind), plain, rtol=0, atol=1e-4)


def test_quantized_attention_is_what_makes_the_difference(tmp_path: Path) -> None:
    source = saved("llama", tmp_path)
    one, other = (quantized("llama", source, attention=attention) for attention in (True, False))
    assert not operands(other) and other.config._attn_implementation != IMPLEMENTATION
    codes = [dict(model.named_parameters())["model.layers.0.self_attn.q_proj.codes"] for model in (one, other)]
    assert torch.equal(*codes), "nothing is quantized before the first attention"
    assert not torch.allclose(logits(one, "llama"), logits(other, "llama"), atol=1e-2)


def test_adapters_train_through_quantized_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantized("llama", saved("llama", tmp_path), act_bits=8)
    before = [operand.scale.clone() for operand in operands(model)]
    expected = logits(model, "llama")
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    inputs = batch("llama")
    trained = {name: value for name, value in tuned.named_parameters() if value.requires_grad}
    assert trained and all("lora" in name for name in trained)
    made = tuned(**inputs, labels=inputs["input_ids"])
    assert torch.equal(made.logits, expected), "training starts where inference is"
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = tuned(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        grads = {name: value.grad for name, value in trained.items() if "lora_B" in name}
        assert len(grads) == 3 * LAYERS and all(grad is not None and grad.any() for grad in grads.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(one.scale, scale) for one, scale in zip(operands(model), before, strict=True))
