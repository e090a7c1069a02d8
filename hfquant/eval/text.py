"""Held-out text cut into batches of token sequences."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_batches(
    tokenizer: PreTrainedTokenizerBase,
    text_or_path: str | Path,
    sequences: int,
    length: int,
    batch_size: int = 8,
) -> list[Tensor]:
    """Cut text into `sequences` windows of `length` tokens that never overlap: batches [B, L] int64.

    No special tokens are added. Of longer text, evenly spread windows are taken, always the same ones.
    Raises `SpecError` when the text has too few tokens or a count makes no sense.
    """
    _check_counts(sequences, length, batch_size)
    text = read_text(text_or_path)
    # verbose=False: no warning that the text is longer than the model's window, which is why it is cut.
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    needed = sequences * length
    if len(ids) < needed:
        fit = len(ids) // length
        raise SpecError(
            f"token_batches: {sequences} sequences of {length} tokens need {needed} tokens, but the text has "
            f"{len(ids)} tokens ({len(text)} characters); give more text"
            + (f", or ask for at most {fit} sequences" if fit else "")
        )
    # A window opens each of the equal shares of the text; a share holds at least `length` tokens.
    starts = torch.arange(sequences) * len(ids) // sequences
    return list(ids.unfold(0, length, 1)[starts].split(batch_size))


def read_text(text_or_path: str | Path) -> str:
    """Return the text itself, or the UTF-8 content of the file it names. Raises `SpecError` if unreadable."""
    if isinstance(text_or_path, str) and not os.path.isfile(text_or_path):
        return text_or_path
    try:
        return Path(text_or_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read {str(text_or_path)!r} as UTF-8 text: {error}") from error


def check_batches(batches: Sequence[Tensor]) -> None:
    """Raise `SpecError` unless there are batches and each is [B, L] with something to predict."""
    if not batches or any(batch.ndim != 2 or batch.shape[0] < 1 or batch.shape[1] < 2 for batch in batches):
        shapes = [tuple(batch.shape) for batch in batches]
        raise SpecError(f"evaluation needs batches of token ids [B, L] with L at least 2, but got shapes {shapes}")


def check_vocabulary(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Raise `SpecError` if a token id [B, L] lies outside the model's vocabulary.

    The tokenizer is then another model's. Checked up front, because on CUDA such an id kills the process.
    A model without a config is not checked.
    """
    size = _vocabulary_size(model)
    largest = max((int(batch.max()) for batch in batches if batch.numel()), default=-1)
    if size is not None and largest >= size:
        raise SpecError(
            f"the tokens reach id {largest}, but {type(model).__name__} has a vocabulary of {size} (ids 0 to "
            f"{size - 1}); use the tokenizer that belongs to the model"
        )


def _vocabulary_size(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):  # multimodal models keep it one level down
        config = config.get_text_config()
    return getattr(config, "vocab_size", None)


def _check_counts(sequences: int, length: int, batch_size: int) -> None:
    for name, value, least in (
        ("sequences", sequences, 1),
        ("length", length, 2),
        ("batch_size", batch_size, 1),
    ):
        if value < least:  # a sequence of one token predicts nothing
            raise SpecError(f"token_batches: {name} must be at least {least}, not {value}")
