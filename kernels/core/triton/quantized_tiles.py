"""Sizes of tiles for products of quantized inputs, as data (see `blocks`)."""

from __future__ import annotations

from .blocks import ANY, Tile

SMALL = (Tile(16, 16, 64, 256, 4, 3, False), Tile(64, 64, 64, 128, 4, 3, False))
INT8_AMD = (*SMALL, Tile(ANY, 128, 128, 128, 8, 2, False))
INT8 = {
    "": (*SMALL, Tile(ANY, 128, 128, 64, 8, 3, False)),
    "sm_90": (*SMALL, Tile(ANY, 128, 128, 128, 8, 3, False)),
    "sm_100": (*SMALL, Tile(ANY, 128, 128, 128, 8, 3, False)),
}


def int8_tile(architecture: str, rows: int) -> Tile:
    """The tile for an input of `rows` rows."""
    table = INT8_AMD if architecture.startswith("gfx") else INT8.get(architecture, INT8[""])
    return next(tile for tile in table if rows <= tile.rows)
