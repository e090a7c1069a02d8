"""What a run has finished, kept beside its output so that a killed one goes on there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

from .. import processes
from ..errors import SpecError
from ..locks import LOCK_NAME, locked
from ..report import strict_json

_NAME = "run.json"


class State:
    """A folder with what is finished, and notes about it in plain JSON types. Of several processes the first writes."""

    def __init__(self, folder: Path, request: dict[str, Any], resume: bool) -> None:
        """`request`: what has to be the same to go on. Raises SpecError if it is not, or if another run is at it."""
        self.folder, self.path = folder, folder / _NAME
        self.notes: dict[str, Any] = {}
        self._lock: TextIO | None = None
        self._take()
        try:
            self._start(json.loads(strict_json(request)), resume)
        except BaseException:
            self.close()
            raise

    def _take(self) -> None:
        """Keep other runs out of the folder; what stands in the way is told by all processes."""
        problem = ""
        if processes.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = locked(self.folder)
            except SpecError as error:
                problem = str(error)
        if problem := processes.of_first(problem):
            raise SpecError(problem)

    def close(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            self._lock.close()

    def _start(self, request: dict[str, Any], resume: bool) -> None:
        found = json.loads(self.path.read_text()) if resume and self.path.exists() else None
        processes.barrier()
        if found is not None:
            if changed := sorted(name for name in request if found["request"].get(name) != request[name]):
                raise self._other(", ".join(changed))
            self.notes = found["notes"]
        elif processes.rank() == 0:
            self._clear()
            self._request = request
            self._write()
        self._request = request
        processes.barrier()

    def _clear(self) -> None:
        """Start over: remove what an earlier run left, all but the lock, which is held."""
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != LOCK_NAME:
                entry.unlink()

    def expect(self, name: str, value: Any) -> None:
        """Record a value that has to be the same to go on. Raises SpecError if it is another one than before."""
        if self.notes.get(name, value) != value:
            raise self._other(name)
        self.note(name, value)

    def _other(self, what: str) -> SpecError:
        return SpecError(
            f"{self.folder} holds an unfinished run with another {what}: finish that one with its own arguments, or "
            "start over (resume=False, --no-resume)"
        )

    def note(self, name: str, value: Any) -> None:
        """Record that `name` is finished."""
        self.notes[name] = json.loads(strict_json(value))
        if processes.rank() == 0:
            self._write()

    def _write(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"request": self._request, "notes": self.notes}))
        os.replace(new, self.path)
