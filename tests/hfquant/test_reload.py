"""Save, reload in a fresh process, compare bit for bit; and what coverage says, for every kind of architecture."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hfquant
from hfquant import HfQuantConfig
from hfquant.experts import QExperts
from hfquant.swap import packed_modules
from hfquant.testing.tiny import KINDS, tiny_inputs, tiny_model
from tests import fresh

METHODS = {
    "int4": {"block_size": 48},  # 64 = 48 + 16 and 176 = 3 * 48 + 32: ragged groups in every layer
    "nf4": {"double_quant": True},
    "int8": {"symmetric": False, "embeddings": True},
    "quantile4": {},
}

RELOAD = """
import sys, torch, hfquant, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    folder = Path(folder)
    cls = getattr(transformers, folder.joinpath("class.txt").read_text())
    model = cls.from_pretrained(folder / "quantized")
    with torch.no_grad():
        logits = model(**load_file(folder / "inputs.safetensors")).logits
    save_file({"logits": logits}, folder / "again.safetensors")
"""


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """Logits before saving, and after reloading in one fresh process, by (kind, method)."""
    root = tmp_path_factory.mktemp("reload")
    before = {}
    for kind in KINDS:
        model = tiny_model(kind, dtype=torch.bfloat16)
        model.save_pretrained(root / kind)
        inputs = tiny_inputs(model)
        for method, options in METHODS.items():
            folder = root / f"{kind}-{method}"
            config = HfQuantConfig(method, **options)
            quantized = type(model).from_pretrained(root / kind, quantization_config=config)
            with torch.no_grad():
                before[kind, method] = quantized(**inputs).logits
            # Small shards, so that the index matters too.
            quantized.save_pretrained(folder / "quantized", max_shard_size="40KB")
            save_file(inputs, folder / "inputs.safetensors")
            (folder / "class.txt").write_text(type(model).__name__)
    folders = [str(root / f"{kind}-{method}") for kind, method in before]
    done = fresh.run(RELOAD, *folders)
    assert done.returncode == 0, done.stderr
    return {
        (kind, method): (logits, load_file(root / f"{kind}-{method}" / "again.safetensors")["logits"])
        for (kind, method), logits in before.items()
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_reload_in_a_fresh_process_is_bit_identical(reloaded, kind: str, method: str) -> None:
    before, after = reloaded[kind, method]
    assert before.isfinite().all()
    assert before.dtype == after.dtype
    assert torch.equal(before, after)


def _quantized(kind: str, tmp_path: Path, method: str = "int4", **options):
    model = tiny_model(kind, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    return model, type(model).from_pretrained(tmp_path / "source", quantization_config=HfQuantConfig(method, **options))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_all_expert_bytes_are_quantized(kind: str, tmp_path: Path) -> None:
    model, quantized = _quantized(kind, tmp_path)
    experts = {name for name, _ in model.named_parameters() if ".experts." in name}
    total = sum(model.get_parameter(name).nbytes for name in experts)
    left = [name for name, _ in quantized.named_parameters() if name in experts]
    packed = sum(
        model.get_parameter(f"{name}.{projection}").nbytes
        for name, module in packed_modules(quantized)
        if isinstance(module, QExperts)
        for projection in module.specs
    )
    assert not left
    assert packed >= 0.99 * total
    assert packed > 0.5 * sum(parameter.nbytes for parameter in model.parameters())  # where a Linear scan finds little


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_accounts_for_every_byte(kind: str, tmp_path: Path) -> None:
    model, quantized = _quantized(kind, tmp_path)
    coverage = quantized.hf_quantizer.coverage
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert coverage.total == total
    assert coverage.quantized + sum(skip.bytes for skip in coverage.skipped) == total
    assert all(skip.reason for skip in coverage.skipped)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_gives_the_original_classes_and_the_same_function(kind: str, tmp_path: Path) -> None:
    model, quantized = _quantized(kind, tmp_path)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        with hfquant.use_kernel("reference"):
            packed = quantized(**inputs).logits
        quantized.dequantize()
        plain = quantized(**inputs).logits
    assert [type(module) for module in quantized.modules()] == [type(module) for module in model.modules()]
    assert not quantized.hqq_quantized  # what PEFT takes for the mark of a quantized model
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in quantized.named_parameters()} == shapes
    # Experts add up in another order than the packed loop: bfloat16 rounding apart, the rest is bitwise.
    tolerance = 0.02 if kind in ("mixtral", "qwen3_moe") else 0.0
    assert (plain - packed).norm() <= tolerance * packed.norm()
    quantized.save_pretrained(tmp_path / "plain")
    again = type(model).from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, plain)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_dequantize_to_another_dtype_gives_a_model_of_that_dtype(kind: str, tmp_path: Path) -> None:
    _, quantized = _quantized(kind, tmp_path, "int8")
    inputs = tiny_inputs(quantized)
    with torch.no_grad():
        packed = quantized(**inputs).logits.float()
        quantized.dequantize(dtype=torch.float32)
        assert {parameter.dtype for parameter in quantized.parameters()} == {torch.float32}
        wide = quantized(**inputs).logits
    assert (wide - packed).norm() < 0.02 * packed.norm()  # bfloat16 rounds to 2^-9, in each of some ten operations


def test_save_after_reload_writes_the_same_tensors(tmp_path: Path) -> None:
    model, quantized = _quantized("llama", tmp_path)
    quantized.save_pretrained(tmp_path / "first")
    again = type(model).from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "hfquant.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "first/config.json").read_text() == (tmp_path / "second/config.json").read_text()
    assert (again.hf_quantizer.coverage) == quantized.hf_quantizer.coverage


def test_reload_keeps_the_numbers_when_another_dtype_is_asked_for(tmp_path: Path) -> None:
    model, quantized = _quantized("llama", tmp_path)
    quantized.save_pretrained(tmp_path / "saved")
    wide = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for (name, packed), (_, other) in zip(packed_modules(quantized), packed_modules(wide), strict=True):
        assert other.weight.dtype == torch.float32, name
        assert torch.equal(other.qtensor().dequantize(), packed.qtensor().dequantize()), name


def test_reload_without_the_head_and_with_a_new_one(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    model, quantized = _quantized("llama", tmp_path, modules_to_not_convert=["model.layers.0.mlp", "lm_head"])
    quantized.save_pretrained(tmp_path / "saved")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected = quantized.model(**inputs).last_hidden_state
    base = AutoModel.from_pretrained(tmp_path / "saved")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", num_labels=3)
    with torch.no_grad():
        assert torch.equal(base(**inputs).last_hidden_state, expected)
        assert torch.equal(classifier.model(**inputs).last_hidden_state, expected)


def test_reload_by_a_subclass_finds_a_quantized_head(tmp_path: Path) -> None:
    """The class differs from the one in config.json, so defaults apply; but not to what the checkpoint holds packed."""
    from transformers import LlamaForCausalLM

    class Mine(LlamaForCausalLM):
        pass

    model, quantized = _quantized("llama", tmp_path, modules_to_not_convert=[])
    quantized.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        again = Mine.from_pretrained(tmp_path / "saved")(**tiny_inputs(model)).logits
        assert torch.equal(again, quantized(**tiny_inputs(model)).logits)


def test_columns_kept_by_experts_are_found_without_the_head(tmp_path: Path) -> None:
    """They are recorded under the names of the model with its head."""
    from transformers import AutoModel

    model, quantized = _quantized("mixtral", tmp_path, "llm_int8", threshold=0)
    quantized.save_pretrained(tmp_path / "saved")
    inputs = tiny_inputs(model)
    base = AutoModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(base(**inputs).last_hidden_state, quantized.model(**inputs).last_hidden_state)
