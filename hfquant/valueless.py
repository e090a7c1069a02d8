"""Running a model on the meta device, where tensors have shapes and no values."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Answering(TorchDispatchMode):
    """Answers `value` where code asks a tensor without values for one: whether a mask masks nothing, for example."""

    def __init__(self, value: bool) -> None:
        super().__init__()
        self.value = value

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.full((), self.value, dtype=args[0].dtype, device="cpu").item()
        return func(*args, **(kwargs or {}))
