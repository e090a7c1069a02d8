"""Native checkpoints: closed to plain transformers, open through the Hub, safe files only."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hfquant import FormatError, HfQuantConfig, SpecError
from hfquant.testing.fakehub import FakeHub
from hfquant.testing.tiny import tiny_inputs, tiny_model
from tests import fresh

SIZES = ["10GB", "40KB"]
"""Of shards: one file, and several."""


def saved(folder: Path, size: str) -> Path:
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(folder / "source")
    config = HfQuantConfig("int4")
    model = LlamaForCausalLM.from_pretrained(folder / "source", quantization_config=config)
    model.save_pretrained(folder / "native", max_shard_size=size)
    return folder / "native"


@pytest.fixture(params=SIZES, ids=["one-file", "shards"])
def native(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return saved(tmp_path, request.param)


@pytest.mark.parametrize("cls", ["AutoModelForCausalLM", "LlamaForCausalLM", "AutoModel"])
def test_plain_transformers_raises_instead_of_returning_random_weights(native: Path, cls: str) -> None:
    script = f"import sys, transformers; transformers.{cls}.from_pretrained(sys.argv[1]); print('LOADED')"
    done = fresh.run(script, native)
    assert done.returncode != 0
    assert "LOADED" not in done.stdout
    assert "OSError" in done.stderr


def test_files_are_safetensors_and_json_with_native_names_only(native: Path) -> None:
    names = {path.name for path in native.iterdir()}
    assert not [name for name in names if name.startswith(("model", "pytorch_model"))]
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
    index = json.loads((native / "hfquant.safetensors.index.json").read_text())
    on_disk = {tensor for name in names if name.endswith(".safetensors") for tensor in load_file(native / name)}
    assert set(index["weight_map"]) == on_disk
    assert "transformers_weights" not in json.loads((native / "config.json").read_text())


def test_config_records_version_recipe_and_plugins(native: Path) -> None:
    stored = json.loads((native / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "hfquant"
    assert stored["format_version"] == 1
    assert stored["method"] == "int4"
    assert stored["recipe"]["scheme"]["weight"]["grid"] == "int4"
    assert stored["plugins"] == {}
    assert stored["skipped"] == {
        "lm_head": "output layer, kept by default",
    }


def test_saving_over_an_older_checkpoint_leaves_no_stale_shards(native: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(native)
    assert not hasattr(model.config, "transformers_weights")  # a copy of the config must not open the files either
    model.save_pretrained(native)
    assert "transformers_weights" not in json.loads((native / "config.json").read_text())
    assert {path.name for path in native.glob("*.safetensors")} == {"hfquant.safetensors"}
    LlamaForCausalLM.from_pretrained(native)


# Each repository is named after what is pushed and how. For some the token is only an argument.
PUSHED = [f"{held}-{how}-{size}" for held in SIZES for how in ("push_to_hub", "save_and_push") for size in SIZES]
PUSH = """
import os, sys, hfquant
from transformers import AutoModelForCausalLM
folder, *names = sys.argv[1:]
token = os.environ["HF_TOKEN"]
for name in names:
    held, how, size = name.split("-")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{held}/native")
    if how == "push_to_hub":
        os.environ["HF_TOKEN"] = token
        model.push_to_hub("me/" + name, max_shard_size=size)
    else:
        os.environ.pop("HF_TOKEN", None)
        hub = {"repo_id": "me/" + name, "token": token}
        model.save_pretrained(f"{folder}/{name}", push_to_hub=True, max_shard_size=size, **hub)
"""
LOAD = """
import sys, torch, hfquant
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
folder, *names = sys.argv[1:]
for name in names:
    model = AutoModelForCausalLM.from_pretrained("me/" + name)
    with torch.no_grad():
        save_file({"logits": model(input_ids=torch.arange(1, 14)[None]).logits}, f"{folder}/{name}.logits")
