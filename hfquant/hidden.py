"""The hidden states between two blocks, one tensor a batch: in memory, or in files where memory is short."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


class HiddenStates:
    """Hidden states [B, L, H] by the number of their batch. With a `folder` they lie there, and one is in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._held: dict[int, Tensor] = {}
        self._known: set[int] = set()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, batch: int) -> bool:
        return batch in self._known

    def numbers(self) -> list[int]:
        """The batches that are there."""
        return sorted(self._known)

    def __getitem__(self, batch: int) -> Tensor:
        if self.folder is None:
            return self._held[batch]
        return load_file(self._file(batch))["hidden"]

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        self._known.add(batch)
        if self.folder is None:
            self._held[batch] = hidden
        else:
            save_file({"hidden": hidden.contiguous()}, self._file(batch))

    def clear(self) -> None:
        """Forget them all, files included."""
        self._held.clear()
        self._known.clear()
        if self.folder is not None:
            for file in self.folder.glob("*.safetensors"):
                file.unlink()

    def _file(self, batch: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{batch}.safetensors"
