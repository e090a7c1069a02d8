"""What a run has finished, kept beside its output so that a killed one goes on there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .. import processes
from ..errors import SpecError
from ..report import strict_json

_NAME = "run.json"


class State:
    """A folder with what is finished, and notes about it in plain JSON types. Of several processes the first writes."""

    def __init__(self, folder: Path, request: dict[str, Any], resume: bool) -> None:
        """`request`: what has to be the same to go on. Raises SpecError if it is not."""
        self.folder, self.path = folder, folder / _NAME
        self.notes: dict[str, Any] = {}
        request = json.loads(strict_json(request))
        found = json.loads(self.path.read_text()) if resume and self.path.exists() else None
        processes.barrier()
        if found is not None:
            if changed := sorted(name for name in request if found["request"].get(name) != request[name]):
                raise SpecError(
                    f"{folder} holds an unfinished run with another {', '.join(changed)}: finish that one with its own "
                    "arguments, or start over (resume=False, --no-resume)"
                )
            self.notes = found["notes"]
        elif processes.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._request = request
            self._write()
        self._request = request
        processes.barrier()

    def note(self, name: str, value: Any) -> None:
        """Record that `name` is finished."""
        self.notes[name] = json.loads(strict_json(value))
        if processes.rank() == 0:
            self._write()

    def _write(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"request": self._request, "notes": self.notes}))
        os.replace(new, self.path)
