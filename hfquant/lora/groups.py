"""Columns that share a zero point, and parameters that an optimizer keeps constant within them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..nn import QLinear


@dataclass(frozen=True)
class Groups:
    """Which columns of a weight [N, K] share a zero point: `of_column` [K] int64, C for columns kept in 16 bit.

    `columns` [C, W] int64 are those of each group, filled up with K; `counts` [C] float64 how many there are.
    """

    of_column: Tensor
    columns: Tensor
    counts: Tensor

    @classmethod
    def of(cls, module: QLinear) -> Groups:
        """The groups of a layer: of the order in which its columns are stored."""
        spec = module.spec
        tensors = dict(zip(spec.names, module.packed(), strict=True))
        (_, count), width = spec.scheme.weight.blocks.counts(spec.shape), spec.scheme.weight.blocks.sides(spec.shape)[1]
        place = torch.arange(spec.shape[1], device=tensors["codes"].device)
        column = tensors["order"].long() if "order" in tensors else place
        of_column = torch.empty_like(place).index_copy_(0, column, place // width)
        if "outlier_index" in tensors:
            of_column[tensors["outlier_index"].long()] = count
        columns = torch.full((count * width,), spec.shape[1], device=place.device)
        columns[place] = torch.where(of_column[column] < count, column, spec.shape[1])
        columns = columns.view(count, width).sort(1).values  # what is missing comes last
        return cls(of_column, columns, (columns < spec.shape[1]).sum(1).double())

    def spread(self, values: Tensor) -> Tensor:
        """[r, K] with the value of its group, `values` [r, C], in each column; 0 in columns kept in 16 bit."""
        return nn.functional.pad(values, (0, 1))[:, self.of_column]

    def first(self, a: Tensor) -> Tensor:
        """The first column [r, C] of each group of `a` [r, K]; 0 where none is left of it."""
        return nn.functional.pad(a, (0, 1))[:, self.columns[:, 0]]

    def chosen(self, a: Tensor) -> Tensor:
        """`a` [r, K] with the first column of each group in all of them."""
        return self.spread(self.first(a))

    def averaged(self, a: Tensor) -> Tensor:
        """`a` [r, K] with the mean of its group in each column; in float64, so that equal numbers stay as they are."""
        means = nn.functional.pad(a, (0, 1))[:, self.columns].double().sum(-1) / self.counts.clamp_min(1)
        return self.spread(means.to(a.dtype))


class _Average:
    """Gradient hook: the mean over each group, in all of its columns."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    def __call__(self, grad: Tensor) -> Tensor:
        return self.groups.averaged(grad)


def _hooks(weight: Tensor) -> dict[int, _Average]:
    """The hooks of ours among those of a parameter."""
    hooks = getattr(weight, "_backward_hooks", None) or {}
    return {number: hook for number, hook in hooks.items() if isinstance(hook, _Average)}


def keep_constant(weight: nn.Parameter, groups: Groups) -> None:
    """Average gradients of `weight` [r, K] within groups from now on, and itself after each step of an optimizer.

    A second call replaces the first one; what is not trained is left alone.
    """
    for number in _hooks(weight):
        weight._backward_hooks.pop(number)  # type: ignore[union-attr]
    if weight.requires_grad:
        _watch_optimizers()
        weight.register_hook(_Average(groups))


@lru_cache(maxsize=1)
def _watch_optimizers() -> None:
    """Look at every step from now on; only parameters with a hook of ours are touched."""
    register_optimizer_step_post_hook(_average_again)


@torch.no_grad()
def _average_again(optimizer: torch.optim.Optimizer, *args: Any) -> None:
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        for hook in _hooks(weight).values():
            weight.copy_(hook.groups.averaged(weight))
