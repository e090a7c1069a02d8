"""A dequantized weight that writes back: what PEFT sees as `base_layer.weight`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class WeightView(torch.Tensor):
    """A detached dequantized weight [N, K]; assigning `.data` quantizes the new values into the layer it came from.

    Without the write-through, `weight.data += delta` (PEFT's merge) would change a temporary and lose the adapter.
    Operations on it give plain tensors.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _write: Callable[[Tensor], None]

    @staticmethod
    def of(values: Tensor, write: Callable[[Tensor], None]) -> WeightView:
        """Wrap `values` [N, K]; `write` receives what is assigned to `.data`."""
        view = torch.Tensor._make_subclass(WeightView, values.detach())
        view._write = write
        return view

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The values as a plain tensor."""
        return torch.Tensor._make_subclass(torch.Tensor, self)

    @data.setter
    def data(self, values: Tensor) -> None:
        self._write(values)
