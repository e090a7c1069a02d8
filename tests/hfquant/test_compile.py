"""`torch.compile` and `torch.export` see whole graphs, and compute what eager mode computes."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import hfquant
from hfquant import HfQuantConfig
from hfquant.nn import QLinear
from hfquant.quantize import pack, quantize_linear
from hfquant.testing.tiny import tiny_inputs, tiny_model


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def quantized(folder, kind: str = "llama", **options):
    tiny_model(kind).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=HfQuantConfig("int4", **options))


def layer(method: str = "nf4", **options) -> QLinear:
    recipe = HfQuantConfig(method, **options).recipe
    generator = torch.Generator().manual_seed(0)
    made = QLinear(48, 40, nn.Parameter(torch.randn(40, generator=generator)), torch.float32)
    made.kind = "linear"
    made.hold(*pack(quantize_linear(torch.randn(40, 48, generator=generator), recipe), recipe))
    return made


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_whole_model_compiles_without_graph_breaks(tmp_path, backend):
    model = quantized(tmp_path, symmetric=False, group_size=32)
    inputs = tiny_inputs(model)
    expected = model(**inputs).logits
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_backward_through_compiled_adapters(tmp_path):
    model = get_peft_model(
        quantized(tmp_path), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    ids = tiny_inputs(model)["input_ids"]
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) > 4 and all(grad.abs().sum() > 0 for grad in results[0])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


def test_a_layer_compiles_once_for_any_number_of_tokens():
    module = layer()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (3, 5, 17):
            x = torch.randn(tokens, 48)
            assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize("method", ["nf4", "int8", "quantile4"])
def test_a_layer_can_be_exported(method):
    module = layer(method)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(module, (torch.randn(4, 48),), dynamic_shapes=({0: tokens},), strict=True)
    assert "hfquant.linear" in str(program.graph)
    for count in (2, 9):
        x = torch.randn(count, 48)
        assert torch.equal(program.module()(x), module(x))


def test_generation_compiles_dense_models_only(tmp_path: Path) -> None:
    """Which experts run is decided from the data, which one graph cannot hold."""
    for kind, expected in (("llama", True), ("mixtral", False)):
        model = tiny_model(kind)
        model.save_pretrained(tmp_path / kind)
        quantized = type(model).from_pretrained(tmp_path / kind, quantization_config=HfQuantConfig("int4"))
        assert quantized.hf_quantizer.is_compileable is expected


@torch.no_grad()
def test_generation_with_a_static_cache_compiles_and_writes_the_same(tmp_path):
    model = quantized(tmp_path)
    ids = tiny_inputs(model)["input_ids"][:1]
    greedy = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    expected = model.generate(ids, **greedy)
    hfquant.optimize(model)
    assert torch.equal(model.generate(ids, **greedy, cache_implementation="static"), expected)
    seen = []
    eager = torch._dynamo.backends.debugging.eager
    model.forward = torch.compile(model.forward, fullgraph=True, backend=lambda *a: seen.append(a) or eager(*a))
    assert torch.equal(model.generate(ids, **greedy, cache_implementation="static"), expected)
    assert len(seen) == 2  # one graph for the prompt, one for all tokens after it
