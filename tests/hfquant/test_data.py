"""Calibration data: every form gives the batches it should, and bad data is refused before there is a model."""

from __future__ import annotations

import json
import re
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BatchFeature,
    BertConfig,
    LlamaConfig,
    PreTrainedModel,
    ViTConfig,
)

from hfquant import data as data_module
from hfquant.data import SELF, CalibrationData, batches, check, kind_of, stand_in, tokenizer_for
from hfquant.errors import CalibrationError, SpecError
from hfquant.inputs import digest
from hfquant.selftext import self_text
from hfquant.testing.tiny import tiny_model
from hfquant.tokens import load_tokenizer
from tests.models import HELDOUT, MODEL_DIR

CONFIG = AutoConfig.from_pretrained(MODEL_DIR)
VIT = ViTConfig(architectures=["ViTForImageClassification"])
BERT = BertConfig(architectures=["BertForSequenceClassification"])
TOKENIZER = load_tokenizer(MODEL_DIR)
CHAT = [{"role": "user", "content": "Hi"}]
PIXELS = torch.zeros(2, 3, 32, 32)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("a model is built")

    monkeypatch.setattr(PreTrainedModel, "__init__", fail)


def made(data: Any, config: Any = CONFIG, tokenizer: Any = TOKENIZER, model: Any = None, **options: Any) -> list[dict]:
    return batches(CalibrationData(data, **options), tokenizer, config, model)


def ids_of(found: list[dict[str, Tensor]]) -> Tensor:
    assert all(set(batch) == {"input_ids"} for batch in found)
    return torch.cat([batch["input_ids"] for batch in found])


# ---- what the forms give


def test_a_text_file_gives_full_samples_of_its_text() -> None:
    found = made(str(HELDOUT), samples=20, length=64, batch_size=8)
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(8, 64), (8, 64), (4, 64)]
    assert all(set(batch) == {"input_ids"} and batch["input_ids"].dtype == torch.int64 for batch in found)
    stream = " ".join(map(str, TOKENIZER.encode(HELDOUT.read_text(), add_special_tokens=False)))
    assert all(" ".join(map(str, row)) in stream for row in ids_of(found).tolist())


def test_a_file_and_its_text_give_the_same() -> None:
    file, text = (ids_of(made(data, samples=9)) for data in (HELDOUT, [HELDOUT.read_text()]))
    assert torch.equal(file, text)


