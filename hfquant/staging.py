"""Output folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import SpecError


def check_output(out: Path, overwrite: bool, keep: str | Path | None = None) -> None:
    """Raise SpecError unless a model may be written to the folder `out`.

    `overwrite` replaces a model that is there, never anything else. `keep`: a folder that is still needed, the source.
    """
    if out.exists() and not out.is_dir():
        raise SpecError(f"the output {out} is a file: name a folder")
    above = next((parent for parent in out.absolute().parents if parent.exists()), out)
    if not above.is_dir():
        raise SpecError(f"the output {out} lies below the file {above}: name another folder")
    if not os.access(above, os.W_OK):
        raise SpecError(f"no permission to write in {above}, where the output {out} would be: name another folder")
    if keep is not None and Path(keep).is_dir():
        source, target = Path(keep).resolve(), out.resolve()
        if target == source or target in source.parents:
            raise SpecError(f"the output {out} would replace its own source {keep}: name another folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise SpecError(
            f"the output folder {out} is not empty: name another one, or overwrite it (overwrite=True, --overwrite)"
        )
    if not any((out / name).exists() for name in ("config.json", "adapter_config.json")):
        raise SpecError(f"{out} holds files but no model (no config.json), it is not overwritten: name another folder")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place, whatever is there, when the block ends without an error.

    On an error or an interrupt it is removed and `out` stays as it was.
    """
    out = Path(os.path.abspath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(f".{out.name}.new-{uuid.uuid4().hex[:8]}")
    new.mkdir()
    try:
        yield new
        put_in_place(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def put_in_place(new: Path, out: Path) -> None:
    """Let the finished folder `new` take the place of `out`, which stays as it was if that fails."""
    out = Path(os.path.abspath(out))
    old = out.with_name(f".{out.name}.old-{uuid.uuid4().hex[:8]}")
    try:
        if out.exists():
            out.rename(old)
        new.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def partial_folder(out: Path) -> Path:
    """Where a run that can be resumed keeps what is finished, beside the folder `out` that it is going to be."""
    out = Path(os.path.abspath(out))
    return out.with_name(f".{out.name}.partial")
