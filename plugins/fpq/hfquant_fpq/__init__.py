"""FPQ for hfquant: floating-point formats and largest values, searched together for weights and inputs."""

from hfquant.backend import Backend
from hfquant.stats import CHANNELS
from hfquant.transforms import Transform

from . import inputs, preset, shift, weights

backend = Backend(
    "fpq",
    ranges={"fpq": weights.fpq},
    input_ranges={"fpq": inputs.fpq},
    transforms={"fpq_shift": Transform(shift.fpq_shift, needs=frozenset({CHANNELS}))},
    presets={"fpq": preset.fpq},
)

__all__ = ["backend"]
