"""The method "llm_int8": vector-wise int8 with a split for outlier columns."""

from __future__ import annotations

import math

from hfquant.blocks import Blocks
from hfquant.errors import SpecError
from hfquant.recipe import Recipe, Step
from hfquant.spec import InputSpec, Scheme, TensorSpec

_INT8 = TensorSpec("int8", Blocks(1, -1))  # one float32 scale, absmax / 127, for each output channel and each token


def llm_int8(*, threshold: float | None = 6.0, outliers: dict[str, list[int]] | None = None) -> Recipe:
    """8-bit weights and activations; input columns with large values are computed in floating point instead.

    `threshold`: a column is an outlier when it reaches this magnitude in any token of the call, so **a token's result
    depends on the tokens it shares a call with**, padding included. None (or infinity) splits nothing and keeps
    nothing: plain vector-wise int8. 0 makes every column an outlier and keeps all weights in 16 bit.

    `outliers`: a fixed set instead, the columns of each layer by its name, as `find_outliers` measures them. Nothing
    is decided at run time then, and a token's result does not depend on the others.

    Weight columns that int8 cannot represent and those in `outliers` are kept in 16 bit; the others are int8, also
    while their inputs are outliers. Source: Dettmers et al. 2022, "LLM.int8()", section 3; bitsandbytes keeps no
    weight in 16 bit. Raises SpecError for a threshold below 0, or `outliers` where there can be none.
    """
    split = math.inf if threshold is None else threshold
    if isinstance(split, bool) or not isinstance(split, int | float) or not split >= 0:
        raise SpecError(f"threshold is a magnitude, 0 or larger, or None to split nothing, got {threshold!r}")
    if outliers is not None and split in (0, math.inf):
        raise SpecError(f"outliers are given, but threshold={threshold} leaves no choice of columns: leave it out")
    if split == math.inf:
        return _recipe(None, Step("none"))
    if split == 0:
        return _recipe(0.0, Step("llm_int8", {"every": True}))
    if outliers is not None:
        return _recipe(None, Step("llm_int8", {"outliers": outliers}))
    return _recipe(float(split), Step("llm_int8"))


def _recipe(split: float | None, columns: Step) -> Recipe:
    return Recipe(Scheme(_INT8, InputSpec(_INT8, split=split)), columns=columns)
