"""Gradients of inputs through frozen packed weights; the whole matrix of a weight is never in memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..spec import PackedSpec
from .dequantize import stored_columns
from .linear import describe
from .native import Library, library
from .types import TYPES, Weight

PANEL = 4 << 20  # bytes of a weight that are unpacked at once


def input_grad(grad: Tensor, packed: list[Tensor], spec: PackedSpec) -> Tensor:
    """grad [..., N] @ W [N, K] in the dtype of `grad`, with W rounded to it; that of an input counts as identity.

    Raises MemoryError, and FormatError for tensors that are too short.
    """
    tensors = dict(zip(spec.names, packed, strict=True))
    rows = grad.reshape(-1, spec.shape[0]).contiguous()
    out = rows.new_empty(len(rows), spec.shape[1])
    if not _in_one_call(rows, describe(tensors, spec), out):
        _in_panels(rows, tensors, spec, out)
    if "order" in tensors:
        out = torch.empty_like(out).index_copy_(1, tensors["order"].long(), out)
    if spec.outliers:
        kept = rows @ tensors["outlier_weight"].to(rows.dtype)
        out.index_copy_(1, tensors["outlier_index"].long(), kept)
    return out.view(*grad.shape[:-1], spec.shape[1])


def _in_one_call(rows: Tensor, weight: Weight, out: Tensor) -> bool:
    """Fill `out` [T, K] by the library, which unpacks as it multiplies; False if it has no kernel for that."""
    found = library()
    assert isinstance(found, Library)
    at = (ctypes.addressof(weight), rows.data_ptr(), out.data_ptr(), len(rows))
    failed = found.call("hfq_input_grad", *at, type=TYPES[rows.dtype])
    if failed < 0:
        raise MemoryError(f"the CPU kernels ran out of memory on a {weight.n} x {weight.k} weight")
    return not failed


def _in_panels(rows: Tensor, tensors: dict[str, Tensor], spec: PackedSpec, out: Tensor) -> None:
    """Fill `out` [T, K], in the stored order of columns, by products with some columns of W at a time."""
    height, width = spec.shape
    step = max(1, PANEL // max(1, height * rows.element_size() * 64)) * 64
    for first in range(0, width, step):
        last = min(first + step, width)
        out[:, first:last] = rows @ stored_columns(tensors, spec, rows.dtype, first, last)