def test_the_seed_decides_and_the_random_state_stays() -> None:
    state = torch.get_rng_state()
    first, again, other = (ids_of(made(HELDOUT, samples=9, length=32, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_without_packing_each_text_is_a_sample_and_what_is_padding_is_masked() -> None:
    texts = ["def f(x):", "", "    return x + 1  # one more than before", "x"]
    found = made(texts, length=8, batch_size=2, packing=False)
    rows = [
        tuple(row[mask.bool()].tolist())
        for batch in found
        for row, mask in zip(
            batch["input_ids"], batch.get("attention_mask", torch.ones_like(batch["input_ids"])), strict=True
        )
    ]
    assert sorted(rows) == sorted(tuple(TOKENIZER.encode(text)[:8]) for text in texts if text)


@given(st.lists(st.lists(st.integers(0, 1023), min_size=1, max_size=20), min_size=1, max_size=9), st.data())
def test_token_tensors_are_samples_as_they_are(rows: list[list[int]], drawn: st.DataObject) -> None:
    dtypes = st.sampled_from([torch.int64, torch.int32, torch.int16])
    tensors = [torch.tensor(row, dtype=drawn.draw(dtypes)) for row in rows]
    found = made(tensors, length=4, samples=len(rows), batch_size=3, tokenizer=None)
    back = []
    for batch in found:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        assert batch["input_ids"].dtype == torch.int64
        back += [tuple(row[keep].tolist()) for row, keep in zip(batch["input_ids"], mask, strict=True)]
    assert sorted(back) == sorted(map(tuple, rows))


def test_a_tensor_of_rows_and_a_list_of_its_rows_are_the_same() -> None:
    ids = torch.arange(60).view(6, 10)
    for data in (ids, [ids], list(ids), [ids[:2], ids[2:]]):
        assert torch.equal(ids_of(made(data, samples=4)), ids_of(made(ids, samples=4)))
    assert ids_of(made(ids, samples=4)).shape == (4, 10)


def test_batches_of_model_inputs_go_through_as_they_are() -> None:
    given_batches = [{"pixel_values": torch.rand(2, 3, 8, 8)}, BatchFeature({"pixel_values": torch.rand(1, 3, 8, 8)})]
    found = made(given_batches, config=VIT, tokenizer=None, samples=1)
    assert len(found) == 2 and all(type(batch) is dict for batch in found)
    assert all(out["pixel_values"] is batch["pixel_values"] for out, batch in zip(found, given_batches, strict=True))


def test_conversations_are_written_with_the_chat_template() -> None:
    tokenizer = load_tokenizer(MODEL_DIR)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}"
    (batch,) = made([CHAT, CHAT], tokenizer=tokenizer, packing=False, samples=2)
    assert tokenizer.batch_decode(batch["input_ids"]) == ["user> Hi\n"] * 2


def test_of_a_dataset_only_some_times_what_is_needed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        assert args == ("org/code", None) and options["split"] == "test"
        for n in count():
            taken.append(n)
            yield {"body": f"def function_{n}(argument):\n    return {n}\n", "id": n}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    rows = [ids_of(made("org/code", split="test", samples=16, length=32, seed=seed)) for seed in (0, 1)]
    assert rows[0].shape == (16, 32) and not torch.equal(rows[0], rows[1])
    assert len(taken) < 1000
    packless = made("org/code", split="test", column="body", samples=16, packing=False)
    assert sum(len(batch["input_ids"]) for batch in packless) == 16


def test_the_model_writes_the_text_itself() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    found = made(SELF, model=model, samples=5, length=12, batch_size=2, seed=3, tokenizer=None)
    assert torch.equal(ids_of(found), self_text(model, 5, 12, seed=3, batch_size=2))
    with pytest.raises(CalibrationError, match="the model must be loaded"):
        made(SELF)


def test_text_that_the_model_writes_begins_as_its_tokenizer_begins_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(
        data_module, "self_text", lambda *args, **given: asked.update(given) or torch.zeros(1, 4).long()
    )
    begun = SimpleNamespace(all_special_ids=[7, 9], eos_token_id=9)
    call = lambda text, add_special_tokens=True: {"input_ids": [7, 50] if add_special_tokens else [50]}  # noqa: E731
    begun = type("Begun", (), {**vars(begun), "__call__": staticmethod(call)})()
    made(SELF, tokenizer=begun, model=object(), samples=1, length=4)
    assert asked == {"prefix": (7,), "special": [7, 9]}


def test_padding_is_the_model_s_token_or_any_of_its_vocabulary() -> None:
    for pad, expected in ((5, 5), (None, 0), (-1, 0), (64, 0)):
        config = LlamaConfig(vocab_size=64, pad_token_id=pad)
        (batch,) = made([torch.tensor([8, 8]), torch.tensor([8])], config=config, tokenizer=None, samples=2)
        assert sorted(batch["input_ids"].flatten().tolist()) == sorted([8, 8, 8, expected])


def test_fewer_samples_than_asked_for_are_used_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(data_module.logger, "warning", lambda text, *values: said.append(text % values))
    texts = ["one text that is long enough", "and another one of them", "a third text to be cut"]
    assert len(ids_of(made(texts, length=4, packing=False, samples=3))) == 3
    assert said == []
    assert len(ids_of(made(texts, length=4, packing=False, samples=5))) == 3
    assert said == ["the calibration data gives 3 samples, 5 were asked for"]
    assert len(ids_of(made([torch.arange(8)] * 3, samples=5))) == 3  # whoever gives tokens knows how many
    assert len(said) == 1


@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "mixtral"])
def test_the_stand_in_is_an_input_of_the_model(kind: str) -> None:
    model = tiny_model(kind)
    (batch,) = stand_in(model.config)
    with torch.no_grad():
        assert model(**batch).logits.shape[0] == 2
    assert digest([batch]) == digest(stand_in(model.config)) != digest(stand_in(model.config, seed=1))


# ---- bad data


