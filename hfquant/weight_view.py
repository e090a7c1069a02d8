"""A packed weight as a tensor without storage that writes back: what PEFT sees as `base_layer.weight`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class WeightView(torch.Tensor):
    """A packed weight [N, K], dequantized when its numbers are first needed; what is written to it is quantized.

    Questions about its look (shape, dtype, device) cost nothing: PEFT asks about twenty of them for each layer. Both
    ways to write count: assigning `.data`, and changing the values in place, as in `weight.data += delta` (most of
    PEFT's merges) or `weight.data.copy_(new)` (OFT's). Otherwise they would change a temporary and lose the adapter.
    Operations on it give plain tensors.
    """

    _read: Callable[[], Tensor]
    _write: Callable[[Tensor], None]
    _held: Tensor | None = None
    _fresh = 0  # version of the values when they were read

    # transformers fills what lacks this mark with random values; GPT-2 does so to the weights of its children.
    _is_hf_initialized = True

    @staticmethod
    def of(
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        read: Callable[[], Tensor],
        write: Callable[[Tensor], None],
    ) -> WeightView:
        """A view of that look; `read` gives the values, once, and `write` receives new ones."""
        with torch.inference_mode(False):  # tensors of that mode do not count the changes made to them
            view: WeightView = torch.Tensor._make_wrapper_subclass(WeightView, shape, dtype=dtype, device=device)
        view._read, view._write = read, write
        return view

    def dense(self) -> Tensor:
        """The values as a plain tensor, the same at every call."""
        if self._held is None:
            with torch.inference_mode(False), torch.no_grad():
                self._held = self._read()
            self._fresh = self._held._version
        return self._held

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run `func`, and write back the views that it has changed."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            views = [(view, view._changes()) for view in (*args, *kwargs.values()) if isinstance(view, WeightView)]
            if func.__name__ in _OF_MEMORY:
                args, kwargs = _plain((args, kwargs))
            out = func(*args, **kwargs)
            for view, changes in views:
                if view._changes() != changes:
                    view._write(view.dense())
        return out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every operation that needs numbers."""
        args, kwargs = _plain((args, kwargs or {}))
        return func(*args, **kwargs)

    def _changes(self) -> int:
        """How often it, or its values, were changed in place."""
        return self._version + (0 if self._held is None else self._held._version - self._fresh)

    @property
    def data(self) -> WeightView:
        """The view itself: its changes in place count as well."""
        return self

    @data.setter
    def data(self, values: Tensor) -> None:
        if values is not self:  # `+=` assigns what it has changed in place, which is written already
            self._write(_plain(values))


# What torch computes from the storage of a tensor, and not by operations.
_OF_MEMORY = {
    *("__array__", "__deepcopy__", "__dlpack__", "__reduce_ex__", "__repr__", "__setitem__"),
    *("data_ptr", "numpy", "storage", "tolist", "untyped_storage", "_typed_storage"),
}


def _plain(tree: Any) -> Any:
    """The same with values in the place of views."""
    return tree_map_only(WeightView, WeightView.dense, tree)
