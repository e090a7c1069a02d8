"""The structures of hfquant.h, and how they hold tensors."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from ..errors import FormatError

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Weight(ctypes.Structure):
    """`hfq_weight` of hfquant.h."""

    _fields_ = (
        *((name, c_int64) for name in ("n", "k", "row_bytes", "group", "scale_height")),
        *((name, c_void_p) for name in ("codes", "levels", "scale", "zero")),
        *((name, c_void_p) for name in ("scale_codes", "scale_levels", "scale_scale")),
        *(("scale_group", c_int64), ("bits", c_int32), ("zero_bits", c_int32)),
        *((name, c_int32) for name in ("zero_type", "scale_type")),
    )


class Input(ctypes.Structure):
    """`hfq_input` of hfquant.h. `integers`: whether its products are those of integers."""

    _fields_ = (
        *((name, c_float) for name in ("low", "high", "scale", "split")),
        *(("outlier_count", c_int64), ("outliers", c_void_p), ("outlier_weight", c_void_p), ("outlier_type", c_int32)),
        *(("mantissa_bits", c_int32), ("normal", c_float), ("levels", c_void_p), ("thresholds", c_void_p)),
        *((name, c_int64) for name in ("level_count", "height", "width")),
        *(("scale_type", c_int32), ("zero", c_int32), ("zero_point", c_float), ("scale_last", c_int32)),
        ("order", c_void_p),
    )
    integers = False


def hold(owner: Weight | Input, tensor: Tensor, needed: int = 0, what: str = "", packed: bool = True) -> int:
    """Address of a tensor, which lives as long as its owner unless it is one of the `packed` ones, without gaps.

    Raises FormatError if it has fewer than the `needed` numbers.
    """
    if tensor.numel() < needed:
        raise FormatError(f"a packed weight needs {needed} {what}, found {tensor.numel()}: the checkpoint is damaged")
    if needed and packed and tensor.is_contiguous():
        return tensor.data_ptr()
    copy = tensor.contiguous()
    owner.__dict__.setdefault("held", []).append(copy)
    return copy.data_ptr()
