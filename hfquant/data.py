"""Calibration data: what a method looks at, as the user names it, checked before any model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .errors import CalibrationError, SpecError
from .inputs import Batch, check_inputs, check_length, check_tokens, check_vocabulary, digest, rows_of, tokens_of
from .selftext import check_writes, self_text
from .source import model_class
from .texts import DATASET, Text, datasets_package, is_chat, names_a_file, read_dataset, read_file
from .tokens import Frame, check_template, encode, frame_of, load_tokenizer, packed, padded, unpacked

logger = logging.get_logger(__name__)

SELF = "self"
TEXT = ("dataset", "file", "texts", "chats")
"""Kinds of data that a tokenizer reads."""

_ENOUGH = 4  # of a dataset, so many times the tokens needed are read, for the seed to choose from
_FORMS = (
    "a dataset name, a text file, a list of texts, of conversations, of token tensors or of dicts of model inputs, "
    f"or {SELF!r}"
)


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """What to calibrate on.

    `data`: name of a Hub dataset ("organization/name:configuration"), path of a text, .json or .jsonl file, list of
    texts, of conversations (lists of messages with role and content), of token tensors ([L] or [B, L], each row a
    sample as it is) or of dicts of model inputs (each a batch as it is), or "self": text the model writes.
    `samples`: at most so many. `length`: tokens of a sample of text. `column`, `split`: of a dataset or JSON file.
    `packing`: texts one after the other, cut into full samples; without it each text gives one sample, cut at `length`
    or padded. `seed` decides which part of the data is used, and in which order. Raises SpecError.
    """

    data: Any = None
    samples: int = 128
    length: int = 512
    batch_size: int = 8
    seed: int = 0
    column: str | None = None
    split: str = "train"
    packing: bool = True

    def __post_init__(self) -> None:
        for name in ("samples", "length", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"{name} of calibration data is a whole number from 1, got {value!r}")
        if not isinstance(self.seed, int):
            raise SpecError(f"seed of calibration data is a whole number, got {self.seed!r}")

    def describe(self, batches: Sequence[Batch] = ()) -> dict[str, Any]:
        """What was used, as plain JSON types for a checkpoint: names and counts, never the data.

        With the `batches` made from it also their samples, tokens (padding apart) and SHA-256.
        """
        if self.data is None:
            return {"data": None}
        kind = kind_of(self.data)
        out: dict[str, Any] = {"data": _name(kind, self.data), "seed": self.seed}
        if kind in (*TEXT, SELF):
            out["length"] = self.length
        if kind in TEXT:
            out["packing"] = self.packing
        if kind == "dataset":
            out["split"] = self.split
        if self.column is not None:
            out["column"] = self.column
        if not batches:
            return out | {"samples": self.samples}
        counted = {"samples": sum(map(rows_of, batches)), "sha256": digest(batches)}
        if all("input_ids" in batch for batch in batches):
            counted["tokens"] = sum(map(tokens_of, batches))
        return out | counted


def kind_of(data: Any) -> str:
    """Which form of data this is: dataset, file, texts, chats, tokens, inputs or self. Raises CalibrationError."""
    if data is None:
        raise CalibrationError(f"there is no calibration data: data is {_FORMS}")
    if isinstance(data, str | Path):
        return _kind_of_name(data)
    if isinstance(data, Tensor):
        return "tokens"
    if not isinstance(data, Sequence):
        raise CalibrationError(f"data is {_FORMS}, got a {type(data).__name__}")
    if not data:
        raise CalibrationError(f"the calibration data is an empty {type(data).__name__}: give at least one sample")
    kinds = [_kind_of_item(item, number) for number, item in enumerate(data)]
    other = next((number for number, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is not None:
        raise CalibrationError(
            f"calibration data is of one form: item 0 is one of {kinds[0]}, item {other} of {kinds[other]}"
        )
    return kinds[0]


def _kind_of_name(data: str | Path) -> str:
    name = str(data)
    if name == SELF:
        return SELF
    if os.path.isfile(name):
        return "file"
    if os.path.isdir(name):
        raise CalibrationError(f"the calibration data {name} is a folder: name a file in it")
    if isinstance(data, Path) or (len(name) < 256 and names_a_file(name)):
        raise CalibrationError(f"there is no calibration file {name} (from {os.getcwd()}): give its full path")
    if DATASET.fullmatch(name):
        return "dataset"
    raise CalibrationError(
        f"data is a string of {len(name)} characters that names no file and no dataset: "
        "to calibrate on that text itself, put it into a list, data=[text]"
    )


def _kind_of_item(item: Any, number: int) -> str:
    if isinstance(item, str):
        return "texts"
    if isinstance(item, Tensor):
        return "tokens"
    if is_chat(item):
        return "chats"
    if isinstance(item, Mapping):
        if "role" in item:
            raise CalibrationError(
                f"item {number} of data is a message: data=[[message, ...], ...] lists conversations"
            )
        return "inputs"
    raise CalibrationError(f"item {number} of data is a {type(item).__name__}: data is {_FORMS}")


def _name(kind: str, data: Any) -> str:
    if kind == "file":
        return f"file {Path(data).name}"
    if kind in ("dataset", SELF):
        return str(data)
    what = {"texts": "strings", "chats": "conversations", "tokens": "token tensors", "inputs": "batches of inputs"}
    return f"{1 if isinstance(data, Tensor) else len(data)} {what[kind]}"


# ---- checks


def tokenizer_for(calibration: CalibrationData, src: str | Path, revision: str | None = None) -> Any:
    """The tokenizer of the model `src` if the data needs one, or "self" can have one, else None."""
    kind = kind_of(calibration.data)
    if kind in TEXT:
        return load_tokenizer(src, revision)
    try:
        return load_tokenizer(src, revision) if kind == SELF else None
    except CalibrationError as error:
        logger.warning("the model writes its text without a beginning-of-text token, special tokens unknown: %s", error)
        return None


def check(calibration: CalibrationData, tokenizer: Any, config: Any) -> None:
    """Raise CalibrationError for data that cannot suit a model of this configuration; reads no text yet.

    `batches` needs no model either, unless it is to write the text, and also refuses what the text itself shows.
    """
    data, kind, found = calibration.data, kind_of(calibration.data), model_class(config)
    text_config = config.get_text_config()
    if kind == SELF:
        check_writes(found, config)
    elif kind == "tokens":
        for number, tensor in enumerate(_tensors(data)):
            check_tokens(tensor, f"token tensor {number}", text_config)
    elif kind == "inputs":
        for number, inputs in enumerate(data):
            check_inputs(inputs, f"batch {number}", text_config)
    else:
        wanted = getattr(found, "main_input_name", "input_ids")
        if wanted != "input_ids":
            raise CalibrationError(f"{found.__name__} reads {wanted}, not text: give a list of dicts of model inputs")
        if tokenizer is None:
            raise CalibrationError(
                f"text ({_name(kind, data)}) needs a tokenizer, and there is none: give token tensors"
            )
        if kind == "dataset":
            datasets_package(data)
        if kind == "chats":
            check_template(tokenizer)
    if kind in (*TEXT, SELF):
        check_length(calibration.length, f"length={calibration.length}", text_config)


def _tensors(data: Any) -> list[Tensor]:
    return [data] if isinstance(data, Tensor) else list(data)


# ---- batches


def batches(
    calibration: CalibrationData, tokenizer: Any, config: Any, model: Any = None, says_fewer: bool = True
) -> list[Batch]:
    """The batches to run a model of `config` on: "input_ids" [B, L] int64, on the CPU, the same for the same seed.

    "attention_mask" [B, L] int64 goes with them only where there is padding. `model` writes the text if data is "self".
    Raises CalibrationError for data that `check` refuses, that is too short, or that has ids outside the vocabulary;
    logs a warning if it gives fewer samples than asked for, unless `says_fewer` is False.
    """
    check(calibration, tokenizer, config)
    if kind_of(calibration.data) == "inputs":
        return [dict(inputs) for inputs in calibration.data]
    rows = _samples(calibration, tokenizer, config, model)
    if says_fewer and len(rows) < calibration.samples and kind_of(calibration.data) != "tokens":
        logger.warning("the calibration data gives %d samples, %d were asked for", len(rows), calibration.samples)
    text_config = config.get_text_config()
    pad = getattr(text_config, "pad_token_id", None)
    if not isinstance(pad, int) or not 0 <= pad < text_config.vocab_size:
        pad = 0  # any token of the vocabulary will do: it is masked out
    return padded(rows, calibration.batch_size, pad)


def _samples(calibration: CalibrationData, tokenizer: Any, config: Any, model: Any) -> list[Tensor]:
    """The samples, each [L] of integers."""
    c, kind = calibration, kind_of(calibration.data)
    if kind == "tokens":
        generator = torch.Generator().manual_seed(c.seed)
        given = [row for tensor in _tensors(c.data) for row in (tensor if tensor.ndim == 2 else tensor[None]).cpu()]
        return [given[n] for n in torch.randperm(len(given), generator=generator)[: c.samples].tolist()]
    if kind == SELF:
        if model is None:
            raise CalibrationError("data='self': the model must be loaded to write its text")
        known = (
            {} if tokenizer is None else {"prefix": frame_of(tokenizer).prefix, "special": tokenizer.all_special_ids}
        )
        return list(self_text(model, c.samples, c.length, c.seed, c.batch_size, **known))
    frame = frame_of(tokenizer)
    rows = windows(c, encode(texts_of(c), tokenizer, frame), frame)
    check_vocabulary(torch.cat(rows), "the tokenizer's output", config.get_text_config())
    return rows


def windows(calibration: CalibrationData, documents: Iterable[Sequence[int]], frame: Frame) -> list[Tensor]:
    """Samples [<= length] of integers cut from documents, as the seed says. Raises CalibrationError if there are none.

    Whatever the numbers of a document are, they are taken and moved as they are.
    """
    c, kind = calibration, kind_of(calibration.data)
    generator = torch.Generator().manual_seed(c.seed)
    enough = {"enough": _ENOUGH} if kind == "dataset" else {}
    rows = list((packed if c.packing else unpacked)(documents, frame, c.length, c.samples, generator, **enough))
    if not rows:
        raise CalibrationError(f"the calibration data ({_name(kind, c.data)}) holds no text: every item is empty")
    return rows


def texts_of(calibration: CalibrationData) -> Iterator[Text]:
    """The texts or conversations of data that is text, one after the other. Raises CalibrationError."""
    kind = kind_of(calibration.data)
    if kind == "file":
        return read_file(Path(calibration.data), calibration.column)
    if kind == "dataset":
        return read_dataset(calibration.data, calibration.split, calibration.column)
    return iter(calibration.data)


def stand_in(config: Any, seed: int = 0) -> list[Batch]:
    """A batch of random inputs: enough to see how a model is wired, for methods that need no data."""
    generator = torch.Generator().manual_seed(seed)
    wanted = getattr(model_class(config), "main_input_name", "input_ids")
    # A configuration that was never saved names no class: images are then what a model without vocabulary reads.
    if wanted == "pixel_values" or not hasattr(config.get_text_config(), "vocab_size"):
        size = config.image_size if isinstance(config.image_size, Sequence) else (config.image_size,) * 2
        return [{"pixel_values": torch.randn(2, config.num_channels, *size, generator=generator)}]
    return [{"input_ids": torch.randint(config.get_text_config().vocab_size, (2, 32), generator=generator)}]
