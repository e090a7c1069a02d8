"""Where calibration text comes from: text and JSON files, datasets, and the column of theirs that holds the text."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from .errors import CalibrationError

Text = str | list[dict[str, Any]]
"""A text, or a conversation: messages with a role and a content."""

DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
"""name, organization/name, either with :configuration."""

_FILES = (".txt", ".json", ".jsonl", ".md", ".text", ".csv", ".parquet", ".gz", ".zst")
_COLUMN = "text"  # what nearly every corpus calls it
_CHATS = "messages"  # what nearly every data set of conversations calls them


def names_a_file(name: str) -> bool:
    """Whether a string that is no existing file can only have been meant as one."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.lower().endswith(_FILES)


def is_chat(value: Any) -> bool:
    """Whether this is a conversation: a list of messages, each with a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def read_file(path: Path, column: str | None = None) -> Iterator[Text]:
    """The texts of a file: .json (a list) and .jsonl (a row a line) hold many, every other file is one text.

    A row is a text, a conversation, or an object with one of them under `column`. Raises CalibrationError.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not a text file in UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise CalibrationError(f"cannot read the calibration data {path}: {error.strerror}") from error
    if path.suffix.lower() == ".jsonl":
        lines = ((n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip())
        yield from _texts((_json(line, f"line {n} of {path}") for n, line in lines), column, str(path))
    elif path.suffix.lower() == ".json":
        rows = _json(content, str(path))
        if not isinstance(rows, list):
            raise CalibrationError(f"{path} holds one {type(rows).__name__}: calibration data is a list of rows")
        yield from _texts(rows, column, str(path))
    else:
        yield content


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where} is not JSON: {error}") from error


def read_dataset(name: str, split: str, column: str | None = None) -> Iterator[Text]:
    """The texts of a Hub dataset "name" or "name:configuration", in its order, downloaded only as far as they are read.

    Raises CalibrationError if the package `datasets` is missing or cannot read it.
    """
    datasets = datasets_package(name)
    repository, _, configuration = name.partition(":")
    # Offline, streaming would miss what is in the cache.
    streaming = not constants.HF_HUB_OFFLINE
    try:
        rows = datasets.load_dataset(repository, configuration or None, split=split, streaming=streaming)
        yield from _texts(rows, column, f"the dataset {name}")
    except CalibrationError:
        raise
    except Exception as error:  # a dozen kinds: network, unknown name, unknown split, configuration missing, scripts
        raise CalibrationError(
            f"cannot read the dataset {name!r}, split {split!r} ({type(error).__name__}: {error}). No text file has "
            "that name either: name a dataset as on the Hub (organization/name:configuration), or a file"
        ) from error


def datasets_package(name: str) -> Any:
    """The package `datasets`, needed for the dataset `name`. Raises CalibrationError if it is not installed."""
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise CalibrationError(
            f"data={name!r} is no file here, and to read a dataset of that name the package datasets is missing "
            f'({error}): pip install "hfquant[datasets]", or name a text file'
        ) from error


def _texts(rows: Iterable[Any], column: str | None, where: str) -> Iterator[Text]:
    """The text of each row, by default from the column that the first row shows to be the only candidate."""
    for number, row in enumerate(rows):
        value = row
        if isinstance(row, Mapping):
            column = column or _only_column(row, where)
            if column not in row:
                raise CalibrationError(f"row {number} of {where} has no column {column!r}: it has {_listed(row)}")
            value = row[column]
        if value is None:
            continue
        if not isinstance(value, str) and not is_chat(value):
            place = f"row {number}" + (f", column {column!r}," if isinstance(row, Mapping) else "")
            raise CalibrationError(
                f"{place} of {where} holds a {type(value).__name__}: "
                "it must be a text, or a list of messages with a role"
            )
        yield value


def _only_column(row: Mapping[str, Any], where: str) -> str:
    """The column of text or conversations if there is only one, or one with the usual name."""
    found = [name for name, value in row.items() if isinstance(value, str) or is_chat(value)]
    if _COLUMN in found:
        return _COLUMN
    if _CHATS in found and is_chat(row[_CHATS]):
        return _CHATS
    if len(found) == 1:
        return found[0]
    what = "several columns" if found else "no column"
    raise CalibrationError(f"{where} has {what} of text, name one (column=...): it has {_listed(row)}")


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items()) or "no columns"
