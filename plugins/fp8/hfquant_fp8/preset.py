"""The method "fp8": which float8 numbers, and who shares a scale."""

from __future__ import annotations

from typing import Any

from hfquant.blocks import Blocks
from hfquant.errors import SpecError
from hfquant.presets import step
from hfquant.recipe import Recipe
from hfquant.spec import InputSpec, Scheme, TensorSpec

# As users write them -> as grids are called. Torch's e4m3 has no infinities ("fn"), its e5m2 is like IEEE 754.
GRIDS = {"e4m3": "e4m3fn", "e4m3fn": "e4m3fn", "e5m2": "e5m2ieee", "e5m2ieee": "e5m2ieee"}
BLOCKS = {
    "tensor": (Blocks(-1, -1), Blocks(-1, -1)),
    "channel": (Blocks(1, -1), Blocks(1, -1)),
    "tile": (Blocks(128, 128), Blocks(1, 128)),
}


def fp8(
    *,
    weights: str = "e4m3",
    granularity: str = "channel",
    activations: bool | str = True,
    range: str | dict[str, Any] = "absmax",
) -> Recipe:
    """8-bit floating-point weights, and inputs quantized on the fly; needs no data.

    `weights`: "e4m3" (3 mantissa bits, up to 448) or "e5m2" (2 mantissa bits, up to 57344). `granularity`: who shares
    a float32 scale, amax / largest number: "channel", a row of the weight and a token of the input (known as
    FP8_DYNAMIC); "tensor", the weight and all tokens of a call; "tile", 128 x 128 weights and 1 x 128 inputs
    (DeepSeek-V3, section 3.3.2). `activations`: True for e4m3 inputs, False to leave inputs alone, or the name of
    their numbers. `range`: how weights are clipped, "absmax" for not at all. Raises SpecError for anything else.

    A token's result depends on the other tokens of the call only with "tensor".
    """
    if granularity not in BLOCKS:
        raise SpecError(f"granularity is one of {', '.join(BLOCKS)}, got {granularity!r}")
    of_weight, of_input = BLOCKS[granularity]
    weight = TensorSpec(_grid("weights", weights), of_weight)
    inputs = "e4m3" if activations is True else activations
    seen = None if inputs is False else InputSpec(TensorSpec(_grid("activations", inputs), of_input))
    return Recipe(Scheme(weight, seen), step(range), layout="float8")


def _grid(option: str, name: str | bool) -> str:
    """Name of the grid behind an option's value."""
    if not isinstance(name, str) or name not in GRIDS:
        raise SpecError(f"{option} is one of {', '.join(GRIDS)}, got {name!r}")
    return GRIDS[name]