def bad(*found: str, data: Any, config: Any = CONFIG, tokenizer: Any = TOKENIZER, **options: Any) -> Any:
    name = found[0].replace(" ", "-")
    return pytest.param(CalibrationData(data, **options), config, tokenizer, ".*".join(map(re.escape, found)), id=name)


BAD = [
    bad("there is no calibration data", "dataset name", data=None),
    bad("got a int", data=3),
    bad("got a dict", data={"input_ids": torch.ones(1, 2)}),
    bad("empty list", data=[]),
    bad("item 0 of data is a list", data=[[1, 2, 3]]),
    bad("item 1 of data is a NoneType", data=["x", None]),
    bad("item 0 is one of texts, item 2 of tokens", data=["x", "y", torch.arange(3)]),
    bad("item 0 of data is a message", "lists conversations", data=CHAT),
    bad("no calibration file corpus/x.txt", "full path", data="corpus/x.txt"),
    bad("no calibration file nowhere", data=Path("nowhere")),
    bad("no calibration file ~/data", data="~/data"),
    bad("is a folder", "name a file in it", data=str(MODEL_DIR)),
    bad("a string of 23 characters", "data=[text]", data="The quick brown fox ...".ljust(23)),
    bad("a string of 9000 characters", "data=[text]", data="a word . " * 1000),
    bad("package datasets is missing", 'pip install "hfquant[datasets]"', data="org/name"),
    bad("holds 3 tokens", "one sample of length=512 needs 512", data=[TOKENIZER.decode([90, 91, 92])]),
    bad("(2 strings) holds no text", data=["", " \n"], packing=False),
    bad("holds 0 tokens", data=["", " \n"]),
    bad("length=513", "at most 512 tokens", data=["x"], length=513),
    bad("length=513", "at most 512 tokens (max_position_embeddings)", data=SELF, length=513),
    bad("needs a tokenizer", "token tensors", data=["x"], tokenizer=None),
    bad("no chat template", data=[CHAT]),
    bad("outside the model's vocabulary of 100", data=HELDOUT, config=LlamaConfig(vocab_size=100)),
    bad(
        "token tensor 1 holds the token id 1024",
        "vocabulary of 1024",
        data=[torch.tensor([1023]), torch.tensor([1024])],
    ),
    bad("holds the token id -1", data=torch.tensor([[5, -1]])),
    bad("token tensor 0 is torch.float32", data=[torch.ones(4)]),
    bad("token tensor 0 is torch.bool", data=[torch.ones(4) > 0]),
    bad("shape (1, 2, 3)", "[batch, length]", data=torch.ones(1, 2, 3).long()),
    bad("token tensor 0 is empty", data=[torch.ones(0).long()]),
    bad("token tensor 0 has 600 tokens", "at most 512", data=[torch.ones(600).long()]),
    bad("a vit model has no vocabulary", data=torch.ones(1, 2).long(), config=VIT),
    bad("ViTForImageClassification reads pixel_values, not text", data=["x"], config=VIT),
    bad("ViTForImageClassification has no language-model head", data=SELF, config=VIT),
    bad("BertForSequenceClassification has no language-model head", data=SELF, config=BERT),
    bad("batch 0 must hold tensors", "pixel_values (list)", data=[{"pixel_values": [1.0]}], config=VIT),
    bad("batch 0 must hold tensors", "nothing", data=[{}], config=VIT),
    bad("batch 1 has an input without a sample", "(0, 3)", data=[{"x": torch.ones(1)}, {"x": torch.ones(0, 3)}]),
    bad("batch 0 has an input without a sample", "x ()", data=[{"x": torch.tensor(1)}]),
    bad("differ in their first axis", "a (2,), b (3,)", data=[{"a": torch.ones(2), "b": torch.ones(3)}]),
    bad("pixel_values of batch 0 holds NaN", data=[{"pixel_values": PIXELS / 0}], config=VIT),
    bad("input_ids of batch 0 holds the token id 5000", data=[{"input_ids": torch.tensor([[5000]])}]),
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("calibration", "config", "tokenizer", "message"), BAD)
def test_bad_data_is_refused_before_there_is_a_model(
    calibration: CalibrationData, config: Any, tokenizer: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=message):
        batches(calibration, tokenizer, config)


