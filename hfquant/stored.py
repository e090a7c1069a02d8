"""The weight files of a native checkpoint: compared with what its configuration promises, read tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .errors import FormatError
from .report import PackedWeight
from .source import headers, weight_files

_DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class StoredTensors:
    """The tensors in the files of a folder; none for a Hub repository, which is not downloaded for this."""

    def __init__(self, path: str | Path) -> None:
        """Read the headers. Raises FormatError for a damaged file."""
        self.path = path
        self._files: dict[str, Path] = {}
        self._headers: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file in weight_files(path) if Path(path).is_dir() else ():
            found = headers(file)
            self._headers |= found
            self._files |= dict.fromkeys(found, file)

    def check(self, model: nn.Module) -> None:
        """Compare names, shapes and dtypes with what `model` expects. Raises FormatError if they differ."""
        if not Path(self.path).is_dir():
            return
        tied = _tied(model)
        for name, parameter in model.named_parameters():
            if name not in self._headers:
                if name not in tied:
                    raise FormatError(f"{self.path} is incomplete: no file holds the tensor {name!r}")
                continue
            dtype, shape = self._headers[name]
            converts = parameter.dtype in (torch.float32, torch.float16, torch.bfloat16)  # to the dtype of the model
            if shape != tuple(parameter.shape) or not (converts or _DTYPES.get(dtype) == parameter.dtype):
                expected = f"{parameter.dtype} {tuple(parameter.shape)}".removeprefix("torch.")
                raise FormatError(f"{self.path}: tensor {name!r} is {dtype} {shape}, its configuration says {expected}")

    def read(self, weight: PackedWeight, name: str) -> Tensor | None:
        """The packed tensor `name` of `weight` as loading gives it, None where no file here holds it."""
        stored = f"{weight.name}{'_' if weight.kind == 'experts' else '.'}{name}"
        if stored not in self._files:
            return None
        with safe_open(self._files[stored], framework="pt") as opened:
            found: Tensor = opened.get_tensor(stored)
        return found.to(weight.tensors[name].dtype)


def _tied(model: Any) -> set[str]:
    """Names of parameters that are stored under another name."""
    return {key for pair in model.all_tied_weights_keys.items() for key in pair}
