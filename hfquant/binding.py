"""The short way from a layer to its kernel, for inference: what can be looked up once is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .compiled import are_operators_watched
from .kernel import Bound, Kernel, best, dtype_inside, rotate
from .spec import PackedSpec


class Binding:
    """The kernel of one layer, bound to its packed tensors until another kernel is chosen or one of them changes.

    Copies start unbound: a binding holds addresses.
    """

    def __init__(self) -> None:
        self._to: tuple[Any, ...] | None = None
        self._run: Bound | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        return Binding()

    def __reduce__(self) -> tuple[type[Binding], tuple[()]]:
        return Binding, ()

    def run(self, x: Tensor, packed: list[Tensor], bias: Tensor | None, key: str) -> Tensor | None:
        """y [..., N] of `x` [..., K], or None if the kernel has nothing to bind. Raises like `run_linear`."""
        _, bound = self.bound(x, packed, key)
        return None if bound is None else bound(x, packed, bias)

    def bound(self, x: Tensor, packed: list[Tensor], key: str) -> tuple[Kernel, Bound | None]:
        """The kernel for inputs like `x` [..., K], and what runs them: None if it has nothing to bind.

        Raises like `run_linear`.
        """
        kernel = best(key, x.device, dtype_inside(PackedSpec.parse(key), x.dtype))
        if kernel.bind is None:
            return kernel, None
        to = _state(kernel, packed, key)
        if to != self._to:
            self._run, self._to = _bound(kernel, packed, PackedSpec.parse(key)), to
        return kernel, self._run


class Bindings:
    """The same for a stack of weights [E, N, K] that mean the same: each is bound when it is first needed."""

    def __init__(self) -> None:
        self._bound: tuple[tuple[Any, ...], dict[int, Bound]] = (), {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Bindings:
        return Bindings()

    def __reduce__(self) -> tuple[type[Bindings], tuple[()]]:
        return Bindings, ()

    def bounds(
        self, x: Tensor, packed: list[Tensor], key: str, numbers: Sequence[int]
    ) -> tuple[Kernel, list[Bound] | None]:
        """Like `Binding.bound` for the weights with these `numbers`; `packed` are the stacks [E, ...]."""
        spec = PackedSpec.parse(key)
        kernel = best(key, x.device, dtype_inside(spec, x.dtype))
        if kernel.bind is None:
            return kernel, None
        to, known = self._bound
        if to != (now := _state(kernel, packed, key)):
            known = {}
            self._bound = now, known
        missing = [number for number in numbers if number not in known]
        known.update((number, _bound(kernel, [tensor[number] for tensor in packed], spec)) for number in missing)
        return kernel, [known[number] for number in numbers]


def _state(kernel: Kernel, packed: list[Tensor], key: str) -> tuple[Any, ...]:
    return kernel, key, *[(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in packed]


def is_plain(x: Tensor) -> bool:
    """Whether nobody watches operators here: no gradients, no compiler, no tracer, no tensor subclass."""
    return (
        type(x) is Tensor
        and not torch.is_grad_enabled()
        and not are_operators_watched(x)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _bound(kernel: Kernel, packed: list[Tensor], spec: PackedSpec) -> Bound:
    assert kernel.bind is not None
    if not spec.rotated:
        return kernel.bind(packed, spec)
    run = kernel.bind(packed, replace(spec, rotated=False))
    return lambda x, packed, bias: run(rotate(x, spec), packed, bias).to(x.dtype)
