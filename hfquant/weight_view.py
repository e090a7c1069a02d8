"""A dequantized weight that writes back: what PEFT sees as `base_layer.weight`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class WeightView(torch.Tensor):
    """A detached dequantized weight [N, K]; what is written to it is quantized into the layer it came from.

    Both ways to write count: assigning `.data`, and changing the values in place, as in `weight.data += delta` (most of
    PEFT's merges) or `weight.data.copy_(new)` (OFT's). Otherwise they would change a temporary and lose the adapter.
    Operations on it give plain tensors.
    """

    _write: Callable[[Tensor], None]

    # transformers fills what lacks this mark with random values; GPT-2 does so to the weights of its children.
    _is_hf_initialized = True

    @staticmethod
    def of(values: Tensor, write: Callable[[Tensor], None]) -> WeightView:
        """Wrap `values` [N, K]; `write` receives the new values."""
        if values.is_inference():  # these do not count the changes made to them
            with torch.inference_mode(False):
                values = values.clone()
        view = torch.Tensor._make_subclass(WeightView, values.detach())
        view._write = write
        return view

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run `func`, and write back the views that it has changed."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            views = [(view, view._version) for view in (*args, *kwargs.values()) if isinstance(view, WeightView)]
            out = func(*args, **kwargs)
            for view, version in views:
                if view._version != version:
                    view._write(view._plain())
        return out

    def _plain(self) -> Tensor:
        return torch.Tensor._make_subclass(torch.Tensor, self)

    @property
    def data(self) -> WeightView:
        """The view itself: its changes in place count as well."""
        return self

    @data.setter
    def data(self, values: Tensor) -> None:
        if values is not self:  # `+=` assigns what it has changed in place, which is written already
            self._write(values._plain() if isinstance(values, WeightView) else values)
