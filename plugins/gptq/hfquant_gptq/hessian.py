"""The Hessian of a layer's output error: order of its columns, damping, and the factor that all feedback follows from.

With H = E[x x^T] the expected squared error of the outputs is tr(D H D^T), D = W - Q. Columns are processed in some
order; in this order H = L^T S^2 L with L unit lower triangular and S diagonal, so the loss is a sum over the columns,

    tr(D H D^T) = sum_j S_j^2 |D_j + sum_{i<j} L_ji D_i|^2,

and each column is best off at the value nearest to w_j + sum_{i<j} L_ji D_i, once the columns before it are fixed. The
same follows from the inverse, as it is usually written: U with H^-1 = U^T U has U_jj = 1 / S_j.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hfquant.stats import InputStats

from .cholesky import permute_, reverse_cholesky_

ORDERS = ("group", "static", "none")
_LADDER_START = 0.01  # the damping tried first where none was asked for and none does not work


@dataclass(frozen=True)
class Factor:
    """H = L^T S^2 L for the columns in processing order.

    `order` [K] int64: position -> column. `lower` [K, K] float64: L, unit lower triangular. `pivots` [K] float64: the
    diagonal of S. `remedies`: what had to be done to H, for the report.
    """

    order: Tensor
    lower: Tensor
    pivots: Tensor
    remedies: tuple[str, ...] = ()


def factorize(inputs: InputStats, w: Tensor, actorder: str, group: int, damping: float) -> Factor | None:
    """The factor for a weight [N, K] that reads `inputs`, whose columns share scales in runs of `group`.

    Layers that read the same input share the result, if the same columns of their weights are empty. None if H cannot
    be factorized with any damping.
    """
    empty = (w == 0).all(0).to(inputs.square_sum.device)
    key = ("gptq", actorder, group, damping, str(w.device), tuple(empty.nonzero().flatten().tolist()))
    if key not in inputs.memo:
        inputs.memo[key] = _factorize(inputs, empty, actorder, group, damping, w.device)
    found: Factor | None = inputs.memo[key]
    return found


def _factorize(
    inputs: InputStats, empty: Tensor, actorder: str, group: int, damping: float, device: torch.device
) -> Factor | None:
    assert inputs.gram is not None
    place = device if device.type != "mps" else torch.device("cpu")  # MPS has no float64
    diagonal = inputs.gram.diagonal()
    dead = diagonal == 0
    idle = (dead | empty).nonzero().flatten().to(place)
    order = processing_order(diagonal, actorder, group).to(place)
    # The largest matrix of all by far: everything is done to it in place.
    h = inputs.take_gram().to(place).div_(inputs.tokens)
    # Columns without error or effect: the others must not count on them to make up for their errors.
    h[idle], h[:, idle] = 0, 0
    h.diagonal()[idle] = _mean_of_others(h.diagonal(), idle.numel())
    permute_(h, order)
    remedies = []
    if count := int(dead.sum()):
        remedies.append(f"{count} input channels are 0 in all calibration data: their weights are rounded to nearest")
    undamped = h.diagonal().clone()
    for share in ladder(damping):
        h.diagonal().copy_(undamped + share * undamped.mean())
        if reverse_cholesky_(h):
            pivots = h.diagonal().clone()
            if share != damping:
                remedies.append(
                    f"damping was raised from {damping} to {share}: the Hessian of {inputs.tokens} tokens is singular"
                )
            return Factor(order, h.div_(pivots[:, None]), pivots, tuple(remedies))
    return None


def _mean_of_others(diagonal: Tensor, zeros: int) -> Tensor:
    """Mean of a diagonal [K] of which `zeros` elements are 0 and do not count; 1 if none is left."""
    left = diagonal.numel() - zeros
    return diagonal.sum() / left if left else torch.ones_like(diagonal.sum())


def ladder(damping: float) -> Iterator[float]:
    """The shares of the mean diagonal to try as damping: doubled up to 1."""
    yield damping
    while damping < 1:
        damping = min(max(2 * damping, _LADDER_START), 1.0)
        yield damping


def processing_order(diagonal: Tensor, actorder: str, group: int) -> Tensor:
    """Position -> column [K] int64 for the diagonal [K] of the Hessian; equal values keep the order of columns.

    "none": as they are. "static": the largest first. "group": the groups by their largest value, and the columns
    inside each group by theirs, so that groups stay whole.
    """
    if actorder == "none":
        return torch.arange(diagonal.numel(), device=diagonal.device)
    if actorder == "static":
        return diagonal.argsort(descending=True, stable=True)
    parts = diagonal.split(group)
    ranks = torch.stack([part.max() for part in parts]).argsort(descending=True, stable=True)
    return torch.cat([index * group + parts[index].argsort(descending=True, stable=True) for index in ranks.tolist()])
