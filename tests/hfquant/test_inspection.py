"""The layer view: it must tell what the files hold, and errors that a plain computation confirms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hfquant
from hfquant import FormatError, HfQuantConfig, SpecError
from hfquant.inspection import inspect_checkpoint, inspect_model, weight_errors
from hfquant.report import packed_weights
from hfquant.stored import StoredTensors
from hfquant.testing.tiny import tiny_model


def make(folder: Path, kind: str, config: HfQuantConfig) -> tuple[Path, Path]:
    tiny_model(kind, dtype=torch.bfloat16).save_pretrained(folder / "source")
    hfquant.quantize(folder / "source", config, folder / "out")
    return folder / "source", folder / "out"


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", HfQuantConfig("int4", symmetric=False)),
        ("gpt2", HfQuantConfig("nf4", double_quant=True, embeddings=True)),
        ("mixtral", HfQuantConfig("int3", group_size=32)),
        ("llama", HfQuantConfig("e2m1", outliers=0.05)),
        ("llama", HfQuantConfig("quantile4")),
        ("mixtral", HfQuantConfig("e1m2", group_size=32)),
        ("gpt2", HfQuantConfig("e4m3")),
    ],
    ids=["asymmetric", "conv1d", "experts", "outliers", "fitted", "integers", "fp8"],
)
def test_headers_alone_give_what_the_loaded_model_gives(tmp_path, kind, config):
    _, out = make(tmp_path, kind, config)
    from_headers = inspect_checkpoint(out)
    assert from_headers == inspect_model(AutoModelForCausalLM.from_pretrained(out))
    sizes = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            sizes |= {name: opened.get_tensor(name).nbytes for name in opened.keys()}  # noqa: SIM118
    for layer in from_headers.layers:
        separator = "_" if layer.kind == "experts" else "."
        stored = {name: size for name, size in sizes.items() if name.startswith(layer.name + separator)}
        stored.pop(f"{layer.name}.bias", None)
        assert layer.mb * 1e6 == pytest.approx(sum(stored.values()), abs=0.1), layer.name
        weights = layer.count * layer.shape[0] * layer.shape[1]
        assert layer.bits_per_weight == pytest.approx(8 * sum(stored.values()) / weights)


def test_a_rewritten_model_is_not_compared_weight_by_weight(tmp_path):
    tokens = torch.randint(3, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    source, out = make(tmp_path, "llama", HfQuantConfig("w8a8", data=tokens))
    with pytest.raises(SpecError, match=r"rewrote the model before quantizing it \(smoothquant\)"):
        inspect_checkpoint(out, source)
    assert all(layer.error is not None for block in inspect_checkpoint(out).blocks for layer in block.layers)


def test_errors_are_relative_and_the_worst_comes_first(tmp_path):
    source, out = make(tmp_path, "llama", HfQuantConfig("int4"))
    found = inspect_checkpoint(out, source)
    model, original = (AutoModelForCausalLM.from_pretrained(path).dequantize() if path == out else
                       AutoModelForCausalLM.from_pretrained(path) for path in (out, source))  # fmt: skip
    errors = [layer.error for layer in found.layers]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) > 1
    for layer in found.layers:
        w = original.get_submodule(layer.name).weight.detach().double()
        v = model.get_submodule(layer.name).weight.detach().double()
        # `dequantize` rounds to bfloat16, half an ulp at most: 2^-9 of each weight.
        assert layer.error == pytest.approx(((w - v).square().sum() / w.square().sum()).sqrt().item(), abs=2**-9)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_more_bits_are_closer_in_every_layer(tmp_path, kind):
    """Also a check of orientation: against a transposed matrix both errors would be above one."""
    original = tiny_model(kind)
    original.save_pretrained(tmp_path)

    def errors(method):
        return weight_errors(
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HfQuantConfig(method)), original
        )

    few, many = errors("int4"), errors("int8")
    assert few.keys() == many.keys() and few
    assert all(0 < many[name] < few[name] / 4 < 0.1 for name in few)


def test_another_model_is_no_reference(tmp_path):
    _, out = make(tmp_path, "llama", HfQuantConfig("int4"))
    model = AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(SpecError, match="made from"):
        weight_errors(model, tiny_model("gpt2"))


def test_what_is_not_a_native_checkpoint_is_named(tmp_path):
    source, _ = make(tmp_path, "llama", HfQuantConfig("int4"))
    with pytest.raises(SpecError, match="not quantized"):
        inspect_checkpoint(source)
    with pytest.raises(SpecError, match="not loaded with hfquant"):
        inspect_model(tiny_model("llama"))


@pytest.mark.parametrize("damage", ["missing", "shape", "dtype"])
def test_files_that_contradict_the_config_are_found(tmp_path, damage):
    _, out = make(tmp_path, "llama", HfQuantConfig("int4"))
    file = out / "hfquant.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.codes"
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    else:
        tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.up_proj\.codes"):
        inspect_checkpoint(out)


def test_layers_that_a_served_format_holds_say_so(tmp_path):
    """Every row uses 480, its largest number, which OCP's E4M3 does not have, until a layer is told not to."""
    _, out = make(tmp_path, "llama", HfQuantConfig("e4m3"))
    assert {layer.exact_as for layer in inspect_checkpoint(out).layers} == {None}
    tensors = load_file(out / "hfquant.safetensors")
    chosen = "model.layers.1.mlp.up_proj"
    tensors[f"{chosen}.codes"].clamp_(1, 253)
    save_file(tensors, out / "hfquant.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(out)
    for layer in inspect_checkpoint(out).layers:
        q = model.get_submodule(layer.name).qtensor()
        levels = q.spec.numbers().decode(q.codes)
        held = torch.equal(levels.to(torch.float8_e4m3fn).float(), levels)
        assert held == (layer.name == chosen) and layer.exact_as == ("FP8 E4M3" if held else None)
    assert inspect_checkpoint(out) == inspect_model(model)


def test_what_is_not_read_is_not_claimed(tmp_path):
    """Values that are elsewhere, offloaded or on the Hub; embeddings, which engines do not look up quantized."""
    _, out = make(tmp_path, "gpt2", HfQuantConfig("e1m6", embeddings=True))
    model = AutoModelForCausalLM.from_pretrained(out)
    for layer in inspect_checkpoint(out).layers:
        assert layer.exact_as == (None if layer.kind == "embedding" else "INT8")
    assert {layer.kind for layer in inspect_checkpoint(out).layers} == {"conv1d", "embedding"}
    weights = packed_weights(model)
    assert all(StoredTensors(out).read(weight, "scale") is not None for weight in weights)
    assert all(StoredTensors("owner/model").read(weight, "scale") is None for weight in weights)
    model.to("meta")
    assert {layer.exact_as for layer in inspect_model(model).layers} == {None}


def test_formats_are_counted_by_type_of_layer_and_experts_that_are_stored_together_once(tmp_path):
    source, out = make(tmp_path, "mixtral", HfQuantConfig("fp8"))
    found = inspect_checkpoint(out)
    attention = {f"{name}_proj": {"e4m3fn": 2} for name in "qkvo"}
    experts = {"gate_up_proj": {"e4m3fn": 2}, "down_proj": {"e4m3fn": 2}}
    assert found.formats == {"weight": {**attention, **experts}, "input": {**attention, **experts}, "operand": {}}
    assert found.to_dict()["formats"] == found.formats
    assert inspect_checkpoint(out, source).formats == found.formats
    _, out = make(tmp_path / "weights", "llama", HfQuantConfig("int4"))
    assert inspect_checkpoint(out).formats["input"] == {}
