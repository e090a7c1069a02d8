"""Packed weights as matrices, for gradients and for those who look at them: by the library of CPU kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..spec import PackedSpec
from .linear import describe
from .native import Library, library
from .types import TYPES


def columns(packed: list[Tensor], spec: PackedSpec, dtype: torch.dtype, first: int, last: int) -> Tensor:
    """Columns [N, last - first] of the matrix of a weight, bit for bit as `QTensor.dequantize` gives them.

    All of them where they are stored in another order, or some are kept in 16 bit. Raises MemoryError, and FormatError
    for tensors that are too short.
    """
    tensors = dict(zip(spec.names, packed, strict=True))
    assert (first, last) == (0, spec.shape[1]) or not ("order" in tensors or spec.outliers)
    out = stored_columns(tensors, spec, dtype, first, last)
    if "order" in tensors:
        out = torch.empty_like(out).index_copy_(1, tensors["order"].long(), out)
    if spec.outliers:
        out.index_copy_(1, tensors["outlier_index"].long(), tensors["outlier_weight"].to(dtype))
    return out


def stored_columns(tensors: dict[str, Tensor], spec: PackedSpec, dtype: torch.dtype, first: int, last: int) -> Tensor:
    """The same in the order that they are stored in, with what the codes say of columns that are kept in 16 bit."""
    found = library()
    assert isinstance(found, Library) and 0 <= first <= last <= spec.shape[1]
    weight = describe(tensors, spec)
    out = torch.empty(spec.shape[0], last - first, dtype=dtype, device=tensors["codes"].device)
    at = (ctypes.addressof(weight), first, last, out.data_ptr())
    if found.call("hfq_dequantize", *at, type=TYPES[dtype]):
        raise MemoryError(f"the CPU kernels ran out of memory on a {spec.shape[0]} x {spec.shape[1]} weight")
    return out
