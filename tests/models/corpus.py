"""Training corpus: the source files of Python's standard library, split by file.

The split of a file depends only on its own path, so adding or removing a file never moves another one
between train, valid and test.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Split = Literal["train", "valid", "test"]

SPLITS: tuple[Split, ...] = get_args(Split)

MIN_BYTES = 400
"""Files smaller than this many bytes are left out: empty ``__init__.py`` and one-line shims."""

VALID_PERCENT = 4
TEST_PERCENT = 6

EXCLUDED_DIRS = frozenset({"site-packages", "test", "encodings"})
"""Top-level directories left out: third-party code, the interpreter's own test suite, and ``encodings``,
which is almost only generated character tables."""


@dataclass(frozen=True)
class SourceFile:
    """One source file: its path relative to the library root (``/``-separated) and its text."""

    path: str
    text: str

    @property
    def split(self) -> Split:
        """The split this file belongs to."""
        return split_of(self.path)


def split_of(path: str) -> Split:
    """Return the split of the file at relative ``path``, from a hash of the path alone."""
    bucket = int.from_bytes(hashlib.sha1(path.encode()).digest()[:8], "big") % 100
    if bucket < TEST_PERCENT:
        return "test"
    if bucket < TEST_PERCENT + VALID_PERCENT:
        return "valid"
    return "train"


def standard_library() -> Path:
    """Return the directory that holds the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_wanted(path: Path) -> bool:
    """Whether the file at relative ``path`` belongs in the corpus, judged by its name."""
    top = path.parts[0]
    # The last two hold the build settings of one installation, full of machine-specific paths.
    return top not in EXCLUDED_DIRS and not top.startswith(("_sysconfigdata", "config-"))


def read_corpus(root: Path) -> list[SourceFile]:
    """Read every wanted ``*.py`` file under ``root``, in path order, without duplicates.

    A file that is not UTF-8, is smaller than ``MIN_BYTES``, or repeats an earlier one is left out.
    """
    files: list[SourceFile] = []
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not is_wanted(relative):
            continue
        data = path.read_bytes()
        digest = hashlib.sha1(data).digest()
        if len(data) < MIN_BYTES or digest in seen:
            continue
        seen.add(digest)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        files.append(SourceFile(relative.as_posix(), text))
    return files


def select(files: Iterable[SourceFile], split: Split) -> list[SourceFile]:
    """Return the files of one split, in the order given."""
    return [file for file in files if file.split == split]


def separator(path: str) -> str:
    """Return the line that precedes a file in a concatenated text."""
    return f"# ==== {path} ====\n"


def heldout_text(files: Iterable[SourceFile], max_bytes: int) -> str:
    """Concatenate whole test-split files, each after its separator line, up to ``max_bytes`` bytes.

    Files are taken in the order of the hash of their path, which mixes packages; one that would overflow the
    limit is passed over.
    """
    parts: list[str] = []
    size = 0
    for file in sorted(select(files, "test"), key=lambda f: hashlib.sha1(f.path.encode()).digest()[8:]):
        part = separator(file.path) + file.text.rstrip("\n") + "\n"
        part_size = len(part.encode())
        if size + part_size <= max_bytes:
            parts.append(part)
            size += part_size
    return "".join(parts)


def heldout_documents(text: str) -> Iterator[SourceFile]:
    """Split the text written by ``heldout_text`` back into its files."""
    path: str | None = None
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        if line.startswith("# ==== ") and line.endswith(".py ====\n"):
            if path is not None:
                yield SourceFile(path, "".join(lines))
            path = line.removeprefix("# ==== ").removesuffix(" ====\n")
            lines = []
        else:
            lines.append(line)
    if path is not None:
        yield SourceFile(path, "".join(lines))
