"""What happens between the checkpoint and the model: streaming, skip lists, refusals, and the audit at the end."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from hfquant import FormatError, HfQuantConfig, SpecError, WeightError
from hfquant.hf import QuantizeOnLoad
from hfquant.nn import QEmbedding, QLinear
from hfquant.swap import packed_modules
from hfquant.testing.tiny import tiny_inputs, tiny_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def native(source: Path, tmp_path: Path) -> Path:
    model = LlamaForCausalLM.from_pretrained(source, quantization_config=HfQuantConfig("int4"))
    model.save_pretrained(tmp_path / "native")
    return tmp_path / "native"


def test_no_two_full_precision_weights_are_alive_at_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[weakref.ref] = []
    convert = QuantizeOnLoad.convert

    def watched(self, input_dict, **kwargs):
        gc.collect()
        assert not [ref for ref in arrived if ref() is not None]
        (value,) = input_dict.values()
        arrived.append(weakref.ref(value[0] if isinstance(value, list) else value))
        del value
        return convert(self, input_dict, **kwargs)

    monkeypatch.setattr(QuantizeOnLoad, "convert", watched)
    model = LlamaForCausalLM.from_pretrained(source, quantization_config=HfQuantConfig("int4"))
    assert len(arrived) == sum(1 for _ in packed_modules(model)) == 14


@pytest.mark.parametrize("method", ["int4", "nf4"])
def test_peak_memory_is_the_quantized_size_and_little_more(method: str, large_checkpoint: Path) -> None:
    """Resident memory of a whole process, interpreter and libraries included."""
    # VmHWM and not ru_maxrss, which a child inherits from its parent.
    script = (
        "import sys, hfquant, transformers\n"
        "config = hfquant.HfQuantConfig(sys.argv[2])\n"
        "model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)\n"
        "size = sum(parameter.nbytes for parameter in model.parameters())\n"
        "status = dict(line.split(':') for line in open('/proc/self/status'))\n"
        "print(size, int(status['VmHWM'].split()[0]) * 1024)\n"
    )
    command = [sys.executable, "-c", script, str(large_checkpoint), method]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    quantized, peak = map(int, done.stdout.split())
    largest = 32000 * 2048 * 2
    assert (large_checkpoint / "model.safetensors").stat().st_size > 1e9
    assert peak <= quantized + largest + 0.3e9


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 1.16 GB in bfloat16, written without building the model."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=10,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    block = torch.randn(1 << 20).mul_(0.02).bfloat16()
    weights = {
        name: block.repeat(-(-shape.numel() // block.numel()))[: shape.numel()].reshape(shape).clone()
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return folder


def _edit(folder: Path, change) -> None:
    tensors = load_file(folder / "hfquant.safetensors")
    change(tensors)
    save_file(tensors, folder / "hfquant.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / "hfquant.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(tensors, "hfquant.safetensors")
    (folder / "hfquant.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.codes",
        "model.layers.0.self_attn.q_proj.scale",
        "model.layers.1.input_layernorm.weight",
        "lm_head.weight",
    ],
)
def test_a_truncated_checkpoint_raises_and_names_the_tensor(native: Path, name: str) -> None:
    _edit(native, lambda tensors: tensors.pop(name))
    with pytest.raises(FormatError, match=name.removesuffix(".codes").removesuffix(".scale").replace(".", r"\.")):
        LlamaForCausalLM.from_pretrained(native)


def test_a_renamed_checkpoint_raises(native: Path) -> None:
    def rename(tensors):
        for name in [name for name in tensors if ".q_proj." in name]:
            tensors[name.replace("q_proj", "query")] = tensors.pop(name)

    _edit(native, rename)
    with pytest.raises(FormatError, match="q_proj"):
        LlamaForCausalLM.from_pretrained(native)


def test_packed_tensors_of_another_shape_raise(native: Path) -> None:
    name = "model.layers.0.mlp.up_proj.codes"
    _edit(native, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))
    with pytest.raises(RuntimeError, match=r"mismatch|size"):
        LlamaForCausalLM.from_pretrained(native)


def test_a_source_without_a_weight_raises(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.0.mlp.gate_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.gate_proj"):
        LlamaForCausalLM.from_pretrained(source, quantization_config=HfQuantConfig("int4"))


def test_nan_weights_raise_with_the_name_of_the_layer(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 3] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError, match=r"layers\.1\.self_attn\.v_proj"):
        LlamaForCausalLM.from_pretrained(source, quantization_config=HfQuantConfig("int4"))


def test_bad_requests_fail_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"unknown method 'int9'.*int4"):
        HfQuantConfig("int9")
    with pytest.raises(SpecError, match=r"no option 'groupsize'.*group_size"):
        HfQuantConfig("int4", groupsize=64)


def test_skip_lists_name_modules_to_leave_alone(source: Path) -> None:
    config = HfQuantConfig("int4", modules_to_not_convert=[r".*\.mlp", "lm_head"])
    model = LlamaForCausalLM.from_pretrained(source, quantization_config=config)
    packed = {name for name, _ in packed_modules(model)}
    assert packed == {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"}


def test_a_skip_pattern_that_matches_nothing_is_refused(source: Path) -> None:
    config = HfQuantConfig("int4", modules_to_not_convert=["lmhead"])
    with pytest.raises(SpecError, match=r"'lmhead' matches no module of LlamaForCausalLM"):
        LlamaForCausalLM.from_pretrained(source, quantization_config=config)


def test_an_untied_head_and_the_embeddings_are_quantized_on_request(source: Path, tmp_path: Path) -> None:
    config = HfQuantConfig("int8", modules_to_not_convert=[], embeddings=True)
    model = LlamaForCausalLM.from_pretrained(source, quantization_config=config)
    assert isinstance(model.lm_head, QLinear) and isinstance(model.model.embed_tokens, QEmbedding)
    inputs = tiny_inputs(model)
    original = LlamaForCausalLM.from_pretrained(source)
    with torch.no_grad():
        logits, expected = model(**inputs).logits, original(**inputs).logits
    assert (logits - expected).norm() < 0.05 * expected.norm()


def test_tied_weights_stay_tied_even_if_everything_is_asked_for(tmp_path: Path) -> None:
    tiny_model("gpt2", dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    config = HfQuantConfig("int8", modules_to_not_convert=[], embeddings=True)
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "source", quantization_config=config)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert isinstance(model.transformer.wpe, QEmbedding)
    reasons = {skip.name: skip.reason for skip in model.hf_quantizer.coverage.skipped}
    assert reasons["transformer.wte"] == "tied weights"
    with torch.no_grad():
        assert model(**tiny_inputs(model)).logits.isfinite().all()


def test_packed_tensors_are_frozen_before_and_after_reload(native: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(native)
    for name, module in packed_modules(model):
        assert not any(parameter.requires_grad for parameter in module.packed()), name


def test_hooks_of_replaced_modules_are_carried_along() -> None:
    from hfquant.coverage import survey
    from hfquant.quantize import check_recipe
    from hfquant.swap import swap_in

    model = tiny_model("llama")
    calls = []
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda module, args: calls.append(module))
    targets, _ = survey(model, None, False)
    swap_in(model, targets, check_recipe(HfQuantConfig("int4").recipe))
    assert list(model.model.layers[0].mlp.up_proj._forward_pre_hooks.values())
