"""The fused weight of packed experts as a tensor without storage: what PEFT sees as `experts.gate_up_proj`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .weight_view import WeightView


@dataclass(frozen=True)
class LowRank:
    """`scale` * `left` [E, A, r] @ `right` [E, r, B], which is added to a weight [E, A, B]."""

    left: Tensor
    right: Tensor
    scale: float

    def dense(self) -> Tensor:
        """The change [E, A, B]."""
        return self.scale * (self.left @ self.right)

    def times(self, x: Tensor, expert: int, transposed: bool) -> Tensor:
        """Product [R, N] of rows `x` [R, K] with one expert's change, by way of the rank r."""
        left, right = self.left[expert].to(x.dtype), self.right[expert].to(x.dtype)
        return self.scale * (x @ left @ right if transposed else x @ right.T @ left.T)


@dataclass(frozen=True)
class Added:
    """`values` [E, A, B], which are added to a weight of this shape: several adapters at once."""

    values: Tensor

    def dense(self) -> Tensor:
        """The change [E, A, B]."""
        return self.values

    def times(self, x: Tensor, expert: int, transposed: bool) -> Tensor:
        """As of `LowRank`."""
        values = self.values[expert].to(x.dtype)
        return x @ (values if transposed else values.T)


class ExpertsView(torch.Tensor):
    """A packed weight [E, A, B] with the `changes` that adapters make to it; nothing is computed before it is used.

    Adding a change, as a tensor or by `torch.baddbmm`, gives another view; every other operation sees a plain tensor of
    the dequantized and changed values. New values that are assigned to `.data`, or made there in place, are quantized.
    """

    changes: tuple[LowRank | Added, ...]
    _read: Callable[[], Tensor]
    _write: Callable[[Tensor], None]
    _handed_out: WeightView | None = None

    _is_param = True  # parametrizations put it back where parameters are
    _is_hf_initialized = True  # as of `WeightView`

    @staticmethod
    def of(
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        read: Callable[[], Tensor],
        write: Callable[[Tensor], None],
        changes: tuple[LowRank | Added, ...] = (),
    ) -> ExpertsView:
        """A view of that look; `read` gives the values, `write` receives new ones."""
        view: ExpertsView = torch.Tensor._make_wrapper_subclass(ExpertsView, shape, dtype=dtype, device=device)
        view._read, view._write, view.changes = read, write, changes
        return view

    @property
    def data(self) -> WeightView:
        """The values, which write back what is changed in them."""
        read, changes = self._read, self.changes  # a view that knew this one would be freed late
        self._handed_out = WeightView.of(*self._look(), lambda: _dense(read(), changes), self._write)
        return self._handed_out

    @data.setter
    def data(self, values: Tensor) -> None:
        if values is not self._handed_out:  # `+=` assigns what it has changed in place, which is written already
            self._write(values.dense() if isinstance(values, WeightView) else values)

    def dense(self) -> Tensor:
        """The values [E, A, B] with all changes."""
        return _dense(self._read(), self.changes)

    def changed(self, change: LowRank | Added) -> ExpertsView:
        """This weight with one more change."""
        return ExpertsView.of(*self._look(), self._read, self._write, (*self.changes, change))

    def _look(self) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
        with torch._C.DisableTorchFunctionSubclass():
            return tuple(self.shape), self.dtype, self.device

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ExpertsView(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Collect changes; leave questions about the look to torch; give everything else plain values."""
        kwargs = kwargs or {}
        if (view := _changed(func, args, kwargs)) is not None:
            return view
        if _sets_itself(func, args):
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ in _LOOK:
                return func(*args, **kwargs)
        return func(*(_plain(arg) for arg in args), **{name: _plain(arg) for name, arg in kwargs.items()})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Only what `__torch_function__` lets through arrives here, and what torch does not ask it about."""
        if _sets_itself(func, args):
            return args[0]
        return func(*(_plain(arg) for arg in args), **(kwargs or {}))


def _dense(values: Tensor, changes: tuple[LowRank | Added, ...]) -> Tensor:
    for change in changes:
        values = values + change.dense().to(values.dtype)
    return values


_LOOK = ("__get__", "__set__", "requires_grad_", "size", "dim", "numel", "is_floating_point", "is_complex")


def _sets_itself(func: Any, args: tuple) -> bool:
    """Whether this sets a tensor to itself, as parametrizations do."""
    return func.__name__.startswith("set_") and len(args) == 2 and args[0] is args[1]


def _plain(value: Any) -> Any:
    if isinstance(value, ExpertsView):
        return value.dense()
    return type(value)(_plain(item) for item in value) if type(value) in (list, tuple) else value


def _changed(func: Any, args: tuple, kwargs: dict[str, Any]) -> ExpertsView | None:
    """The view that an operation makes of its first operand, or None if it does something else."""
    if not args or type(args[0]) is not ExpertsView:
        return None
    weight, *others = args
    if func is torch.baddbmm and len(others) == 2 and set(kwargs) <= {"alpha"}:
        return weight.changed(LowRank(others[0], others[1], float(kwargs.get("alpha", 1))))
    if func in _ADDITIONS and len(others) == 1 and not kwargs and type(others[0]) is Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            fits = others[0].shape == weight.shape
        return weight.changed(Added(others[0])) if fits else None
    return None


_ADDITIONS = (torch.add, torch.Tensor.add, torch.Tensor.__add__)


class Parameters(dict):
    """A module's parameters, and names in `shown` that are views: found when asked for, absent from every listing.

    Parametrizations ask for a parameter by its name, take it away and put it back. Whatever goes through all parameters
    (state dicts, moves, optimizers, counts) must not see a weight twice.
    """

    def __init__(self, held: dict[str, Any]) -> None:
        super().__init__(held)
        self.shown: set[str] = set()

    def shows(self, name: str) -> bool:
        """Whether that name stands for a view now."""
        return name in self.shown and not super().__contains__(name)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.shown

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(value, ExpertsView):
            self.shown.add(name)
        else:
            super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        if self.shows(name):
            self.shown.remove(name)
        else:
            super().__delitem__(name)


def asked_by(package: str) -> bool:
    """Whether the function that calls this one was called from `package`: PEFT finds what to adapt in listings."""
    name = sys._getframe(2).f_globals.get("__name__", "")
    return name == package or name.startswith(f"{package}.")
