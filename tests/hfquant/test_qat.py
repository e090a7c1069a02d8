"""A prepared model computes, while it trains, what its quantized checkpoint will compute afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM

from hfquant import HfQuantConfig, SpecError, UnsupportedError, WeightError, use_kernel
from hfquant.qat import fake_modules, finish_qat, prepare_qat
from hfquant.swap import packed_modules
from hfquant.testing.tiny import tiny_inputs, tiny_model

METHODS: dict[str, dict[str, Any]] = {
    "int4": {"block_size": 48},
    "int3": {"symmetric": False, "embeddings": True, "modules_to_not_convert": []},
    "nf4": {"double_quant": True, "range": "percentile"},
    "w8a8": {"transform": None},
    "llm_int8": {"threshold": 3.0},
}


def gpt_oss() -> Any:
    """Experts that are stored transposed and have biases."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = GptOssConfig(**sizes, **experts, vocab_size=256, pad_token_id=0, eos_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GptOssForCausalLM(config).eval()


def config_of(method: str) -> HfQuantConfig:
    return HfQuantConfig(method, **METHODS.get(method, {}))


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_exit(model: Any, method: str, folder: Path) -> None:
    """Train a model through quantization; its checkpoint quantizes to what it has computed, bit for bit."""
    inputs = tiny_inputs(model)
    classes = {name: type(module) for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    prepare_qat(model, config_of(method))
    names = [name for name, _ in fake_modules(model)]
    found = gradients(model, inputs)
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert {name for name, gradient in found.items() if gradient.any()} >= matrices
    torch.optim.SGD(model.parameters(), lr=0.02).step()
    seen = logits(model, inputs)
    assert finish_qat(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    after = model.state_dict()
    assert after.keys() == before.keys() and not any(torch.equal(after[name], before[name]) for name in matrices)
    assert not torch.equal(logits(model, inputs), seen)
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder, quantization_config=config_of(method))
    assert [name for name, _ in packed_modules(loaded)] == names
    with use_kernel("reference"):
        assert torch.equal(logits(loaded, inputs), seen)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_lost_at_the_exit(method, tmp_path):
    check_exit(tiny_model("llama"), method, tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "vit"])
def test_nothing_is_lost_at_the_exit_of_other_architectures(kind, tmp_path):
    check_exit(tiny_model(kind), "fp8", tmp_path)


@pytest.mark.parametrize("method", ["int4", "llm_int8"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_train_too(kind, method, tmp_path):
    model = gpt_oss() if kind == "gpt_oss" else tiny_model(kind)
    with torch.no_grad():  # columns that int8 cannot hold, others in each expert
        for parameter in model.parameters():
            if parameter.dim() == 3:
                for expert, matrix in enumerate(parameter):
                    wide = matrix if kind == "gpt_oss" else matrix.T
                    wide[expert] *= 1e-4
    check_exit(model, method, tmp_path)


def test_products_of_quantized_inputs_are_those_of_the_cpu_kernel_to_its_tolerance(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    layer = type(model).from_pretrained(tmp_path, quantization_config=config_of("w8a8")).model.layers[0].mlp.down_proj
    prepared = prepare_qat(model, config_of("w8a8")).model.layers[0].mlp.down_proj
    x = torch.randn(9, layer.in_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["int4", "w8a8"])
def test_autocast_is_that_of_the_quantized_model(method, tmp_path):
    model = tiny_model("llama")
    inputs = tiny_inputs(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config_of(method))
    prepare_qat(model, config_of(method))
    with torch.autocast("cpu", torch.bfloat16), use_kernel("reference"):
        seen, expected = (logits(each, inputs) for each in (model, loaded))
    assert seen.dtype == torch.bfloat16 and torch.equal(seen, expected)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_gradient_checkpointing_changes_no_gradient(kind):
    model = prepare_qat(tiny_model(kind), config_of("llm_int8")).train()
    inputs = tiny_inputs(model)
    plain = gradients(model, inputs)
    model.activation_checkpointing_enable()
    again = gradients(model, inputs)
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_prepared_model_is_saved_and_copied_as_an_ordinary_one(tmp_path):
    model = tiny_model("llama")
    expected, inputs = model.state_dict(), tiny_inputs(model)
    prepare_qat(model, config_of("int4"))
    model.save_pretrained(tmp_path)
    state = type(model).from_pretrained(tmp_path).state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), logits(model, inputs))
    finish_qat(twin)
    assert len(list(fake_modules(model))) == 14 and not list(fake_modules(twin))


def test_hooks_and_frozen_parameters_stay():
    model = tiny_model("llama")
    layer, calls = model.model.layers[0].mlp.up_proj, []
    layer.register_forward_hook(lambda *args: calls.append(1))
    layer.weight.requires_grad_(False)
    prepare_qat(model, config_of("int4"))
    found = gradients(model, tiny_inputs(model))
    assert calls and "model.layers.0.mlp.up_proj.weight" not in found
    assert "model.layers.0.mlp.gate_proj.weight" in found


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("gptq", {"data": "self"}, 'read calibration data .* such as "int4"'),
        ("w8a8", {"data": "self"}, "smoothquant.*transform=None"),
        ("w8a8", {"data": "self", "transform": None, "dynamic": False}, "static ranges.*dynamic"),
        ("fpq", {"data": "self"}, "read calibration data"),
        ("fpq", {"data": "self", "preshift": False, "act_bits": 4, "attention": True}, "attention=False"),
        ("int4", {"outliers": 0.02}, "leave outliers out"),
        ("int4", {"data": "self", "range": "weighted_mse"}, "read calibration data"),
    ],
)
def test_recipes_that_calibrate_are_refused(method, options, reason):
    model = tiny_model("llama")
    with pytest.raises(UnsupportedError, match=f"method '{method}' cannot be trained through: .*{reason}"):
        prepare_qat(model, HfQuantConfig(method, **options))
    assert not list(fake_modules(model))


def test_models_that_cannot_be_prepared_are_refused(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(SpecError, match=r"not prepared.*prepare_qat"):
        finish_qat(model)
    with pytest.raises(SpecError, match=r"nothing in LlamaForCausalLM is quantized by 'int4'.*modules_to_not_convert"):
        prepare_qat(model, HfQuantConfig("int4", modules_to_not_convert=[".*proj", "lm_head"]))
    prepare_qat(model, config_of("int4"))
    with pytest.raises(SpecError, match=r"prepared already.*finish_qat"):
        prepare_qat(model, config_of("int4"))
    finish_qat(model).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"codes do not train.*adapters"):
        prepare_qat(type(model).from_pretrained(tmp_path, quantization_config=config_of("int4")), config_of("int4"))


def test_training_that_overflowed_names_the_layer():
    model = prepare_qat(tiny_model("llama"), config_of("int4"))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.inf
    with pytest.raises(WeightError, match=r"model\.layers\.1\.self_attn\.q_proj holds 1 NaN or infinite"):
        model(**tiny_inputs(model))
