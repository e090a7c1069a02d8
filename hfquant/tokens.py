"""From text to samples: token ids packed into full windows, or one padded row a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

from .errors import CalibrationError
from .inputs import Batch
from .texts import Text

logger = logging.get_logger(__name__)

_CHUNK = 64  # texts that a tokenizer gets at once, for it to use its threads


def load_tokenizer(src: str | Path, revision: str | None = None) -> Any:
    """The tokenizer that goes with the model `src`. Raises CalibrationError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(src, revision=revision)
    except Exception as error:  # a missing file, a missing package, a format it cannot read: each of its own kind
        raise CalibrationError(
            f"text needs the tokenizer of {src}, which cannot be loaded: {' '.join(str(error).split()).rstrip('.')}. "
            "Save a tokenizer with the model, or give token tensors as data"
        ) from error
    # For a folder without a tokenizer transformers makes one that knows nothing but special tokens.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise CalibrationError(
            f"text needs the tokenizer of {src}, and there is none: save it with the model, or give token tensors"
        )
    return tokenizer


@dataclass(frozen=True)
class Frame:
    """The special tokens that a tokenizer puts around a text, such as [CLS] and [SEP], and between two texts."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    between: tuple[int, ...] = ()

    def room(self, length: int) -> int:
        """Tokens of text in a sample of `length`. Raises CalibrationError if there is room for none."""
        room = length - len(self.prefix) - len(self.suffix)
        if room < 1:
            raise CalibrationError(f"a sample of length={length} has no room beside the tokenizer's special tokens")
        return room

    def around(self, rows: Tensor) -> Tensor:
        """`rows` [..., L] of text with the special tokens before and after."""
        parts = (torch.tensor(ids, dtype=rows.dtype).expand(*rows.shape[:-1], -1) for ids in (self.prefix, self.suffix))
        prefix, suffix = parts
        return torch.cat([prefix, rows, suffix], dim=-1)


def frame_of(tokenizer: Any) -> Frame:
    """What `tokenizer` adds to a text, found by looking; texts are separated by its end-of-text token."""
    plain, full = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    starts = [n for n in range(len(full) - len(plain) + 1) if full[n : n + len(plain)] == plain]
    end = tokenizer.eos_token_id
    between = () if end is None else (end,)
    if not starts:
        logger.warning("the special tokens of %s are not around the text: left out", type(tokenizer).__name__)
        return Frame(between=between)
    return Frame(tuple(full[: starts[0]]), tuple(full[starts[0] + len(plain) :]), between)


def encode(texts: Iterable[Text], tokenizer: Any, frame: Frame) -> Iterator[list[int]]:
    """Token ids of each text that is not empty, without what `frame` puts around it. Raises CalibrationError."""
    source = (_plain(text, number, tokenizer) for number, text in enumerate(texts))
    filled = (text for text in source if text.strip())
    while chunk := list(islice(filled, _CHUNK)):
        for ids in tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
            # A chat template writes the first token itself.
            skip = len(frame.prefix) if tuple(ids[: len(frame.prefix)]) == frame.prefix else 0
            if len(ids) > skip:
                yield list(ids[skip:])


def _plain(text: Text, number: int, tokenizer: Any) -> str:
    """A conversation as the text that the model would see of it."""
    if isinstance(text, str):
        return text
    check_template(tokenizer)
    try:
        written: str = tokenizer.apply_chat_template(text, tokenize=False)
    except Exception as error:  # the template is a program of the model's author, and says what it dislikes
        raise CalibrationError(f"conversation {number} does not suit the chat template: {error}") from error
    return written


def check_template(tokenizer: Any) -> None:
    """Raise CalibrationError if the tokenizer cannot write conversations."""
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            "the data are conversations, and the tokenizer has no chat template: give plain texts, "
            "or set tokenizer.chat_template"
        )


def packed(
    documents: Iterable[Sequence[int]],
    frame: Frame,
    length: int,
    samples: int,
    generator: torch.Generator,
    enough: float = math.inf,
) -> Tensor:
    """At most `samples` windows [S, length] int64 of the documents written one after the other, none overlapping.

    Which windows, where the first one starts and their order is drawn from `generator`; each is framed as a text of its
    own. No more documents are read once they hold `enough` times the tokens needed. Raises CalibrationError if they do
    not fill one window.
    """
    room = frame.room(length)
    stream: list[int] = []
    for ids in documents:
        if stream and stream[-1:] != list(frame.between):
            stream += frame.between
        stream += ids
        if len(stream) >= enough * samples * room:
            break
    count = len(stream) // room
    if not count:
        raise CalibrationError(
            f"the calibration data is too short: it holds {len(stream)} tokens, and one sample of length={length} "
            f"needs {room}. Give more text, or a smaller length"
        )
    start = int(torch.randint(len(stream) - count * room + 1, (), generator=generator))
    windows = torch.tensor(stream[start : start + count * room]).view(count, room)
    return frame.around(windows[torch.randperm(count, generator=generator)[:samples]])


def unpacked(
    documents: Iterable[Sequence[int]],
    frame: Frame,
    length: int,
    samples: int,
    generator: torch.Generator,
    enough: float = math.inf,
) -> list[Tensor]:
    """At most `samples` rows [<= length] int64, each the beginning of one document, framed; drawn from `generator`.

    Of more than `enough` times the documents needed, the first are drawn from.
    """
    room = frame.room(length)
    limit = None if enough == math.inf else math.ceil(enough * samples)
    rows = [torch.tensor(ids[:room]) for ids in islice(documents, limit)]
    return [frame.around(rows[n]) for n in torch.randperm(len(rows), generator=generator)[:samples].tolist()]


def padded(rows: Sequence[Tensor], batch_size: int, pad: int) -> list[Batch]:
    """Batches of `rows` [L] of any lengths: "input_ids" [B, longest] int64, padded at the end with `pad`.

    "attention_mask" [B, longest] int64, 0 for padding, is there only where a batch has padding.
    """
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        lengths = torch.tensor([len(row) for row in part])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = torch.full_like(mask, pad)
        ids[mask.bool()] = torch.cat([row.long() for row in part])
        batches.append({"input_ids": ids} if mask.all() else {"input_ids": ids, "attention_mask": mask})
    return batches
