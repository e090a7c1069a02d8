"""The journal of a long quantization: what is finished and where it lies, so that a killed run can go on."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from safetensors.torch import save_file
from torch import Tensor

from .errors import FormatError, SpecError
from .locks import LOCK_NAME, locked

JOURNAL_NAME = "journal.jsonl"


class Journal:
    """A folder of shards, and a file with one line for each that is complete.

    The first line says what the run is; a run of anything else does not go on with it. A line is written after its
    shard is on the disk, and one that a crash cut short does not count.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], resume: bool) -> None:
        """`run`: what has to be the same to go on. Raises SpecError if it is not, or if another process is at it."""
        self.folder, self.path = folder, folder / JOURNAL_NAME
        self.records: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = locked(folder)
        try:
            lines = _complete_lines(self.path) if resume else []
            if lines:
                _check_same(lines[0], dict(run), folder)
                self.records = {line["name"]: line for line in lines[1:]}
                self._check_shards()
            else:
                _clear(folder)
            _rewrite(self.path, lines or [dict(run)])
        except BaseException:
            self.close()
            raise

    def write(self, name: str, shard: str, tensors: dict[str, Tensor], header: dict[str, str], **facts: Any) -> None:
        """Write the tensors of `name` to the file `shard` and note it with `facts` (plain JSON types).

        Raises OSError that says what to do when the disk is full; what was finished before stays.
        """
        new = self.folder / f"{shard}.tmp"
        try:
            save_file(tensors, new, header)
            _sort_metadata(new)
            _sync(new)
            new.rename(self.folder / shard)
            sizes = {key: value.numel() * value.element_size() for key, value in tensors.items()}
            record = {"name": name, "shard": shard, "bytes": (self.folder / shard).stat().st_size, "tensors": sizes}
            with open(self.path, "a") as file:
                file.write(json.dumps({**record, **facts}) + "\n")
                _flush(file)
        except OSError as error:
            new.unlink(missing_ok=True)
            if error.errno == errno.ENOSPC or "No space left" in str(error):
                raise OSError(
                    errno.ENOSPC,
                    f"the disk is full while writing {shard}: make room and run the same command again, "
                    f"{len(self.records)} finished parts in {self.folder} are kept",
                ) from error
            raise
        self.records[name] = {**record, **facts}

    def close(self) -> None:
        """Let others have the folder."""
        self._lock.close()

    def _check_shards(self) -> None:
        for record in self.records.values():
            shard = self.folder / record["shard"]
            if not shard.exists() or shard.stat().st_size != record["bytes"]:
                raise FormatError(
                    f"{shard} is not as the journal says: start over (resume=False, --no-resume), or restore it"
                )


def _sort_metadata(file: Path) -> None:
    """Give the metadata of a safetensors file an order, which the library leaves to chance.

    Two runs would otherwise write files that differ in nothing but that.
    """
    with open(file, "r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        opened.seek(8)
        opened.write(text.ljust(size))


def forget(folder: Path) -> None:
    """Remove the journal from a folder that is complete."""
    for name in (JOURNAL_NAME, LOCK_NAME):
        (folder / name).unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Start over: remove what an earlier run left, which is nothing but files of this module and of its caller."""
    for file in folder.iterdir():
        if file.name != LOCK_NAME:
            file.unlink()


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().split("\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _check_same(found: dict[str, Any], run: dict[str, Any], folder: Path) -> None:
    """Raise SpecError if the interrupted run was another one."""
    wanted = json.loads(json.dumps(run))
    different = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if different:
        details = "; ".join(f"{key}: {found.get(key)!r} then, {wanted.get(key)!r} now" for key in different)
        raise SpecError(
            f"{folder} holds an interrupted run of something else ({details}): give the same request to go on with it, "
            "or start over (resume=False, --no-resume)"
        )


def _rewrite(path: Path, lines: list[dict[str, Any]]) -> None:
    """The journal without what a crash may have left at its end."""
    new = path.with_suffix(".tmp")
    with open(new, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        _flush(file)
    new.rename(path)


def _flush(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
