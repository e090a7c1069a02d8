"""Packed weights on the CPU and on disk: the same numbers, honest budgets, and no hole that goes unnoticed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.accelerate import compute_module_sizes

from hfquant import FormatError, HfQuantConfig
from hfquant.swap import packed_modules
from hfquant.testing.tiny import tiny_inputs, tiny_model

MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
KINDS = ["llama", "mixtral"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder of a full-precision and of a native checkpoint by architecture, and the logits of the quantized model."""
    made = {}
    for kind in KINDS:
        source, native = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("native")
        tiny_model(kind).save_pretrained(source)
        model = load(source, quantization_config=config())
        model.save_pretrained(native)
        made[kind] = source, native, logits(model)
    return made


def config() -> HfQuantConfig:
    return HfQuantConfig("int4", group_size=32, symmetric=False)


def load(folder: Path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def start(checkpoints, kind: str, how: str) -> dict:
    """The keywords of `load` for a checkpoint that is quantized on the fly, or that is native."""
    source, native, _ = checkpoints[kind]
    return {"folder": source, "quantization_config": config()} if how == "on the fly" else {"folder": native}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**tiny_inputs(model)).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["on the fly", "native"])
def test_offloaded_models_compute_the_same_and_save_the_same(checkpoints, tmp_path, kind, how):
    _, native, expected = checkpoints[kind]
    model = load(**start(checkpoints, kind, how), device_map=MAP, offload_folder=tmp_path / "offload")
    packed = {name for name, _ in packed_modules(model)}
    on_disk = {name for name in packed if name.startswith("model.layers.1")}
    assert on_disk and all(p.is_meta for name in on_disk for p in model.get_submodule(name).parameters(recurse=False))
    for _ in range(2):  # twice: weights are read from disk and dropped again
        assert torch.equal(logits(model), expected)
    assert not any(p.requires_grad for name in packed for p in model.get_submodule(name).parameters(recurse=False))
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    index = json.loads((tmp_path / "saved" / "hfquant.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert torch.equal(logits(load(tmp_path / "saved")), expected)
    saved, original = ({n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()} for folder in
                       (tmp_path / "saved", native))  # fmt: skip
    assert saved.keys() == original.keys() and all(torch.equal(saved[name], original[name]) for name in saved)


@pytest.mark.parametrize("how", ["on the fly", "native"])
def test_auto_map_with_little_memory_spreads_over_cpu_and_disk(checkpoints, tmp_path, how):
    expected = checkpoints["llama"][2]
    model = load(
        **start(checkpoints, "llama", how), device_map="auto", max_memory={"cpu": 160_000}, offload_folder=tmp_path
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("how", ["on the fly", "native"])
def test_the_budget_is_the_packed_size(checkpoints, how, monkeypatch):
    """What `device_map="auto"` counts for a layer is what the loaded layer takes: not nothing, not full precision."""
    counted = {}

    def watch(model, device_map, max_memory, quantizer):
        counted.update(compute_module_sizes(model, quantizer)[0])
        return {"": "cpu"}

    monkeypatch.setattr("transformers.modeling_utils._get_device_map", watch)
    model = load(**start(checkpoints, "llama", how), device_map="auto")
    full = compute_module_sizes(load(checkpoints["llama"][0]))[0]
    for name in ("model.layers.0", "model.layers.1.mlp", "model.layers.0.self_attn.q_proj"):
        taken = sum(p.numel() * p.element_size() for p in model.get_submodule(name).parameters())
        assert counted[name] == taken and taken < 0.25 * full[name]
    assert counted["lm_head"] == full["lm_head"]


MISSING = [
    "model.layers.1.mlp.up_proj.scale",
    "model.layers.1.mlp.up_proj.codes",
    "model.layers.1.input_layernorm.weight",
    "model.layers.0.mlp.up_proj.zero",
]


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_tensor_is_caught_wherever_it_belongs(checkpoints, tmp_path, name):
    _, native, _ = checkpoints["llama"]
    (tmp_path / "config.json").write_text((native / "config.json").read_text())
    index = json.loads((native / "hfquant.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        save_file({n: t for n, t in load_file(native / file).items() if n != name}, tmp_path / file, {"format": "pt"})
    assert index["weight_map"].pop(name)
    (tmp_path / "hfquant.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="up_proj" if "proj" in name else name):
        load(tmp_path, device_map=MAP, offload_folder=tmp_path / "offload")


def test_a_missing_full_precision_weight_is_caught_on_disk(checkpoints, tmp_path):
    source, _, _ = checkpoints["llama"]
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj"):
        load(tmp_path, quantization_config=config(), device_map=MAP, offload_folder=tmp_path / "offload")
