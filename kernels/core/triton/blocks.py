"""Sizes of tiles for each architecture, as data: nothing is timed at run time, so that results never change by chance.

Rows of a table are tried in order: the first with room for the rows of the input is taken. Measured on no GPU yet:
these sizes compile without spills, load 16 bytes at a time and need the fewest instructions for each weight.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Rows of the input it is for, at most; its sides; warps; stages of the pipeline; whether K may be split."""

    rows: int
    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    split: bool


ANY = 1 << 62

DEFAULT = (
    Tile(16, 16, 64, 128, 4, 3, True),
    Tile(32, 32, 64, 128, 4, 3, True),
    Tile(64, 64, 128, 64, 8, 3, True),
    Tile(ANY, 128, 128, 64, 8, 3, False),
)
# Warps of 64 threads, and 64 KiB of shared memory.
AMD = (
    Tile(16, 16, 64, 128, 4, 2, True),
    Tile(32, 32, 64, 128, 4, 2, True),
    Tile(64, 64, 128, 64, 4, 2, True),
    Tile(ANY, 128, 128, 64, 4, 2, False),
)
LINEAR = {
    "sm_90": (
        Tile(16, 16, 64, 128, 4, 3, True),
        Tile(32, 32, 64, 128, 4, 3, True),
        Tile(64, 64, 64, 128, 4, 3, True),
        Tile(ANY, 128, 128, 64, 8, 3, False),
    ),
    "sm_100": (
        Tile(16, 16, 128, 128, 4, 3, True),
        Tile(32, 32, 128, 128, 4, 3, True),
        Tile(64, 64, 128, 64, 4, 3, True),
        Tile(ANY, 128, 128, 64, 8, 3, False),
    ),
}
# Codes that are read one by one, and scales inside of the tile, take more registers.
GATHERED = (Tile(16, 16, 64, 64, 4, 2, True), Tile(64, 64, 64, 64, 8, 2, True), Tile(ANY, 128, 64, 32, 8, 2, False))
# Without tensor cores a tile is a loop over its columns in registers.
FLOAT32 = (Tile(16, 16, 32, 32, 4, 2, True), Tile(ANY, 32, 32, 32, 4, 2, False))
# Gradients: sums over rows, of which there are as many as there are columns in the products above.
GRAD = (Tile(64, 64, 64, 64, 4, 2, False), Tile(ANY, 128, 64, 64, 8, 2, False))
GRAD_GATHERED = (Tile(64, 64, 32, 64, 8, 2, False), Tile(ANY, 128, 32, 64, 8, 2, False))

# A matrix that is only written: numbers are float32, and those read one by one share no bytes between threads.
DEQUANTIZE = Tile(ANY, 0, 32, 128, 4, 1, False)
DEQUANTIZE_GATHERED = Tile(ANY, 0, 32, 64, 4, 1, False)


def with_room(table: tuple[Tile, ...], rows: int) -> Tile:
    """The first tile of a table for an input of `rows` rows."""
    return next(tile for tile in table if rows <= tile.rows)


def tile_for(architecture: str, rows: int, is_float32: bool, is_gathered: bool) -> Tile:
    """The tile for an input of `rows` rows."""
    usual = LINEAR.get(architecture, AMD if architecture.startswith("gfx") else DEFAULT)
    return with_room(FLOAT32 if is_float32 else GATHERED if is_gathered else usual, rows)


def grad_tile_for(architecture: str, rows: int, is_float32: bool, is_gathered: bool) -> Tile:
    """The tile for a gradient of `rows` rows."""
    return with_room(FLOAT32 if is_float32 else GRAD_GATHERED if is_gathered else GRAD, rows)


def dequantize_tile(is_gathered: bool) -> Tile:
    """The tile for a weight that is written as a matrix."""
    return DEQUANTIZE_GATHERED if is_gathered else DEQUANTIZE
