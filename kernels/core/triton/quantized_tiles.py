"""Sizes of tiles for products of quantized inputs, as data (see `blocks`)."""

from __future__ import annotations

from .blocks import ANY, Tile, with_room

SMALL = (Tile(16, 16, 64, 256, 4, 3, True), Tile(64, 64, 64, 128, 4, 3, True))
INT8_AMD = (*SMALL, Tile(ANY, 128, 128, 128, 8, 2, False))
INT8 = {
    "": (*SMALL, Tile(ANY, 128, 128, 64, 8, 3, False)),
    "sm_90": (*SMALL, Tile(ANY, 128, 128, 128, 8, 3, False)),
    "sm_100": (*SMALL, Tile(ANY, 128, 128, 128, 8, 3, False)),
}


def int8_tile(architecture: str, rows: int) -> Tile:
    """The tile for an input of `rows` rows."""
    return with_room(INT8_AMD if architecture.startswith("gfx") else INT8.get(architecture, INT8[""]), rows)


# Float8 instructions of sm_90 and later take 64 rows, of earlier ones 16.
FLOAT8 = {
    "sm_89": (
        Tile(16, 16, 64, 128, 4, 3, True),
        Tile(64, 64, 64, 128, 4, 3, True),
        Tile(ANY, 128, 128, 128, 8, 3, False),
    ),
    "gfx": (
        Tile(16, 16, 64, 128, 4, 2, True),
        Tile(64, 64, 64, 128, 4, 2, True),
        Tile(ANY, 128, 128, 128, 8, 2, False),
    ),
    "": (Tile(64, 64, 64, 128, 4, 3, True), Tile(ANY, 128, 128, 128, 8, 3, False)),
}
BFLOAT16 = (
    Tile(16, 16, 64, 128, 4, 3, True),
    Tile(64, 64, 64, 64, 4, 3, True),
    Tile(ANY, 128, 128, 32, 8, 3, False),
)


def levels_tile(architecture: str, rows: int, is_float8: bool, is_scaled: bool) -> Tile:
    """The tile for products of levels, as float8 numbers or in bfloat16; `is_scaled`: each has scales of its own.

    A product that is scaled before it is added takes registers of its own: half as many columns are left.
    """
    usual = FLOAT8.get("gfx" if architecture.startswith("gfx") else architecture, FLOAT8[""])
    found = with_room(usual if is_float8 else BFLOAT16, rows)
    return found._replace(bn=64) if is_scaled else found
