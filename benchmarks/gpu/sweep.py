"""Which sizes of tiles are the fastest? Candidates for every family of kernels and every number of rows.

The best ones belong into the tables of `kernels/core/triton/blocks.py`, which choose by the architecture and the rows
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from hfquant.backend import load_all
from hfquant.kernels.triton.blocks import ANY, Tile, trying
from hfquant.kernels.triton.launch import hardware

from .findings import Findings
from .layers import INPUTS, Ours
from .setting import Setting
from .timing import Contender, how_many, race, rotated
from .weights import FORMATS, INT8, LEVELS, random_input

USUAL = "as it is"
GRADIENT = "gradient"
# The tables that the kernels of a family take their tile from.
TABLES = {
    GRADIENT: ("grad", "grad_gathered"),
    "triton": ("linear", "linear_gathered"),
    INT8: ("int8",),
    LEVELS: ("float8", "float8_scaled", "bfloat16", "bfloat16_scaled"),
}
PRODUCTS = ("int4 g128", "nf4 g64", "e2m1 g32", "int8 rows", "int3 g128", "w8a8", "fp8 rows", "fp8 tiles", "fpq w4a8")
# Numbers of rows that a row of a table is for, and those it is measured with.
CLASSES = {16: 1, 32: 32, 64: 64, ANY: 4096}
GRADIENTS = ("int4 g128", "nf4 g64")
GRADIENT_CLASSES = (64, ANY)


def candidates(kernel: str, rows: int) -> list[Tile]:
    """Tiles to try for inputs of at most `rows` rows, by the kernel of products, or for `GRADIENT`."""
    if kernel == GRADIENT:
        bm, few = (64, 4) if rows == 64 else (128, 8)
        sides = [(bm, 64, 64, few, 2), (bm, 64, 64, few, 3), (bm, 32, 64, few, 3), (bm, 64, 128, 8, 2)]
        sides += [(bm, 64, 128, 8, 3), (bm, 128, 64, 8, 2), (64, 64, 64, 4, 4)]
        return [Tile(rows, *side, False) for side in sides]
    if rows == ANY:
        sides = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 128, 8, 3)]
        sides += [(128, 64, 64, 4, 4), (64, 256, 64, 8, 4)]
        if kernel == INT8:  # the others do not have the registers for these
            sides += [(128, 256, 64, 8, 3), (256, 128, 64, 8, 3)]
        return [Tile(ANY, *side, False) for side in sides]
    bm = max(16, rows)
    if kernel != "triton":
        sides = [(64, 128, 4, 3), (32, 128, 4, 4), (64, 256, 4, 3), (128, 128, 8, 3), (32, 256, 4, 3)]
        high = {bm, 64} if kernel == LEVELS else {bm}  # float8 instructions of Hopper take 64 rows
        return [Tile(rows, each, *side, True) for each in sorted(high) for side in sides]
    sides = [(64, 128, 4, 3), (64, 128, 4, 4), (32, 128, 4, 4), (32, 128, 2, 4), (128, 128, 4, 3), (128, 128, 8, 4)]
    sides += [(64, 64, 4, 5), (16, 128, 2, 4)]
    return [Tile(rows, bm, *side, True) for side in sides]


@contextmanager
def tiles(kernel: str, tile: Tile | None, device: torch.device) -> Iterator[None]:
    """Let what is bound inside of the block take one tile for everything, or None for its own choice."""
    with ExitStack() as tried:
        for what in () if tile is None else TABLES[kernel]:
            tried.enter_context(trying(what, hardware(device).architecture, (tile._replace(rows=ANY),)))
        yield


def with_tile(
    kernel: str, tile: Tile | None, device: torch.device, call: Callable[[int], object]
) -> Callable[[int], object]:
    """A call under a tile."""

    def run(number: int) -> object:
        with tiles(kernel, tile, device):
            return call(number)

    return run


def plan() -> list[tuple[str, bool, int]]:
    """Formats, whether it is the gradient, and classes: few rows of all families before many rows of any."""
    products = [(name, False, rows) for rows in CLASSES for name in PRODUCTS]
    return products + [(name, True, rows) for rows in GRADIENT_CLASSES for name in GRADIENTS]


def gradients(ours: Ours, grads: list[Tensor]) -> Callable[[int], object]:
    """Calls for the gradient of the input."""
    grad, layer = rotated(grads), rotated(ours.layers)
    return lambda number: torch.ops.hfquant.input_grad(grad(number), layer(number).packed(), layer(number).key)


def measure(
    setting: Setting, name: str, is_gradient: bool, rows: int, shape: tuple[int, int], line: dict[str, Any]
) -> None:
    """All candidates of one family for one class of rows, in turns."""
    kernel = GRADIENT if is_gradient else FORMATS[name].kernel
    m = CLASSES[rows] if setting.is_gpu else 2
    ours = Ours.of(shape, FORMATS[name], setting)
    width = shape[0] if is_gradient else shape[1]
    inputs = [random_input(m, width, setting.device, seed=seed) for seed in range(INPUTS)]
    count = how_many(ours.size, setting.sizes.distinct, m)
    tried: list[Tile | None] = [None, *candidates(kernel, rows)]
    labels = [USUAL if tile is None else str(tuple(tile)[1:]) for tile in tried]
    contenders: dict[str, Contender] = {}
    for label, tile in zip(labels, tried, strict=True):
        mine = ours.unbound()
        call = gradients(mine, inputs) if is_gradient else mine.ready(inputs)
        contenders[label] = Contender(with_tile(kernel, tile, setting.device, call), count)
    found = race(setting, contenders, max(3, setting.sizes.rounds // 3))
    line |= {"kernel": ours.kernel, "measured_rows": m, "runs": found}
    able = {label: run["seconds"] for label, run in found.items() if "seconds" in run}
    if able:
        best = min(able, key=lambda label: able[label])
        line |= {"best": best, "times": able[USUAL] / able[best] if USUAL in able else None}


@torch.no_grad()
def run(setting: Setting, findings: Findings) -> None:
    """Everything on the first shape."""
    load_all()
    shape = setting.sizes.shapes[0]
    for name, is_gradient, rows in setting.while_time(findings, "families", setting.share_of(plan())):
        what = {"format": name, "what": GRADIENT if is_gradient else "product", "shape": shape}
        with findings.row(**what, rows=rows if rows < ANY else None) as line:
            measure(setting, name, is_gradient, rows, shape, line)
