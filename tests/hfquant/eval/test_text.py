"""Cutting text into token sequences."""

import logging
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from hfquant.errors import SpecError
from hfquant.eval.text import check_batches, check_vocabulary, read_text, token_batches


def counting_tokenizer(size=100_000):
    """Word "17" is token 17, so a window tells where it was cut."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=8)


TOKENIZER = counting_tokenizer(2000)


def numbers(count):
    return " ".join(map(str, range(count)))


@given(
    tokens=st.integers(2, 400),
    sequences=st.integers(1, 12),
    length=st.integers(2, 30),
    batch=st.integers(1, 5),
)
@settings(deadline=None, max_examples=60)
def test_windows_are_consecutive_tokens_that_never_overlap(tokens, sequences, length, batch):
    if sequences * length > tokens:
        with pytest.raises(SpecError):
            token_batches(TOKENIZER, numbers(tokens), sequences, length, batch)
        return
    batches = token_batches(TOKENIZER, numbers(tokens), sequences, length, batch)
    assert all(b.dtype == torch.int64 and len(b) <= batch for b in batches)
    windows = torch.cat(batches)
    assert windows.shape == (sequences, length)
    assert torch.equal(windows, windows[:, :1] + torch.arange(length))
    assert len(windows.unique()) == windows.numel()


def test_windows_spread_over_a_longer_text():
    windows = torch.cat(token_batches(TOKENIZER, numbers(1000), 4, 10))
    assert windows[:, 0].tolist() == [0, 250, 500, 750]


def test_text_of_exactly_the_needed_length_is_used_whole():
    windows = torch.cat(token_batches(TOKENIZER, numbers(60), 6, 10))
    assert torch.equal(windows.flatten(), torch.arange(60))


def test_long_text_raises_no_length_warning(caplog):
    with caplog.at_level(logging.WARNING):
        token_batches(TOKENIZER, numbers(60), 2, 10)
    assert not caplog.records


def test_a_path_is_read_whether_str_or_path(tmp_path):
    file = tmp_path / "held_out.txt"
    file.write_text(numbers(40), encoding="utf-8")
    for source in (file, str(file), numbers(40)):
        assert torch.equal(torch.cat(token_batches(TOKENIZER, source, 4, 10)).flatten(), torch.arange(40))


def test_text_longer_than_a_file_name_may_be_is_text():
    assert read_text("a" * 100_000) == "a" * 100_000


def test_missing_or_binary_file_is_a_spec_error(tmp_path):
    with pytest.raises(SpecError, match="absent"):
        read_text(tmp_path / "absent.txt")
    binary = tmp_path / "weights.bin"
    binary.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SpecError, match="UTF-8"):
        read_text(str(binary))


def test_short_text_says_asked_and_found():
    with pytest.raises(SpecError, match=r"5 sequences of 10 tokens need 50 tokens.*has 37 tokens.*at most 3"):
        token_batches(TOKENIZER, numbers(37), 5, 10)
    with pytest.raises(SpecError, match="has 0 tokens"):
        token_batches(TOKENIZER, "", 1, 2)


@pytest.mark.parametrize("counts", [(0, 8, 1), (1, 1, 1), (1, 8, 0)])
def test_counts_that_make_no_sense(counts):
    with pytest.raises(SpecError, match="must be at least"):
        token_batches(TOKENIZER, numbers(100), *counts)


def model_of_vocabulary(size):
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(vocab_size=size)
    return model


def test_token_outside_the_vocabulary_is_refused():
    batches = [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 99, 5]])]
    check_vocabulary(model_of_vocabulary(100), batches)
    with pytest.raises(SpecError, match="id 99, but Linear has a vocabulary of 99"):
        check_vocabulary(model_of_vocabulary(99), batches)


def test_vocabulary_of_a_multimodal_config_is_its_text_config():
    model = model_of_vocabulary(None)
    model.config.get_text_config = lambda: SimpleNamespace(vocab_size=3)
    with pytest.raises(SpecError, match="vocabulary of 3"):
        check_vocabulary(model, [torch.tensor([[3, 0]])])


def test_model_without_config_is_not_checked():
    check_vocabulary(nn.Linear(1, 1), [torch.tensor([[10**9, 0]])])


@pytest.mark.parametrize("batches", [[], [torch.zeros(3)], [torch.zeros(2, 1)], [torch.zeros(2, 4), torch.zeros(0, 4)]])
def test_batches_without_predictions_are_refused(batches):
    with pytest.raises(SpecError, match="L at least 2"):
        check_batches(batches)
