"""What a part has found so far: written to a file with every row, which is whole at any time."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RUNNING, DONE, FAILED = "running", "done", "failed"


def write(path: Path, data: Any) -> None:
    """Replace a JSON file at once: who reads it finds the old one or the new one."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    beside.write_text(json.dumps(data, indent=1) + "\n")
    beside.replace(path)


class Findings:
    """Facts of a part and its rows; `path` None keeps them in memory."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.data: dict[str, Any] = {"state": RUNNING, "seconds": 0.0, "rows": []}
        self._started = time.monotonic()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        found: list[dict[str, Any]] = self.data["rows"]
        return found

    def put(self, **facts: Any) -> None:
        """Note facts of the whole part."""
        self.data.update(facts, seconds=round(time.monotonic() - self._started, 2))
        if self.path is not None:
            write(self.path, self.data)

    @contextmanager
    def row(self, **what: Any) -> Iterator[dict[str, Any]]:
        """A row to fill in. What raises inside leaves its traceback in the row, and the next row can come."""
        line = dict(what)
        try:
            yield line
        except Exception:
            line["error"] = traceback.format_exc()
        self.rows.append(line)
        self.put()

    def guard(self, run: Callable[[], None]) -> None:
        """Run the whole part; what it raises is a finding, too."""
        self.put()
        try:
            run()
        except Exception:
            self.put(state=FAILED, error=traceback.format_exc())
        else:
            self.put(state=DONE)


def last_line(trace: str) -> str:
    """What went wrong, without where."""
    return trace.strip().splitlines()[-1] if trace.strip() else ""
