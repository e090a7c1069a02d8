"""What a call of a layer with quantized inputs does around its product, whichever numbers the product has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hfquant.spec import PackedSpec

from . import launch
from .plans import Plan, Plans

PlanOf = Callable[[PackedSpec, int, launch.Hardware], Plan]


def bound(
    packed: list[Tensor], spec: PackedSpec, needed: dict[str, int], plan_of: PlanOf, product: Callable[..., None]
) -> launch.Bound:
    """(x [..., K], packed, bias) -> y [..., N] in the dtype of `x`, for one weight whose tensors have `needed` entries.

    `product(rows, tensors, bias, y, plan=plan)` writes `y` [M, N] for rows [M, K], M > 0, in the stored order of
    columns. Raises FormatError for tensors that are too short.
    """
    (n, k) = spec.shape
    launch.check_lengths(dict(zip(spec.names, packed, strict=True)), needed)
    plans = Plans(lambda m, device: plan_of(spec, m, launch.hardware(device)))

    def run(x: Tensor, packed: list[Tensor], bias: Tensor | None) -> Tensor:
        tensors, rows = _named(packed, spec), _rows_of(x, k)
        if "order" in tensors:
            rows = rows.index_select(-1, tensors["order"])
        y = torch.empty(rows.shape[0], n, dtype=x.dtype, device=x.device)
        if rows.shape[0]:
            product(rows, tensors, bias, y, plan=plans.get(rows.shape[0], x.device))
        return y.reshape(*x.shape[:-1], n)

    return run


def _named(packed: list[Tensor], spec: PackedSpec) -> dict[str, Tensor]:
    """Packed tensors by name and without gaps: part of a tensor, as each process of several holds it, may have some."""
    return {name: tensor.contiguous() for name, tensor in zip(spec.names, packed, strict=True)}


def _rows_of(x: Tensor, k: int) -> Tensor:
    """`x` [..., K] as a matrix whose rows have no gaps inside. Raises RuntimeError for another K."""
    if x.shape[-1] != k:
        raise RuntimeError(f"a weight with {k} columns cannot take an input of shape {tuple(x.shape)}")
    rows = x.reshape(-1, k)
    return rows if rows.stride(-1) == 1 else rows.contiguous()
