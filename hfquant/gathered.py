"""Tensors under FSDP, which cuts frozen parameters into parts, and casts what it gathers on request.

Of packed tensors both would go unnoticed: a part of the codes is a tensor like any other, a rounded scale is a
scale. One tensor of each weight tells: FSDP takes all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .errors import UnsupportedError

Witness = tuple[str, torch.dtype]
"""Name of the packed tensor to look at, and the dtype that it was packed in."""


_ROUNDED = ("outlier_weight",)  # may be read in another 16-bit dtype than the model's


def witness_of(packed: dict[str, Tensor]) -> Witness:
    """A tensor that any cast changes: codes that are floating-point numbers, or else the widest of the others."""
    floating = [name for name in packed if packed[name].is_floating_point() and name not in _ROUNDED]
    widest = max(floating, key=lambda name: packed[name].itemsize, default="codes")
    name = "codes" if packed["codes"].is_floating_point() else widest
    return name, packed[name].dtype


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from the parts of all processes, which all have to ask for it; others as they are."""
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found


def check_gathered(tensor: Tensor, witness: Witness) -> None:
    """Raise UnsupportedError for a part of a packed tensor, or for one in another dtype than it was packed in."""
    name, dtype = witness
    if isinstance(tensor, DTensor):
        raise UnsupportedError(
            "the packed weight is spread over processes (FSDP), and only put together while its block computes: read "
            "it in the forward pass, or load the model in one process"
        )
    if tensor.dtype is not dtype:
        raise UnsupportedError(
            f"the packed tensor {name!r} came as {tensor.dtype}, and is {dtype}: FSDP's mixed precision casts what it "
            "gathers. Load the model in the dtype that it is to compute in (dtype=torch.bfloat16), and train without "
            "mixed precision (neither bf16=True nor fp16=True)"
        )