"""


def test_push_to_hub_and_back(tmp_path: Path) -> None:
    """Everything is pushed by one process, and loaded by another."""
    for size in SIZES:
        model = LlamaForCausalLM.from_pretrained(saved(tmp_path / size, size))
    with torch.no_grad():
        expected = model(input_ids=torch.arange(1, 14)[None]).logits
    with FakeHub(lfs_from=20_000) as hub:
        for program in (PUSH, LOAD):
            command = [sys.executable, "-c", program, str(tmp_path), *PUSHED]
            environment = {**os.environ, **hub.environment()}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
        files = {name: list(hub.repos[f"me/{name}"].files) for name in PUSHED}
    for name in PUSHED:
        assert "hfquant.safetensors.index.json" in files[name]
        assert (len([file for file in files[name] if file.endswith(".safetensors")]) > 1) == name.endswith("40KB")
        assert not [file for file in files[name] if file.startswith("model")]
        assert torch.equal(load_file(tmp_path / f"{name}.logits")["logits"], expected)


def test_generation_works_after_reload(native: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(native)
    ids = tiny_inputs(model)["input_ids"]
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert out.shape == (ids.shape[0], ids.shape[1] + 4)


def test_with_an_adapter_attached_only_the_adapter_is_saved(native: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(native)
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    saved = {path.name for path in (tmp_path / "adapter").glob("*.safetensors*")}
    assert saved == {"adapter_model.safetensors"}
    again = LlamaForCausalLM.from_pretrained(native)
    again.load_adapter(tmp_path / "adapter")
    ids = torch.arange(1, 14)[None]
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_copies_and_pickles_still_save_closed(native: Path, tmp_path: Path) -> None:
    import copy
    import io

    model = LlamaForCausalLM.from_pretrained(native)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for number, twin in enumerate([copy.deepcopy(model), torch.load(buffer, weights_only=False)]):
        folder = tmp_path / f"twin{number}"
        twin.save_pretrained(folder)
        assert not list(folder.glob("model*"))
        ids = torch.arange(1, 14)[None]
        with torch.no_grad():
            assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)


def test_model_dtype_is_that_of_the_model_not_of_its_scales(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    config = HfQuantConfig("int8", embeddings=True, modules_to_not_convert=[])
    model = LlamaForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config)
    assert next(model.parameters()).dtype == torch.uint8
    assert model.model.embed_tokens.scale.dtype == torch.float32
    assert model.dtype == torch.bfloat16


def test_saving_an_offloaded_model_over_its_own_checkpoint(native: Path, tmp_path: Path) -> None:
    """Its weights are still in the files that are replaced."""
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    where = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    before = LlamaForCausalLM.from_pretrained(native).state_dict()
    model = LlamaForCausalLM.from_pretrained(native, device_map=where, offload_folder=tmp_path / "offload")
    model.save_pretrained(native, max_shard_size="25KB")
    after = LlamaForCausalLM.from_pretrained(native).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_save_that_fails_leaves_nothing_that_loads(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json is written first: it must not be read with the older weights."""
    source = native.parent / "source"
    other = LlamaForCausalLM.from_pretrained(source, quantization_config=HfQuantConfig("nf4"))
    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            other.save_pretrained(native)
    assert json.loads((native / "config.json").read_text())["quantization_config"]["method"] == "nf4"
    with pytest.raises((OSError, ValueError)):
        LlamaForCausalLM.from_pretrained(native)


def test_weights_of_another_method_are_refused(native: Path) -> None:
    """int4 and nf4 have the same tensors: only config.json and the header of the files tell them apart."""
    source, other = native.parent / "source", native.parent / "other"
    LlamaForCausalLM.from_pretrained(source, quantization_config=HfQuantConfig("nf4")).save_pretrained(other)
    (native / "config.json").write_text((other / "config.json").read_text())
    with pytest.raises(FormatError, match=r"'int4'.*'nf4'.*do not belong together"):
        LlamaForCausalLM.from_pretrained(native)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
def test_codes_of_another_dtype_are_refused(native: Path, dtype: torch.dtype) -> None:
    """The loader keeps integers as they are, and kernels read the bytes."""
    name = "model.layers.1.mlp.down_proj.codes"
    file = native / json.loads((native / "hfquant.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, file)
    with pytest.raises(FormatError, match=f"{name} is stored as {dtype}"):
        LlamaForCausalLM.from_pretrained(native)


def test_a_state_dict_given_to_save_is_what_is_saved(native: Path, tmp_path: Path) -> None:
    """As a trainer does that has gathered it from other ranks; transformers drops it for quantized models."""
    model = LlamaForCausalLM.from_pretrained(native)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.norm.weight"] += 1
    model.save_pretrained(tmp_path / "given", state_dict=state)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "given").state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)
    model.save_pretrained(tmp_path / "own")
    own = LlamaForCausalLM.from_pretrained(tmp_path / "own").state_dict()
    assert torch.equal(own["model.norm.weight"], model.model.norm.weight)
    with pytest.raises(FormatError, match=r"state_dict has no model\.layers\.0"):
        model.save_pretrained(tmp_path / "plain", state_dict=tiny_model("llama").state_dict())


def test_models_with_experts_are_copied_and_pickled(tmp_path: Path) -> None:
    tiny_model("mixtral", dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=HfQuantConfig("int4"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin(**tiny_inputs(model)).logits, model(**tiny_inputs(model)).logits)


def test_variants_are_refused_with_the_way_out(native: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(native)
    with pytest.raises(SpecError, match="'fp16' into a folder of its own"):
        model.save_pretrained(tmp_path / "variant", variant="fp16")


def test_tensors_that_the_config_does_not_account_for_are_refused(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    config = HfQuantConfig("llm_int8", threshold=0)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config)
    model.save_pretrained(tmp_path / "native")
    path = tmp_path / "native" / "config.json"
    stored = json.loads(path.read_text())
    del stored["quantization_config"]["outlier_columns"]["model.layers.1.mlp.up_proj"]
    path.write_text(json.dumps(stored))
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj\.outlier_index"):
        LlamaForCausalLM.from_pretrained(tmp_path / "native")
