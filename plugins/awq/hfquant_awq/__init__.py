"""AWQ for hfquant: input channels that matter are scaled up before rounding, and ranges clipped for the inputs seen."""

from hfquant.backend import Backend
from hfquant.stats import CHANNELS, HESSIAN
from hfquant.transforms import Transform

from . import clip, preset, scale

backend = Backend(
    "awq",
    ranges={"awq_clip": clip.awq_clip},
    transforms={"awq": Transform(scale.awq, needs=frozenset({CHANNELS, HESSIAN}))},
    presets={"awq": preset.awq},
)

__all__ = ["backend"]
