"""Sizes of tiles for each architecture, as data: nothing is timed at run time, so that results never change by chance.

To fill in a GPU: add a line under its name to the tables of `TILES` where other sizes are faster than those that it
gets now (`like` says which these are). Rows of a table are tried in order: the first with room for the rows of the
input is taken. `trying` runs what is bound inside of it with other sizes, so that they can be timed without a change
here; the tests of machine code say whether they spill. The reason for a line is a benchmark's committed result.

Measured on no GPU yet: these sizes compile without spills, load 16 bytes at a time and need the fewest instructions for
each weight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Tile(NamedTuple):
    """Rows of the input it is for, at most; its sides; warps; stages of the pipeline; whether K may be split."""

    rows: int
    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    split: bool


Table = tuple[Tile, ...]
ANY = 1 << 62

_GATHERED = (Tile(16, 16, 64, 64, 4, 2, True), Tile(64, 64, 64, 64, 8, 2, True), Tile(ANY, 128, 64, 32, 8, 2, False))
_FLOAT32 = (Tile(16, 16, 32, 32, 4, 2, True), Tile(ANY, 32, 32, 32, 4, 2, False))
_GRAD = (Tile(64, 64, 64, 64, 4, 2, False), Tile(ANY, 128, 64, 64, 8, 2, False))
_GRAD_GATHERED = (Tile(64, 64, 32, 64, 8, 2, False), Tile(ANY, 128, 32, 64, 8, 2, False))
_DEQUANTIZE = (Tile(ANY, 0, 32, 128, 4, 1, False),)
_DEQUANTIZE_GATHERED = (Tile(ANY, 0, 32, 64, 4, 1, False),)
_INT8 = (Tile(16, 16, 64, 256, 4, 3, True), Tile(64, 64, 64, 128, 4, 3, True))
_BFLOAT16 = (
    Tile(16, 16, 64, 128, 4, 3, True),
    Tile(64, 64, 64, 64, 4, 3, True),
    Tile(ANY, 128, 128, 32, 8, 3, False),
)
# Instructions of sm_90 and later take 64 rows, of earlier ones 16.
_FLOAT8 = {
    "sm_89": (
        Tile(16, 16, 64, 128, 4, 3, True),
        Tile(64, 64, 64, 128, 4, 3, True),
        Tile(ANY, 128, 128, 128, 8, 3, False),
    ),
    "sm_90": (Tile(64, 64, 64, 128, 4, 3, True), Tile(ANY, 128, 128, 128, 8, 3, False)),
    "gfx942": (
        Tile(16, 16, 64, 128, 4, 2, True),
        Tile(64, 64, 64, 128, 4, 2, True),
        Tile(ANY, 128, 128, 128, 8, 2, False),
    ),
}


def _half(table: Table) -> Table:
    """A product that is scaled before it is added takes registers of its own: half as many columns are left."""
    return tuple(tile._replace(bn=64) for tile in table)


# By what is computed, then by architecture. gfx942 has warps of 64 threads and 64 KiB of shared memory.
TILES: dict[str, dict[str, Table]] = {
    # Packed weights times inputs in floating point.
    "linear": {
        "sm_80": (
            Tile(16, 16, 64, 128, 4, 3, True),
            Tile(32, 32, 64, 128, 4, 3, True),
            Tile(64, 64, 128, 64, 8, 3, True),
            Tile(ANY, 128, 128, 64, 8, 3, False),
        ),
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
        "gfx942": (
            Tile(16, 16, 64, 128, 4, 2, True),
            Tile(32, 32, 64, 128, 4, 2, True),
            Tile(64, 64, 128, 64, 4, 2, True),
            Tile(ANY, 128, 128, 64, 4, 2, False),
        ),
    },
    # The same with codes that are read one by one, or scales inside of the tile, which take more registers.
    "linear_gathered": {"sm_80": _GATHERED, "gfx942": _GATHERED},
    # The same in float32: without matrix instructions a tile is a loop over its columns in registers.
    "linear_float32": {"sm_80": _FLOAT32, "gfx942": _FLOAT32},
    # Gradients of inputs: sums over rows, of which there are as many as there are columns in the products above.
    "grad": {"sm_80": _GRAD, "gfx942": _GRAD},
    "grad_gathered": {"sm_80": _GRAD_GATHERED, "gfx942": _GRAD_GATHERED},
    # A matrix that is only written: numbers are float32, and those read one by one share no bytes between threads.
    "dequantize": {"sm_80": _DEQUANTIZE, "gfx942": _DEQUANTIZE},
    "dequantize_gathered": {"sm_80": _DEQUANTIZE_GATHERED, "gfx942": _DEQUANTIZE_GATHERED},
    # Integers times integers.
    "int8": {
        "sm_80": (*_INT8, Tile(ANY, 128, 128, 64, 8, 3, False)),
        "sm_90": (*_INT8, Tile(ANY, 128, 128, 128, 8, 3, False)),
        "gfx942": (*_INT8, Tile(ANY, 128, 128, 128, 8, 2, False)),
    },
    # Float8 times float8, and the same with scales for each product.
    "float8": _FLOAT8,
    "float8_scaled": {name: _half(table) for name, table in _FLOAT8.items()},
    # Other levels of quantized inputs and weights, in bfloat16.
    "bfloat16": {"sm_80": _BFLOAT16, "gfx942": _BFLOAT16},
    "bfloat16_scaled": {"sm_80": _half(_BFLOAT16), "gfx942": _half(_BFLOAT16)},
}

# GPUs whose number says less than their instructions: those for desktops have the matrix instructions of sm_89.
SIMILAR = {"sm_120": "sm_89", "sm_121": "sm_89"}


def like(architecture: str, known: list[str]) -> str:
    """The one of the `known` architectures whose sizes a GPU gets: its own, or those of the nearest older one.

    Where there is no older one it is the oldest, and of another maker's GPUs, or what is no GPU, the oldest of all.
    """
    if architecture in known:
        return architecture
    architecture = SIMILAR.get(architecture, architecture)
    family = architecture.rstrip("0123456789abcdef") if architecture.startswith("gfx") else "sm_"
    number = _number(architecture)
    kin = sorted((name for name in known if name.startswith(family)), key=_number) or sorted(known, key=_number)
    older = [name for name in kin if _number(name) <= number]
    return older[-1] if older else kin[0]


def _number(architecture: str) -> int:
    """Numbers that order the architectures of a maker: sm_90 is 90, gfx90a is 0x90a; 0 for what is no GPU."""
    digits = architecture.removeprefix("sm_").removeprefix("gfx")
    try:
        return int(digits, 16 if architecture.startswith("gfx") else 10)
    except ValueError:
        return 0


@lru_cache(maxsize=1024)
def table_for(what: str, architecture: str) -> Table:
    """The tiles for a kind of product; says once where they are those of another architecture."""
    tables = TILES[what]
    found = like(architecture, list(tables))
    if found != architecture:
        logger.info("tiles of %s kernels: none are listed for %s, those of %s are used", what, architecture, found)
    return tables[found]


@contextmanager
def trying(what: str, architecture: str, table: Table) -> Iterator[None]:
    """Other tiles for what is bound inside of the block. Not for several threads at once."""
    before = TILES[what]
    TILES[what] = before | {architecture: table}
    table_for.cache_clear()
    try:
        yield
    finally:
        TILES[what] = before
        table_for.cache_clear()


def with_room(what: str, architecture: str, rows: int) -> Tile:
    """The tile for an input of `rows` rows."""
    return next(tile for tile in table_for(what, architecture) if rows <= tile.rows)


def tile_for(architecture: str, rows: int, is_float32: bool, is_gathered: bool) -> Tile:
    """The tile for an input of `rows` rows in floating point."""
    what = "linear_float32" if is_float32 else "linear_gathered" if is_gathered else "linear"
    return with_room(what, architecture, rows)


def grad_tile_for(architecture: str, rows: int, is_float32: bool, is_gathered: bool) -> Tile:
    """The tile for a gradient of `rows` rows."""
    return with_room("linear_float32" if is_float32 else "grad_gathered" if is_gathered else "grad", architecture, rows)


def dequantize_tile(architecture: str, is_gathered: bool) -> Tile:
    """The tile for a weight that is written as a matrix."""
    return with_room("dequantize_gathered" if is_gathered else "dequantize", architecture, 1)


def int8_tile(architecture: str, rows: int) -> Tile:
    """The tile for an input of `rows` rows that is quantized to integers."""
    return with_room("int8", architecture, rows)


def levels_tile(architecture: str, rows: int, is_float8: bool, is_scaled: bool) -> Tile:
    """The tile for products of levels, as float8 numbers or in bfloat16; `is_scaled`: each has scales of its own."""
    what = "float8" if is_float8 else "bfloat16"
    return with_room(f"{what}_scaled" if is_scaled else what, architecture, rows)
