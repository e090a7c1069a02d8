"""A small model with a byte-level tokenizer, a text, and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from hfquant.cli import app
from hfquant.testing.tiny import tiny_model


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A 2-layer Llama of 256 tokens, which are the 256 bytes."""
    folder = tmp_path_factory.mktemp("cli") / "source"
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(Path(__file__).read_text() * 2)
    return file


@pytest.fixture
def hfquant(monkeypatch):
    """`hfquant("inspect", path)` runs a command on a terminal of 100 columns; the result holds what it printed."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object, status: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == status, f"{result.output}\n{result.exception!r}"
        return result

    return run
