"""A quantized matrix and its meaning: `QTensor.dequantize` is the definition of correct for every kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import row_chunks
from .hadamard import inverse_hadamard
from .spec import TensorSpec


@dataclass(frozen=True)
class Outliers:
    """Input columns kept in 16 bit: `index` [k] int32, sorted, and their weights `weight` [N, k]."""

    index: Tensor
    weight: Tensor


@dataclass(frozen=True)
class InputParams:
    """Grid parameters of a static input: `scale` [1] float32, and `zero` [1] uint8 or None. They hold for all of it."""

    scale: Tensor
    zero: Tensor | None = None


@dataclass(frozen=True)
class QTensor:
    """A matrix [N, K] as codes and grid parameters.

    `codes` [N, K] uint8; `scale` [R, C] as stored, or a QTensor [1, R * C]; `zero` [R, C] in the spec's `zero_dtype`,
    or None; `order` [K] int32 or None: stored column i is column order[i] of the matrix; `levels` [L] float32 for grids
    fitted to this tensor; `outliers` replace their columns. `rotated`: all of this describes `hadamard(W)`, the matrix
    in the Hadamard basis of its input, and x W^T is computed as hadamard(x) hadamard(W)^T where the input is quantized
    too.
    """

    codes: Tensor
    scale: Tensor | QTensor
    zero: Tensor | None
    order: Tensor | None
    spec: TensorSpec
    levels: Tensor | None = None
    outliers: Outliers | None = None
    rotated: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]."""
        return self.codes.shape[0], self.codes.shape[1]

    def scale_values(self) -> Tensor:
        """Scales [R, C] float32, dequantized if they are quantized themselves."""
        if isinstance(self.scale, QTensor):
            return self.scale.dequantize().reshape(self.spec.blocks.counts(self.shape))
        return self.scale.float()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] in `dtype`, computed in float32 and rounded once at the end."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        scale = self.scale_values()
        for rows in row_chunks(self.shape):
            values = self._values(rows, scale)
            if self.order is not None:
                values = torch.empty_like(values).index_copy_(1, self.order.long(), values)
            if self.outliers is not None:
                values.index_copy_(1, self.outliers.index.long(), self.outliers.weight[rows].float())
            out[rows] = (inverse_hadamard(values) if self.rotated else values).to(dtype)
        return out

    def _values(self, rows: slice, scale: Tensor) -> Tensor:
        """Rows [n, K] float32 in the stored order of columns."""
        blocks, codes = self.spec.blocks, self.codes[rows]
        if self.levels is not None:
            numbers = self.levels[codes.int()]
        else:
            numbers = self.spec.numbers().decode(codes)
        if self.zero is not None:
            numbers = numbers - blocks.expand(self.zero, self.shape, rows).float()
        return numbers * blocks.expand(scale, self.shape, rows)
