"""One process at a time in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from .errors import SpecError

LOCK_NAME = ".lock"


def locked(folder: Path) -> TextIO:
    """A lock on a folder that is there, held until what is returned is closed or the process ends, however it ends.

    Raises SpecError if another one holds it. Where there are no such locks (Windows) nobody is kept out.
    """
    file = open(folder / LOCK_NAME, "w")  # noqa: SIM115 - it is held open
    try:
        import fcntl
    except ImportError:  # not a Unix
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise SpecError(f"another process is writing to {folder}: wait for it, or name another output") from error
    return file
