"""The layout "float8": codes as torch's native float8 numbers, which FP8 hardware and other tools read as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from hfquant.blocks import row_chunks
from hfquant.errors import FormatError, SpecError
from hfquant.grids import FloatGrid, Grid
from hfquant.layouts import Layout
from hfquant.spec import TensorSpec

DTYPES = {"e4m3fn": torch.float8_e4m3fn, "e5m2ieee": torch.float8_e5m2}


class Float8(Layout):
    """Codes [N, K] as `torch.float8_e4m3fn` or `torch.float8_e5m2`; the numbers still have to be multiplied by scales.

    Only codes of finite numbers exist, so a packed weight never holds NaN or an infinity.
    """

    name = "float8"

    def why_not(self, spec: TensorSpec) -> str | None:
        """Only the two grids that torch has a dtype for."""
        return None if spec.grid in DTYPES else f"torch has float8 dtypes for {' and '.join(DTYPES)} only"

    def encode(self, codes: Tensor, grid: Grid) -> Tensor:
        """Float8 numbers [N, K]; zero is +0."""
        numbers, patterns = _float_grid(grid), torch.empty_like(codes)
        for rows in row_chunks((codes.shape[0], codes.shape[1])):  # the arithmetic takes several times the memory
            patterns[rows] = numbers.to_bits(codes[rows])
        return patterns.view(DTYPES[grid.name])

    def decode(self, stored: Tensor, grid: Grid, count: int) -> Tensor:
        """Codes [N, K] uint8 of float8 numbers. Raises FormatError when they are of another dtype."""
        if stored.dtype != DTYPES[grid.name]:
            raise FormatError(f"codes of {grid.name} weights are stored as {DTYPES[grid.name]}, found {stored.dtype}")
        numbers, codes = _float_grid(grid), torch.empty_like(stored, dtype=torch.uint8)
        for rows in row_chunks((stored.shape[0], stored.shape[1])):
            codes[rows] = numbers.from_bits(stored[rows].view(torch.uint8))
        return codes

    def levels_of_bytes(self, grid: Grid) -> Tensor:
        """The float8 numbers themselves; patterns of infinities are none, like those of NaN."""
        numbers = torch.arange(256, dtype=torch.uint8).view(DTYPES[grid.name]).float()
        return numbers.masked_fill(numbers.isinf(), torch.nan)


def _float_grid(grid: Grid) -> FloatGrid:
    """The grid as the kind that knows bit patterns."""
    if not isinstance(grid, FloatGrid):
        raise SpecError(f"layout 'float8' stores floating-point grids, got {grid.name!r}: use 'bytes'")
    return grid
