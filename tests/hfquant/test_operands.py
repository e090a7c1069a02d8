"""What a checkpoint says about attention's operands, and what becomes of records that were changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForCausalLM, BloomConfig, BloomForCausalLM, Lfm2Config, PreTrainedModel

import hfquant
from hfquant import HfQuantConfig, processes
from hfquant.attention import IMPLEMENTATION, OPERANDS, Operands
from hfquant.backend import Backend, register, unregister
from hfquant.blocks import Blocks
from hfquant.errors import FormatError, HfQuantError, SpecError, UnsupportedError
from hfquant.grids import Codebook
from hfquant.presets import kbit
from hfquant.products import NO_PRODUCT
from hfquant.quantize import check_recipe
from hfquant.recipe import Recipe
from hfquant.spec import InputSpec, TensorSpec
from hfquant.testing.tiny import tiny_inputs, tiny_model

TENSOR, TOKEN = Blocks(-1, -1), Blocks(1, -1)


def static(grid: str) -> InputSpec:
    return InputSpec(TensorSpec(grid, TENSOR), dynamic=False)


def dynamic(grid: str) -> InputSpec:
    return InputSpec(TensorSpec(grid, TOKEN))


specs = st.builds(
    lambda make, grid: make(grid), st.sampled_from([static, dynamic]), st.sampled_from(["int4", "int8", "e2m1", "e3m0"])
)
records = st.dictionaries(st.sampled_from(OPERANDS), specs)


@given(records)
def test_parse_is_the_inverse_of_record(made: dict[str, InputSpec]) -> None:
    again = Operands.parse(json.loads(json.dumps(Operands(made).record())))
    assert again.specs == made and again.scale.is_meta
    assert again.scale.dtype == torch.float32 and again.scale.shape == (4,) and not again.scale.requires_grad


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.floats()
    | st.sampled_from(["", "int8", "uint4", "nope", "e9m9"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["grid", "tensor", "query"]), inner),
    max_leaves=4,
)
PATHS = ["", "query", "tensor", "dynamic", "split", "grid", "blocks", "zero", "scale"]


@given(path=st.sampled_from(PATHS), value=junk, drop=st.booleans(), spec=specs)
def test_a_damaged_record_is_refused_with_our_error_or_not_at_all(
    path: str, value: Any, drop: bool, spec: InputSpec
) -> None:
    record: Any = {"query": spec.to_dict()}
    holder = next((part for part in (record, record["query"], record["query"]["tensor"]) if path in part), None)
    if holder is None:
        record = value
    elif drop:
        del holder[path]
    else:
        holder[path] = value
    try:
        Operands.parse(record)
    except HfQuantError as error:
        assert isinstance(error, FormatError) and "config.json" in str(error)


REFUSED = {
    "a zero point": InputSpec(TensorSpec("uint8", TENSOR, zero=True), dynamic=False),
    "columns in floating point": InputSpec(TensorSpec("int8", TOKEN), split=6.0),
    "an unsigned grid": InputSpec(TensorSpec("uint8", TOKEN)),
    "an unknown grid": InputSpec(TensorSpec("nope", TENSOR), dynamic=False),
    "a grid that is fitted": InputSpec(TensorSpec("quantile4", TOKEN)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_numbers_that_operands_cannot_have_are_refused(what: str) -> None:
    weight = kbit("int8").scheme
    with pytest.raises(SpecError):
        check_recipe(Recipe(weight, attention=REFUSED[what]))
    with pytest.raises(FormatError, match=r"config\.json"):
        Operands.parse({"key": REFUSED[what].to_dict()})


@pytest.mark.parametrize("record", [None, [], {"query": None}, {"query": {}}, {"scores": static("int8").to_dict()}])
def test_what_is_no_record_is_refused(record: Any) -> None:
    with pytest.raises(FormatError, match=r"config\.json"):
        Operands.parse(record)


def test_recipes_keep_their_operands() -> None:
    for spec in (None, static("e2m1"), dynamic("int8")):
        recipe = Recipe(kbit("int8").scheme, attention=spec)
        assert check_recipe(Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))) == recipe
    earlier = {key: value for key, value in Recipe(kbit("int8").scheme).to_dict().items() if key != "attention"}
    assert Recipe.from_dict(earlier).attention is None


def test_the_plugin_of_the_grid_of_operands_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(hfquant.config, "provider", lambda table, name: asked.append(name))
    HfQuantConfig("attended", grid="ternary")
    assert "ternary" in asked


# ---- checkpoints


def attended(grid: str = "int4", ranges: str = "tensor") -> Recipe:
    return replace(kbit("int8"), attention=static(grid) if ranges == "tensor" else dynamic(grid))


@pytest.fixture(scope="module", autouse=True)
def backend() -> Iterator[None]:
    grid = Codebook("ternary", (-1.0, 0.0, 1.0))
    made = Backend("attended", presets={"attended": attended}, grids=(grid,))
    register(made, "tests")
    yield
    unregister(made, "tests")


INPUTS = tiny_inputs(tiny_model("llama"))


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


def operands(model: PreTrainedModel) -> list[Operands]:
    return [module for module in model.modules() if isinstance(module, Operands)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(source: Path) -> PreTrainedModel:
    config = HfQuantConfig("attended", embeddings=True, modules_to_not_convert=[], data=[INPUTS])
    return load(source, quantization_config=config)


@pytest.fixture
def saved(loaded: PreTrainedModel, tmp_path: Path) -> Path:
    loaded.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_checkpoint_has_records_and_scales(loaded: PreTrainedModel, saved: Path, source: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    records = config["quantization_config"]["attention"]
    assert set(records) == {f"model.layers.{number}.self_attn" for number in (0, 1)}
    assert all(set(record) == set(OPERANDS) for record in records.values())
    asked = [value for key, value in config.items() if "attn_implementation" in key]
    assert IMPLEMENTATION not in asked, "other programs could not open what is derived from it"
    again = load(saved)
    assert torch.equal(logits(again), logits(loaded)) and len(operands(again)) == 2
    assert again.config._attn_implementation == IMPLEMENTATION
    assert not torch.allclose(logits(again), logits(load(source)), atol=1e-2)


def test_an_implementation_that_is_asked_for_does_not_leave_operands_out(loaded: PreTrainedModel, saved: Path) -> None:
    assert torch.equal(logits(load(saved, attn_implementation="sdpa")), logits(loaded))


def test_the_dtype_of_the_model_is_that_of_its_other_parameters(loaded: PreTrainedModel, saved: Path) -> None:
    assert loaded.dtype == torch.float32
    again = load(saved, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    for mine, other in zip(operands(again), operands(loaded), strict=True):
        assert mine.scale.dtype == torch.float32 and torch.equal(mine.scale, other.scale)
        assert not mine.scale.requires_grad and not other.scale.requires_grad
    assert again.to(torch.float16).dtype == torch.float16 and operands(again)[0].scale.dtype == torch.float32


def test_a_base_model_finds_the_records_of_the_whole(loaded: PreTrainedModel, saved: Path) -> None:
    base = AutoModel.from_pretrained(saved, dtype=torch.float32)
    with torch.no_grad():
        hidden = loaded.model(**INPUTS).last_hidden_state
        assert torch.equal(base(**INPUTS).last_hidden_state, hidden) and len(operands(base)) == 2
    base.save_pretrained(saved.parent / "base")
    assert torch.equal(AutoModel.from_pretrained(saved.parent / "base")(**INPUTS).last_hidden_state, hidden)


def test_dequantize_leaves_no_operands(saved: Path) -> None:
    model = load(saved)
    model.dequantize()
    assert not operands(model) and not any("operands" in name for name in model.state_dict())
    model.save_pretrained(saved.parent / "plain")
    again = load(saved.parent / "plain")
    assert torch.allclose(logits(again), logits(model), atol=1e-5) and again.config._attn_implementation == "sdpa"


FIRST = "model.layers.0.self_attn"
RECORD = {"query": static("int4").to_dict()}
CHANGES: dict[str, Any] = {
    "no mapping": lambda records: 5,
    "none at all": lambda records: None,
    "not recorded": lambda records: {},
    "one not recorded": lambda records: {FIRST: records[FIRST]},
    "no such module": lambda records: {**records, "model.layers.7.self_attn": RECORD},
    "no operands in the files": lambda records: {**records, "model.layers.0.mlp": RECORD},
    "the model itself": lambda records: {**records, "": RECORD},
    "no record": lambda records: {**records, FIRST: None},
    "no numbers": lambda records: {**records, FIRST: {"query": {"tensor": 3}}},
    "no operand": lambda records: {**records, FIRST: {"scores": static("int4").to_dict()}},
}


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel], ids=["whole", "base"])
@pytest.mark.parametrize("change", CHANGES)
def test_records_that_do_not_fit_are_refused(change: str, auto: Any, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["attention"] = CHANGES[change](config["quantization_config"]["attention"])
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError):
        auto.from_pretrained(saved, dtype=torch.float32)


def test_earlier_checkpoints_have_no_records(source: Path, tmp_path: Path) -> None:
    load(source, quantization_config=HfQuantConfig("int8")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    before = logits(load(tmp_path))
    del config["quantization_config"]["attention"], config["quantization_config"]["recipe"]["attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(tmp_path)), before)


# ---- what cannot be done


@pytest.mark.parametrize("kinds", [["conv", "full_attention"], ["full_attention", "conv"]], ids=" then ".join)
def test_a_block_without_attention_says_that_it_has_no_operands(kinds: list[str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Lfm2Config(vocab_size=256, num_hidden_layers=2, layer_types=kinds, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    made = load(tmp_path, quantization_config=HfQuantConfig("attended", data=[INPUTS]))
    plain = load(tmp_path, quantization_config=HfQuantConfig("w8a8", dynamic=False, transform=None, data=[INPUTS]))
    noted, quiet = ([NO_PRODUCT in block.notes for block in m.hf_quantizer.findings] for m in (made, plain))
    assert noted == [*(kind == "conv" for kind in kinds), False], "the last one is what is in no block"
    assert len(operands(made)) == 1 and not any(quiet) and len(quiet) == 3


def test_several_processes_are_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 0)
    with pytest.raises(UnsupportedError, match="one process"):
        load(source, quantization_config=HfQuantConfig("attended", data=[INPUTS, INPUTS]))


def test_a_model_with_an_attention_of_its_own_is_refused(tmp_path: Path) -> None:
    BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=256)).save_pretrained(tmp_path)
    config = HfQuantConfig("attended", data=[INPUTS])
    with pytest.raises(UnsupportedError, match=r"BloomForCausalLM .*leave attention out"):
        load(tmp_path, quantization_config=config)
    with pytest.raises(UnsupportedError, match=r"BloomForCausalLM .*leave attention out"):
        hfquant.quantize(tmp_path, config, tmp_path / "out")


def test_another_attention_would_skip_the_operands_and_is_refused(saved: Path) -> None:
    model = load(saved)
    with pytest.raises(UnsupportedError, match="'sdpa' would leave them as they are"):
        model.set_attn_implementation("sdpa")
    model.set_attn_implementation("hfquant")
    model.dequantize().set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"
