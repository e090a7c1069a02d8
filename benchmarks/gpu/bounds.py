"""How far a result is from that of the reference, and how far it may be."""

from __future__ import annotations

import torch
from torch import Tensor

from hfquant.nn import QLinear

# Of the norm of the result, for each time that numbers are rounded to the dtype.
BOUND = {torch.bfloat16: 3e-3, torch.float16: 6e-4, torch.float32: 1e-5}
GRADIENT = 2  # each weight is scaled and rounded before the product
FLOAT8_SUMS = 2.0**-10  # more where float8 instructions add up: their sums have about 14 bits


def distance(y: Tensor, exact: Tensor) -> float:
    """Norm of the difference over that of the exact result; NaN counts as infinitely far."""
    if not y.numel():
        return 0.0
    found = float((y.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300))
    return found if found == found else float("inf")


def roundings(layer: QLinear, dtype: torch.dtype) -> int:
    """How often numbers of a product are rounded to `dtype`: the result, a level, a weight that is scaled before."""
    if dtype == torch.float32 or layer.spec.scheme.input is not None:
        return 1
    q = layer.qtensor()
    levels = q.spec.numbers().levels() if q.levels is None else q.levels
    group = q.spec.blocks.sides(q.shape)[1]
    return 1 + int(not torch.equal(levels, levels.to(dtype).float())) + int(group % 16 != 0 and group < q.shape[1])


def bound(layer: QLinear, dtype: torch.dtype, is_gpu: bool) -> float:
    """How far a result may be from that of the reference, as a share of its norm."""
    more = FLOAT8_SUMS if is_gpu and layer.spec.layout == "float8" else 0
    return BOUND[dtype] * roundings(layer, dtype) + more
