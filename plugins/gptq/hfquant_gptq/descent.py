"""Coordinate descent: rounding each column once more, now that the errors of all others are known."""

from __future__ import annotations

import torch
from torch import Tensor

from .columnwise import RoundColumn


def descend(
    weight: Tensor,
    errors: Tensor,
    codes: Tensor,
    lower: Tensor,
    pivots: Tensor,
    round_column: RoundColumn,
    blocks: Tensor,
    block_size: int,
) -> None:
    """One pass over the columns that lowers tr(D H D^T) or leaves it; `errors` and `codes` are changed in place.

    All in processing order and transposed: `weight` and `errors` D^T [K, N], `codes` [K, N] uint8. H = L^T S^2 L comes
    as `lower` L [K, K] and `pivots` S [K]; `blocks` [K] int64 says which block of its row a column belongs to. As a
    function of one column of codes the loss is a parabola, with its lowest point at q_j + (D H)_j / H_jj; the level
    nearest to it is taken.
    """
    index, residual = blocks.tolist(), lower @ errors  # the loss is the sum of squares of S * residual
    for left in range(0, len(weight), block_size):
        right = min(left + block_size, len(weight))
        part = lower[left:, left:right]
        scaled = part * pivots[left:, None].square()
        slope, hessian = scaled.T @ residual[left:], scaled.T @ part
        moved = torch.zeros_like(slope)
        for at, j in enumerate(range(left, right)):
            present = weight[j] - errors[j]
            pull = torch.addmv(slope[at], moved[:at].T, hessian[at, :at]) if at else slope[at]
            codes[j], value = round_column((present + pull / hessian[at, at]).float(), index[j])
            moved[at] = present - value
            errors[j] = weight[j] - value
        residual[left:].addmm_(part, moved)
