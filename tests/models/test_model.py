"""The bundled model must load like any other, be small, and be really trained on text it is not tested on."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from . import HELDOUT, MODEL_DIR
from .corpus import SPLITS, heldout_documents, read_corpus, select, separator, split_of, standard_library
from .evaluate import perplexity, sequences
from .tokenizer import encode_documents

SEQUENCES = 120
LENGTH = 256


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((MODEL_DIR / "training.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    texts = (file.text for file in heldout_documents(HELDOUT.read_text()))
    return sequences(encode_documents(tokenizer, texts), LENGTH, SEQUENCES)


@pytest.fixture(scope="module")
def heldout_perplexity(model: LlamaForCausalLM, rows: Tensor) -> float:
    return perplexity(model, rows)


def test_stored_weights_are_bfloat16_and_small() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert json.loads((MODEL_DIR / "config.json").read_text())["dtype"] == "bfloat16"
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 8e6
    assert 2e6 <= model.num_parameters() <= 4e6


def test_architecture(model: LlamaForCausalLM, record: dict[str, Any]) -> None:
    config = model.config
    assert config.num_attention_heads == 4 * config.num_key_value_heads
    assert config.head_dim == 32
    assert not config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.num_parameters() == record["parameters"]


def test_every_parameter_is_trained_and_finite(model: LlamaForCausalLM) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.std() > 0, name


def test_tokenizer_is_lossless(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == model.config.vocab_size == 1024
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    for text in (
        HELDOUT.read_text()[:20_000],
        "\ttabs, ümlauts, 漢字 and 🐍\r\n",
        "  leading  and trailing  ",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_was_long_and_got_better(record: dict[str, Any]) -> None:
    assert record["tokens"] >= 20_000_000
    losses = [entry["valid_loss"] for entry in record["history"]]
    assert len(losses) >= 10
    quarter = len(losses) // 4
    means = [sum(losses[i * quarter : (i + 1) * quarter]) / quarter for i in range(4)]
    assert means == sorted(means, reverse=True)
    assert losses[-1] < 0.75 * losses[0]


def test_heldout_text_is_long_enough(rows: Tensor) -> None:
    assert rows.shape == (SEQUENCES, LENGTH)
    assert HELDOUT.stat().st_size <= 400_000


def test_heldout_perplexity_is_the_recorded_one(heldout_perplexity: float, record: dict[str, Any]) -> None:
    assert heldout_perplexity == pytest.approx(record["heldout_perplexity"], rel=1e-3)
    assert record["test_perplexity"] < 1.5 * record["valid_perplexity"]


def test_heldout_perplexity_is_far_below_a_unigram_model(heldout_perplexity: float, rows: Tensor) -> None:
    frequencies = rows.flatten().bincount().double()
    frequencies = frequencies[frequencies > 0] / rows.numel()
    unigram = math.exp(-(frequencies * frequencies.log()).sum().item())
    assert heldout_perplexity < unigram / 10


def test_context_helps(model: LlamaForCausalLM, rows: Tensor) -> None:
    some = rows[:16]
    assert perplexity(model, some) < 0.8 * perplexity(model, some.reshape(-1, 16))


def test_it_writes_python(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    inputs = tokenizer("import os\nimport ", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert "import" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_heldout_documents_are_of_the_test_split(record: dict[str, Any]) -> None:
    text = HELDOUT.read_text()
    documents = list(heldout_documents(text))
    assert {file.split for file in documents} == {"test"}
    assert "".join(separator(file.path) + file.text for file in documents) == text
    assert len(documents) <= record["corpus"]["test"]["files"]


def test_splits_are_disjoint(record: dict[str, Any]) -> None:
    if platform.python_version() != record["python"]:
        pytest.skip(f"needs the standard library of Python {record['python']}")
    files = read_corpus(standard_library())
    digests = {s: {hashlib.sha1(f.text.encode()).digest() for f in select(files, s)} for s in SPLITS}
    assert not digests["train"] & digests["valid"]
    assert not digests["train"] & digests["test"]
    assert not digests["valid"] & digests["test"]
    assert {split: len(digests[split]) for split in SPLITS} == {
        split: record["corpus"][split]["files"] for split in SPLITS
    }
    trained_on = {file.text.rstrip("\n") for file in select(files, "train")}
    assert not trained_on & {file.text.rstrip("\n") for file in heldout_documents(HELDOUT.read_text())}


def test_split_depends_on_the_path_alone() -> None:
    assert [split_of(path) for path in ("uuid.py", "pdb.py", "typing.py")] == ["test", "valid", "train"]
    splits = [split_of(f"package/module{i}.py") for i in range(10_000)]
    assert 0.05 < splits.count("test") / len(splits) < 0.07
    assert 0.03 < splits.count("valid") / len(splits) < 0.05
