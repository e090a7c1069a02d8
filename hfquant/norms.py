"""Norms of a model: which matrices read their output, what their gain is, and whether they may be rotated.

All of it is found by running the norm, so that no architecture has to be listed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import row_chunks
from .hadamard import hadamard
from .matrices import Group, Matrix, Source, first_tensor, identity, trace

_TOKENS = 4  # of a probe
_LARGE = 1e3  # size of a probe: large enough for the epsilon of a norm to vanish
_TOLERANCE = 1e-3


@dataclass(eq=False)
class Norm:
    """A norm of `features` channels that was called: `readers` are the matrices that read its output.

    `source`: identity of the tensor that it was called with. `name`: in the model.
    """

    name: str
    module: nn.Module
    features: int
    source: Source
    readers: list[Matrix] = field(default_factory=list)

    def gain(self) -> Tensor | None:
        """The parameter [features] itself that holds the gain, or None."""
        found = self.module._parameters.get("weight")
        return None if found is None else found.data


def find_norms(prefix: str, root: nn.Module, run: Callable[[], Any]) -> tuple[list[Norm], list[Group]]:
    """The norms that `run` calls inside `root` (named `prefix` in the model), and the groups of matrices it calls."""
    with _vectors_seen(prefix, root) as calls:
        groups = trace(prefix, root, (), run)
        sources = {source: norm for norm, source in reversed(calls)}
    for group in groups:
        if group.source in sources:
            sources[group.source].readers += group.matrices
    norms = {id(norm): norm for norm, _ in calls if is_norm(norm)}
    return list(norms.values()), groups


@contextmanager
def _vectors_seen(prefix: str, root: nn.Module) -> Iterator[list[tuple[Norm, Source]]]:
    """Note each call of a module without parts that keeps the shape of its input, with the identity of its output."""
    calls: list[tuple[Norm, Source]] = []
    alive: list[Tensor] = []  # so that no two tensors have the same address

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            x = first_tensor(args, kwargs) if len(args) + len(kwargs) == 1 else None
            if x is None or not isinstance(output, Tensor) or x.shape != output.shape or not x.is_floating_point():
                return
            alive.extend((x, output))
            if identity(x) != identity(output):  # a dropout that is off gives back what it gets
                calls.append((Norm(name, module, x.shape[-1], identity(x)), identity(output)))

        return hook

    leaves = [(name, module) for name, module in root.named_modules() if not any(True for _ in module.children())]
    hooks = [
        module.register_forward_hook(note(f"{prefix}.{name}".strip(".")), with_kwargs=True)
        for name, module in leaves
        if all(parameter.dim() == 1 for parameter in module.parameters())
    ]
    try:
        yield calls
    finally:
        for handle in hooks:
            handle.remove()


def is_norm(norm: Norm) -> bool:
    """Whether the size of a token does not matter to a module."""
    run, x = _twin(norm), _probe(norm)
    y = run(x)
    return bool(y.norm() > 0) and _close(run(4 * x), y)


def why_not_rotated(norm: Norm) -> str | None:
    """Reason why a norm does not commute with rotations even when its gain is moved into its readers, or None."""
    kind = f"{norm.name} ({type(norm.module).__name__})"
    rule = "only norms that divide each token by its size can be rotated"
    if norm.module._parameters.get("bias") is not None:
        return f"{kind} adds a bias, as LayerNorm does: {rule}"
    unit = unit_gain(norm)
    if unit is None and norm.gain() is not None:
        return f"{kind} does not use its weight as a gain w or 1 + w: {rule}"
    run, x = _twin(norm, unit), _probe(norm)
    y = run(x)
    if _close(run(x + 2 * _LARGE), y):
        return f"{kind} subtracts the mean, as LayerNorm does: {rule}"
    return None if _close(run(hadamard(x)), hadamard(y)) else f"{kind} treats channels differently: {rule}"


def unit_gain(norm: Norm) -> float | None:
    """The weight that stands for a gain of one: 1.0, or 0.0 where the norm adds one to it; None if it has no gain."""
    if norm.gain() is None:
        return None
    x = _probe(norm)
    zero, one, two = (_twin(norm, value)(x) for value in (0.0, 1.0, 2.0))
    if not _close(two - one, one - zero):
        return None
    return 1.0 if bool((zero == 0).all()) else (0.0 if _close(one, 2 * zero) else None)


@torch.no_grad()
def absorb_gain(norm: Norm) -> None:
    """Multiply the columns of a norm's readers by its gain, which becomes one."""
    weight, unit = norm.gain(), unit_gain(norm)
    if weight is None or unit is None:
        return
    gain = weight.double() + (1 - unit)
    for matrix in norm.readers:
        values = matrix.values()
        for rows in row_chunks((values.shape[0], values.shape[1])):
            values[rows] = (values[rows].double() * gain).to(values.dtype)
    weight.fill_(unit)


def _probe(norm: Norm) -> Tensor:
    """Some tokens [_TOKENS, features] float32."""
    weight = norm.gain()
    x = _LARGE * torch.randn(_TOKENS, norm.features, generator=torch.Generator().manual_seed(0))
    return x if weight is None else x.to(weight.device)


def _twin(norm: Norm, weight: float | None = None) -> Callable[[Tensor], Tensor]:
    """A copy of the norm in float32 to try things with; `weight`: what its gain's parameter is everywhere."""
    twin = copy.deepcopy(norm.module).float()
    if weight is not None:
        twin._parameters["weight"].data.fill_(weight)  # type: ignore[union-attr]

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        return twin.forward(x)  # not called: hooks are no part of the norm

    return run


def _close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm()) <= _TOLERANCE * float(b.norm())
