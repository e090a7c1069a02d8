"""Texts from files and data sets: every form that is read, and what is said about the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from hypothesis import example, given
from hypothesis import strategies as st

from hfquant.errors import CalibrationError
from hfquant.texts import DATASET, names_a_file, read_dataset, read_file

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    assert list(read_file(write(tmp_path / "a.txt", "one\n\nzwölf\u2028x\n"))) == ["one\n\nzwölf\u2028x\n"]


@given(st.lists(st.text(), max_size=5))
@example(["one line\u2028or two\x85or three"])
def test_rows_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    objects = [{"id": n, "body": text} for n, text in enumerate(texts)]
    raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects)  # line separators inside strings
    for rows in (texts, objects):
        assert list(read_file(write(folder / "a.json", json.dumps(rows)))) == texts
        assert list(read_file(write(folder / "a.jsonl", lines(*rows) + "\n"))) == texts
    assert list(read_file(write(folder / "b.jsonl", raw))) == texts


def test_conversations_are_read_too(tmp_path: Path) -> None:
    assert list(read_file(write(tmp_path / "a.jsonl", lines(CHAT, CHAT)))) == [CHAT, CHAT]
    assert list(read_file(write(tmp_path / "b.jsonl", lines({"id": 1, "messages": CHAT})))) == [CHAT]


def test_the_column_is_the_one_asked_for_or_the_only_candidate(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"title": "T", "text": "X", "n": 1}, {"title": "U", "text": None, "n": 2}))
    assert list(read_file(path)) == ["X"]  # the usual name; a missing text is an empty one
    assert list(read_file(path, column="title")) == ["T", "U"]
    path = write(tmp_path / "b.jsonl", lines({"prompt": "X", "messages": CHAT, "chosen": CHAT}))
    assert list(read_file(path)) == [CHAT]  # the usual name of conversations
    assert list(read_file(path, column="prompt")) == ["X"]


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', None, r"line 2 of .*a\.jsonl is not JSON"),
        ("a.json", "[1", None, r"a\.json is not JSON"),
        ("a.json", '{"text": "x"}', None, r"a\.json holds one dict: calibration data is a list"),
        ("a.json", "[3]", None, r"row 0 of .*a\.json holds a int: it must be a text"),
        ("a.jsonl", lines({"q": "x", "a": "y"}), None, r"several columns of text, name one .*q \(str\), a \(str\)"),
        ("a.jsonl", lines({"n": 1}), None, r"no column of text.*n \(int\)"),
        (
            "a.jsonl",
            lines({"text": "x"}, {"body": "y"}),
            None,
            r"row 1 of .* has no column 'text': it has body \(str\)",
        ),
        ("a.jsonl", lines({"text": "x"}), "body", r"row 0 of .* has no column 'body': it has text \(str\)"),
        ("a.jsonl", lines({"n": 1, "text": "x"}), "n", r"row 0, column 'n', of .* holds a int"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_what_it_holds(
    tmp_path: Path, name: str, content: str, column: str | None, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        list(read_file(write(tmp_path / name, content), column))


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"ok \xff")
    with pytest.raises(CalibrationError, match=r"a\.txt is not a text file in UTF-8 .* at byte 3"):
        list(read_file(path))


@pytest.mark.parametrize("name", ["./a", "/a", "~/a", "a/b/c", "a.txt", "org/a.jsonl", "dir\\a", "A.JSON"])
def test_strings_that_can_only_be_files(name: str) -> None:
    assert names_a_file(name)


@pytest.mark.parametrize("name", ["wikitext", "allenai/c4:en", "Salesforce/wikitext:wikitext-2-raw-v1", "a.b/c_d-e"])
def test_strings_that_can_be_datasets(name: str) -> None:
    assert not names_a_file(name) and DATASET.fullmatch(name)


@pytest.fixture
def fake_datasets(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], list]:
    """`fake_datasets(load)` puts a package in place of `datasets`; returns the list of its calls."""

    def install(load: Callable[..., Any]) -> list:
        calls: list = []

        def load_dataset(*args: Any, **options: Any) -> Any:
            calls.append((args, options))
            return load()

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return calls

    return install


@pytest.mark.parametrize("offline", [False, True])
def test_a_dataset_is_streamed_and_never_runs_code(
    fake_datasets: Any, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    calls = fake_datasets(lambda: ({"text": f"row {n}", "url": "x"} for n in count()))
    texts = read_dataset("org/name:en", "validation")
    assert [next(texts) for _ in range(3)] == ["row 0", "row 1", "row 2"]
    assert calls == [(("org/name", "en"), {"split": "validation", "streaming": not offline})]
    next(read_dataset("plain", "train"))
    assert calls[1][0] == ("plain", None)


def test_what_the_package_refuses_is_passed_on_with_the_name(fake_datasets: Any) -> None:
    def load() -> Any:
        raise ValueError("Config name is missing. Pick one among ['raw', 'v1']")

    fake_datasets(load)
    with pytest.raises(CalibrationError, match=r"dataset 'org/name', split 'train' \(ValueError: Config .*'raw', 'v1'"):
        next(read_dataset("org/name", "train"))


def test_a_dataset_that_breaks_on_the_way_is_named(fake_datasets: Any) -> None:
    def load() -> Any:
        yield {"text": "x"}
        raise ConnectionError("gone")

    fake_datasets(load)
    texts = read_dataset("org/name", "train")
    assert next(texts) == "x"
    with pytest.raises(CalibrationError, match=r"'org/name'.*gone"):
        next(texts)


def test_the_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"'org/name' is no file here.*pip install \"hfquant\[datasets\]\""):
        next(read_dataset("org/name", "train"))
