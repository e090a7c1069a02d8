"""Columns: which input columns of a weight are kept in 16 bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .errors import SpecError
from .qtensor import Outliers
from .spec import TensorSpec
from .stats import Stats
from .tables import Table


class Columns(Protocol):
    """Chooses input columns of a weight [N, K]."""

    def __call__(self, w: Tensor, spec: TensorSpec, stats: Stats, /, **options: Any) -> Tensor:
        """Returns sorted column numbers [k] int64, possibly none."""


COLUMNS: Table[Columns] = Table("columns")

F = TypeVar("F", bound=Callable[..., Tensor])


def needs_producers(fn: F) -> F:
    """Mark a function that reads `stats.producer_std`, which takes a look at the whole model to find."""
    vars(fn)["needs_producers"] = True
    return fn


def wants_producers(name: str) -> bool:
    """Whether the columns function `name` is marked with `needs_producers`."""
    return getattr(COLUMNS.get(name), "needs_producers", False)


def none(w: Tensor, spec: TensorSpec, stats: Stats) -> Tensor:
    """No column: everything is quantized."""
    return torch.empty(0, dtype=torch.int64, device=w.device)


@needs_producers
def proxy(w: Tensor, spec: TensorSpec, stats: Stats, fraction: float = 0.02) -> Tensor:
    """The `fraction` of columns whose producing weights spread most (standard deviation of the previous layer's rows).

    Needs no data. Source: "The case for 4-bit precision" (Dettmers and Zettlemoyer 2023), section 3, eq. 2.
    """
    if not 0 < fraction < 1:
        raise SpecError(f"the fraction of outlier columns is between 0 and 1, got {fraction}")
    if stats.producer_std is None:
        raise SpecError(f"proxy outliers of {stats.name}: the layer that produces its input was not found in the model")
    count = math.ceil(fraction * w.shape[1])
    return stats.producer_std.to(w.device).topk(count).indices.sort().values


def take_outliers(w: Tensor, index: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Outliers | None]:
    """Split `w` [N, K]: the matrix with the columns `index` [k] set to 0, and these columns in 16 bit.

    float32 weights become bfloat16, which keeps their range; 16-bit weights are kept exactly. `dtype`: of the weights
    before they were rotated, if they were.
    """
    if index.numel() == 0:
        return w, None
    dtype = dtype or w.dtype
    dtype = dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    kept = Outliers(index.to(torch.int32), w[:, index].to(dtype).contiguous())
    return w.index_fill(1, index, 0), kept


BUILTIN: dict[str, Callable[..., Tensor]] = {"none": none, "proxy": proxy}
