"""Layers that read one tensor run in one call of the kernel, without anyone telling which layers these are.

Query, key and value projections are three modules that are called with the very same tensor, one after the other; so
are the two halves of a gated MLP. The children of a module watch which of them read a tensor. When the first of them
gets the next one, all of them are computed at once, and the others find their results ready. Each layer keeps its own
tensors; results are those of separate calls, to the last bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .binding import Binding
from .kernel import forced_kernel

Marks = tuple[str, list[tuple[int, int]]]

FEW_ROWS = 16  # of inputs: with more of them products take so long that the way to them does not count


class Layer(Protocol):
    """What `Together` needs of a layer."""

    key: str
    out_features: int
    _parameters: dict[str, Any]
    _binding: Binding

    def packed(self) -> list[Tensor]:
        """Its packed tensors."""
        ...


class Together:
    """What the packed children of one module know about who reads what; each calls `take` first.

    Copies know nothing yet and learn from their own layers.
    """

    def __init__(self) -> None:
        self._round: _Round | None = None
        self._readers: dict[int, tuple[int, ...]] = {}  # by the first one: who read its last input
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._layers: dict[int, weakref.ref[Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Together:
        memo[id(self)] = made = Together()
        return made

    def __reduce__(self) -> tuple[type[Together], tuple[()]]:
        return Together, ()

    def take(self, number: int, layer: Layer, x: Tensor) -> Tensor | None:
        """What `layer`, the child with this number, makes of `x` [..., K], if that is known; else it computes itself.

        Only for what nobody watches (`is_plain`). Safe in several threads: each sees whole rounds or none.
        """
        if x.numel() > FEW_ROWS * x.shape[-1]:
            return None
        now = self._round
        try:
            if now is None or number in now.came or not now.is_about(x):
                return self._start(now, number, layer, x)
            self._meet(number, layer)
            now.came.append(number)
            found = now.ready.pop(number, None)
            return None if found is None or found[1] != _marks(layer) else found[0]  # changed by somebody in between
        except _Uncounted:
            return None

    def seen(self) -> list[tuple[int, ...]]:
        """The numbers of the children that read one tensor, as far as that was seen."""
        last = self._round
        readers = {**self._readers, last.came[0]: tuple(last.came)} if last is not None else self._readers
        return [numbers for numbers in readers.values() if len(numbers) > 1]

    def _start(self, last: _Round | None, number: int, layer: Layer, x: Tensor) -> Tensor | None:
        """A tensor that `layer` is the first to read: compute for it and all others that read the last one."""
        if last is not None:
            self._readers[last.came[0]] = tuple(last.came)
        self._meet(number, layer)
        now = self._round = _Round(number, x)
        readers = self._readers.get(number, ())
        layers = [one for reader in readers if (one := self._layers[reader]()) is not None]
        if len(layers) == len(readers) > 1:
            plan = self._plans.get(readers)
            if plan is None or not plan.fits(layers, x):
                plan = self._plans[readers] = _Plan(layers, x)
            if plan.run is not None:
                now.ready.update(zip(readers, zip(plan.run(x), plan.marks, strict=True), strict=True))
        found = now.ready.pop(number, None)
        return None if found is None else found[0]

    def _meet(self, number: int, layer: Layer) -> None:
        known = self._layers.get(number)
        if known is None or known() is not layer:
            self._layers[number] = weakref.ref(layer)


class _Uncounted(Exception):
    """A layer has inference tensors, whose changes are not counted."""


class _Round:
    """One input: who read it, in order, and the results that wait for those who have not yet.

    It keeps no input alive, and results only as long as their input lives.
    """

    __slots__ = ("_forced", "_of", "_values", "_version", "came", "ready")

    def __init__(self, first: int, x: Tensor) -> None:
        self.came = [first]
        self.ready: dict[int, tuple[Tensor, Marks]] = {}
        ready = self.ready
        self._of = weakref.ref(x, lambda _: ready.clear())
        self._forced = forced_kernel()
        # Inference tensors do not count the changes made to them: their values are compared.
        self._values = x.clone() if x.is_inference() else None
        self._version = 0 if x.is_inference() else x._version

    def is_about(self, x: Tensor) -> bool:
        """Whether this is the very same tensor with the same values, for the same kernel."""
        if self._of() is not x or self._forced != forced_kernel():
            return False
        return x._version == self._version if self._values is None else torch.equal(x, self._values)


class _Plan:
    """How some layers are run at once, as they are now; `marks` are theirs. `run(x)` is None if they cannot be."""

    def __init__(self, layers: list[Layer], x: Tensor) -> None:
        self._for = _circumstances(x)
        self.marks = [_marks(layer) for layer in layers]
        self.run: Callable[[Tensor], list[Tensor]] | None = None
        bounds, kernels = [], []
        for layer in layers:
            packed = layer.packed()
            if any(tensor.device != x.device for tensor in packed):
                return
            kernel, bound = layer._binding.bound(x, packed, layer.key)
            if bound is None:
                return
            bounds.append(bound)
            kernels.append(kernel)
        join = kernels[0].join
        if join is not None and all(kernel is kernels[0] for kernel in kernels):
            self.run = join(bounds, [layer._parameters["bias"] for layer in layers])

    def fits(self, layers: list[Layer], x: Tensor) -> bool:
        """Whether nothing has changed since."""
        return self._for == _circumstances(x) and self.marks == [_marks(layer) for layer in layers]


def _circumstances(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.device, forced_kernel()


def _marks(layer: Layer) -> Marks:
    """What the tensors of a layer mean, where they lie, and how often they were changed.

    Raises _Uncounted if nobody counts.
    """
    try:
        held = [tensor for tensor in layer._parameters.values() if tensor is not None]
        return layer.key, [(tensor.data_ptr(), tensor._version) for tensor in held]
    except RuntimeError as error:
        raise _Uncounted from error