@pytest.mark.parametrize("option", ["samples", "length", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_counts_are_whole_numbers_from_one(option: str, value: Any) -> None:
    with pytest.raises(SpecError, match=f"{option} .* got {value!r}"):
        CalibrationData(["x"], **{option: value})


def test_a_seed_is_a_whole_number() -> None:
    with pytest.raises(SpecError, match=r"seed .* got 0\.5"):
        CalibrationData(["x"], seed=0.5)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_model")
def test_the_check_reads_no_text() -> None:
    check(CalibrationData(["x"]), TOKENIZER, CONFIG)  # too short, which only batches can see
    check(CalibrationData(SELF), None, CONFIG)


def test_a_file_comes_before_a_dataset_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert kind_of("wikitext") == "dataset"
    (tmp_path / "wikitext").write_text("x")
    assert kind_of("wikitext") == "file"


# ---- tokenizers


def test_a_tokenizer_is_loaded_only_for_text(tmp_path: Path) -> None:
    assert tokenizer_for(CalibrationData(["x"]), MODEL_DIR).vocab_size == 1024
    assert tokenizer_for(CalibrationData(SELF), MODEL_DIR).vocab_size == 1024
    assert tokenizer_for(CalibrationData([torch.ones(2)]), tmp_path / "nowhere") is None
    tiny_model("llama").config.save_pretrained(tmp_path)
    assert tokenizer_for(CalibrationData(SELF), tmp_path) is None, "it can do without"
    with pytest.raises(CalibrationError, match="needs the tokenizer"):
        tokenizer_for(CalibrationData(["x"]), tmp_path)


# ---- the record


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (str(HELDOUT), "file heldout.txt"),
        (["secret words"] * 40, "40 strings"),
        ([torch.arange(8)] * 3, "3 token tensors"),
        (torch.arange(8).view(2, 4), "1 token tensors"),
        ([{"input_ids": torch.arange(8)[None]}], "1 batches of inputs"),
    ],
)
def test_the_record_is_json_with_counts_and_no_text(data: Any, name: str) -> None:
    calibration = CalibrationData(data, samples=2, length=8)
    found = batches(calibration, TOKENIZER, CONFIG)
    record = json.loads(json.dumps(calibration.describe(found)))
    assert record["data"] == name and re.fullmatch("[0-9a-f]{64}", record["sha256"])
    assert record["samples"] == sum(len(batch["input_ids"]) for batch in found)
    assert record["tokens"] == sum(batch["input_ids"].numel() for batch in found)
    assert "secret" not in str(record) and str(HELDOUT.parent) not in str(record)


def test_the_record_without_batches_says_what_was_asked_for() -> None:
    assert CalibrationData().describe() == {"data": None}
    asked = CalibrationData("org/name:en", samples=3, column="body").describe()
    assert asked == {
        **{"data": "org/name:en", "seed": 0, "length": 512, "packing": True},
        **{"split": "train", "column": "body", "samples": 3},
    }
    assert CalibrationData(SELF).describe() == {"data": "self", "seed": 0, "length": 512, "samples": 128}


def test_padding_is_not_counted() -> None:
    calibration = CalibrationData([torch.arange(3), torch.arange(7)], samples=2)
    assert calibration.describe(batches(calibration, None, CONFIG))["tokens"] == 10


@given(st.integers(0, 5), st.integers(0, 9), st.integers(0, 60))
def test_the_digest_tells_any_token_but_not_the_batch_size(row: int, column: int, token: int) -> None:
    ids = torch.arange(60).view(6, 10)
    changed = ids.clone()
    changed[row, column] = token
    same = digest([{"input_ids": ids}]) == digest([{"input_ids": part} for part in changed.split(4)])
    assert same == torch.equal(ids, changed)


def test_the_digest_reads_every_dtype_name_and_shape() -> None:
    value = torch.zeros(2, 4)
    forms = [{"a": value}, {"b": value}, {"a": value.view(2, 2, 2)}, {"a": value.bfloat16()}, {"a": value.int()}]
    assert len({digest([form]) for form in forms}) == len(forms)
