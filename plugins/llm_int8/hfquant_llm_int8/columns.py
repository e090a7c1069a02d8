"""Which weight columns are kept in 16 bit: those that int8 cannot represent, and those that calibration found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hfquant.blocks import row_chunks
from hfquant.errors import SpecError
from hfquant.ranges import absmax
from hfquant.scales import round_to
from hfquant.spec import TensorSpec
from hfquant.stats import Stats

# The error of 4-bit weights: 64 normal values reach 2.4 sigma, so a step of 2.4 / 7 sigma leaves 0.10 sigma. A column
# that is worse than this does not have 8-bit precision in any useful sense; usual ones have an error of 0.01.
DAMAGED = 0.1
# Columns are the cure when a few are far worse than the others, not when rows with large weights spoil all of them.
ABOVE_MEDIAN = 4.0


def keep_columns(
    w: Tensor,
    spec: TensorSpec,
    stats: Stats,
    outliers: Mapping[str, Sequence[int]] | None = None,
    every: bool = False,
) -> Tensor:
    """Columns [k] int64, sorted, of a weight [N, K] to keep in 16 bit.

    Those whose relative error in `spec` is above `DAMAGED` and above `ABOVE_MEDIAN` times the median, which is less
    than half of them: a column far smaller than its rows' largest weights rounds to nothing, and the inputs that go
    with it are often large. `outliers`: more columns by the name of the layer. `every`: all of them.
    Raises SpecError when `outliers` lacks this layer or names columns that it does not have.
    """
    if every:
        return torch.arange(w.shape[1], device=w.device)
    error = relative_error(w, spec, stats)
    damaged = (error > DAMAGED) & (error > ABOVE_MEDIAN * error.median())
    if outliers is not None:
        damaged[_listed(outliers, stats.name, w.shape[1])] = True
    return damaged.nonzero().flatten()


def relative_error(w: Tensor, spec: TensorSpec, stats: Stats) -> Tensor:
    """Norm of the rounding error over the norm, for each column of `w` [N, K]: [K] float64, 0 for empty columns."""
    shape = (w.shape[0], w.shape[1])
    params = absmax(w, spec, stats)
    error = torch.zeros(shape[1], dtype=torch.float64, device=w.device)
    power = torch.zeros_like(error)
    for rows in row_chunks(shape):
        part, scale = w[rows].float(), spec.blocks.expand(params.scale, shape, rows)
        change = round_to(part, scale, None, params.grid).sub_(part)
        error += change.double().square().sum(0)
        power += part.double().square().sum(0)
    return torch.where(power > 0, error / power, 0).sqrt()


def _listed(outliers: Mapping[str, Sequence[int]], layer: str, width: int) -> list[int]:
    """The columns listed for a layer; an expert's layer is listed once for all experts."""
    name = layer.partition("[")[0]
    if name not in outliers:
        raise SpecError(
            f"outliers have no entry for {name}: find them on the same model class, or list its columns ([] for none). "
            "find_outliers does not see inside fused experts"
        )
    columns = [int(column) for column in outliers[name]]
    if beyond := [column for column in columns if not 0 <= column < width]:
        raise SpecError(f"outliers of {name} name columns {beyond}, but it has the columns 0 to {width - 1}")
    return columns
