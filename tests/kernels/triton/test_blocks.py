"""Tables of tiles: each is complete, and every GPU finds one."""

from __future__ import annotations

import logging

import pytest
import torch

from hfquant.blocks import Blocks
from hfquant.kernels.triton import blocks, launch
from hfquant.kernels.triton.blocks import ANY, TILES, Tile
from hfquant.spec import TensorSpec

from ..problems import packed, random_weight
from .compiled import TARGETS, recording
from .products import as_if_on


@pytest.mark.parametrize("what", TILES)
def test_tables_are_complete(what: str) -> None:
    """Rows grow up to any number, sides are powers of two that have room for them, and both makers have a table."""
    assert {name.rstrip("0123456789") for name in TILES[what]} == {"sm_", "gfx"}
    for table in TILES[what].values():
        rows = [tile.rows for tile in table]
        assert rows == sorted(set(rows)) and rows[-1] == ANY
        for tile in table:
            assert tile.rows in (tile.bm, ANY) and min(tile.bn, tile.bk) >= 32
            assert all(side & (side - 1) == 0 for side in (tile.bm, tile.bn, tile.bk, tile.warps))


@pytest.mark.parametrize(
    ("architecture", "found"),
    [
        *[(name, name) for name in ("sm_80", "sm_90", "sm_100", "gfx942")],
        *[("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_103", "sm_100"), ("sm_120", "sm_80"), ("sm_75", "sm_80")],
        *[("gfx90a", "gfx942"), ("gfx950", "gfx942"), ("gfx1100", "gfx942"), ("none", "sm_80")],
    ],
)
def test_a_gpu_gets_the_sizes_of_the_nearest_older_one(
    architecture: str, found: str, caplog: pytest.LogCaptureFixture
) -> None:
    blocks.table_for.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert blocks.table_for("linear", architecture) is TILES["linear"][found]
    said = [f"tiles of linear kernels: none are listed for {architecture}, those of {found} are used"]
    assert caplog.messages == ([] if architecture == found else said)
    blocks.table_for.cache_clear()


def test_gpus_for_desktops_have_the_float8_instructions_of_older_ones() -> None:
    assert blocks.like("sm_120", ["sm_89", "sm_90"]) == "sm_89"
    assert blocks.like("sm_120", ["sm_89", "sm_90", "sm_120"]) == "sm_120"
    assert blocks.like("none", ["sm_80", "none"]) == "none"
    assert blocks.like("gfx90a", ["gfx90a", "gfx942"]) == "gfx90a" and blocks.like("gfx942", ["sm_90"]) == "sm_90"


@pytest.mark.parametrize("target", TARGETS)
def test_other_sizes_can_be_tried(target: str) -> None:
    tensors, spec = packed(random_weight((64, 256), TensorSpec("int4", Blocks(1, 64)), 0), "dense")
    with as_if_on(target), recording() as launches:
        x = torch.empty(1, 256, dtype=torch.bfloat16)
        with blocks.trying("linear", target, (Tile(ANY, 32, 32, 32, 2, 1, False),)):
            launch.bind(tensors, spec)(x, tensors, None)
        launch.bind(tensors, spec)(x, tensors, None)
    sizes = [(launched.options["BM"], launched.options["num_warps"]) for launched in launches]
    assert sizes == [(32, 2), (16, 4)]
