"""Ternary weights for hfquant: every weight is -1, 0 or 1 times the mean magnitude of its group."""

from torch import Tensor

from hfquant.backend import Backend
from hfquant.blocks import Blocks
from hfquant.errors import SpecError
from hfquant.grids import Codebook
from hfquant.ranges import Params, params_from_bounds
from hfquant.recipe import Recipe, Step
from hfquant.spec import Scheme, TensorSpec
from hfquant.stats import Stats

# Which numbers exist. The name is written into checkpoints: it must never change its meaning.
GRID = Codebook("ternary", (-1.0, 0.0, 1.0))


def absmean(w: Tensor, spec: TensorSpec, stats: Stats) -> Params:
    """Scale each group of `w` [N, K] by its mean magnitude instead of the largest one.

    Source: "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits" (Ma et al. 2024), equations 1 to 3.
    Rounding to the nearest level, which is the default, then is their RoundClip.
    """
    # `reduce` hands over the groups as rows [B, E], short last groups included.
    (mean,) = spec.blocks.reduce(w, lambda group: (group.abs().mean(1),))
    # Bounds are where the lowest and the highest level go. Zero groups and the rounding of scales are handled there.
    return params_from_bounds(w, -mean, mean, spec)


def ternary(*, group_size: int = 64, scale_dtype: str = "bfloat16") -> Recipe:
    """Ternary weights, 1.58 bits of information in 2 bits of memory; inputs stay in floating point.

    `group_size`: neighbouring weights of a row that share a scale, -1 for the whole row.
    """
    if not isinstance(group_size, int) or (group_size != -1 and group_size < 2):
        raise SpecError(f"group_size is at least 2, or -1 for one scale per row, got {group_size!r}")
    weight = TensorSpec("ternary", Blocks(1, group_size), scale=scale_dtype)
    return Recipe(Scheme(weight), range=Step("absmean"))


backend = Backend(
    "ternary",
    grids=(GRID,),
    ranges={"absmean": absmean},
    presets={"ternary": ternary},
)
