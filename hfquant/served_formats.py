"""Which formats of inference engines and hardware hold a packed weight exactly, its numbers and its scales."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .blocks import Blocks
from .grids import grid
from .layouts import INPUT_NAMES
from .spec import SCALE_DTYPES, PackedSpec, TensorSpec

Read = Callable[[str], Tensor | None]
"""A packed tensor by its name, with a first axis for experts; None where its values are not at hand."""

_FP8 = {
    "e4m3fn": ("FP8 E4M3", "e4m3fn"), "e5m2ieee": ("FP8 E5M2", "e5m2ieee"),
    "e4m3": ("FP8 E4M3", "e4m3fn"), "e5m2": ("FP8 E5M2", "e5m2ieee"),
}  # fmt: skip
_INTEGERS = {"int4": "INT4", "int4n": "INT4", "int8": "INT8", "int8n": "INT8"}
_ASYMMETRIC = {"uint4": "INT4 asymmetric", "uint8": "INT8 asymmetric"}
_EVEN_FLOATS = {"e1m2": "INT4", "e1m6": "INT8"}  # one exponent bit: all steps are equal
_CHANNEL_OR_TENSOR = (Blocks(1, -1), Blocks(-1, -1))
_PLAIN = {"codes", "scale", "scale_codes", "scale_scale", "zero", *INPUT_NAMES}


def exact_as(spec: PackedSpec, read: Read) -> str | None:
    """Name of a served format, of as many bits, that holds a packed weight exactly, or None.

    Only what matters is read: the codes of "e4m3" and "e5m2", whose largest numbers OCP's formats do not have; scales
    of "e1m2" and "e1m6", which become those of integers by a power of two; scales of "e2m1". Inputs are not looked at.
    None also where the values are not at hand, and for weights with 16-bit columns, another order of the columns, or in
    the Hadamard basis, which no format describes. The formats: see docs/methods.md, "Formats that are served".
    """
    weight = spec.scheme.weight
    if spec.rotated or not _PLAIN.issuperset(spec.names):
        return None
    if weight.grid in _FP8:
        return _fp8(spec, read)
    if weight.grid == "e2m1":
        return _fp4(spec, read)
    if not isinstance(weight.scale, str) or not _fits_integers(weight.blocks, spec.shape[1]):
        return None
    if weight.grid in _EVEN_FLOATS:
        return _EVEN_FLOATS[weight.grid] if _scale_moves(weight, read) else None
    if isinstance(weight.zero, str):
        return None
    return (_ASYMMETRIC if weight.zero else _INTEGERS).get(weight.grid)


def _fits_integers(blocks: Blocks, columns: int) -> bool:
    """Whether scales are per tensor, per channel, or per group of a row that is cut into equal groups."""
    return blocks in _CHANNEL_OR_TENSOR or (blocks.rows == 1 and columns % blocks.cols == 0)


def _scale_moves(spec: TensorSpec, read: Read) -> bool:
    """Whether scales can take in the step of a grid whose levels are multiples of it, without rounding."""
    scale = read("scale")
    if scale is None:
        return False
    levels = spec.numbers().levels()
    exact = scale.double() * float(levels[levels > 0].min())
    return bool((exact.to(SCALE_DTYPES[str(spec.scale)]).double() == exact).all())


def _fp8(spec: PackedSpec, read: Read) -> str | None:
    weight = spec.scheme.weight
    if not isinstance(weight.scale, str) or weight.blocks not in (*_CHANNEL_OR_TENSOR, Blocks(128, 128)):
        return None
    name, served = _FP8[weight.grid]
    if weight.grid == served:
        return name
    codes = read("codes") if spec.layout == "bytes" else None
    return name if codes is not None and _largest(codes, weight.grid) <= grid(served).top else None


def _largest(codes: Tensor, name: str) -> float:
    """The largest magnitude among `codes` of a symmetric grid, whose codes are in the order of the numbers."""
    ends = torch.stack([codes.amin(), codes.amax()])
    return float(grid(name).decode(ends).abs().max())


def _fp4(spec: PackedSpec, read: Read) -> str | None:
    """MXFP4 (OCP MX 1.0: blocks of 32, powers of two) or NVFP4 (blocks of 16, E4M3 scales times one float32)."""
    weight, columns = spec.scheme.weight, spec.shape[1]
    if not _cuts(weight.blocks, columns, 16):
        return None
    if isinstance(weight.scale, TensorSpec):
        return "NVFP4" if _is_nvfp4(weight.scale, spec, read) else None
    scale = read("scale")
    if scale is None:
        return None
    if _cuts(weight.blocks, columns, 32) and _are_e8m0(scale.double()):
        return "MXFP4"
    matrices = scale.double().reshape(-1, *scale.shape[-2:])
    return "NVFP4" if all(_one_factor(matrix) for matrix in matrices) else None


def _cuts(blocks: Blocks, columns: int, width: int) -> bool:
    """Whether blocks of `width` columns lie inside ours: a scale of ours is then theirs, repeated."""
    return columns % width == 0 and (blocks.cols == -1 or blocks.cols % width == 0)


def _is_nvfp4(scale: TensorSpec, spec: PackedSpec, read: Read) -> bool:
    """Whether quantized scales are finite E4M3 numbers with one float32 scale for a matrix."""
    rows, cols = spec.scheme.weight.blocks.counts(spec.shape)
    if scale.scale != "float32" or scale.blocks.counts((1, rows * cols)) != (1, 1):
        return False
    if scale.grid == "e4m3fn":
        return True
    codes = read("scale_codes") if scale.grid == "e4m3" else None
    return codes is not None and _largest(codes, "e4m3") <= grid("e4m3fn").top


def _are_e8m0(scale: Tensor) -> bool:
    """Whether float64 `scale` of any shape is numbers of E8M0: powers of two from 2^-127 to 2^127."""
    return bool(((scale.frexp().mantissa == 0.5) & (scale >= 2.0**-127) & (scale <= 2.0**127)).all())


def _one_factor(scale: Tensor) -> bool:
    """Whether float64 `scale` of any shape is E4M3 numbers times one float32, in exact arithmetic."""
    values, levels = scale.unique(), grid("e4m3fn").levels().to(scale.device).double()
    levels = levels[levels > 0]
    if len(values) > len(levels):
        return False
    factors = (values.max() / levels).float().double()  # one of them, as the largest scale is some level times it
    # A quotient of float32 numbers that rounds to one of 4 bits in float64 is that number.
    fits = torch.isin(values[None] / factors[:, None], levels).all(1)
    return bool((fits & (factors > 0) & factors.isfinite()).any())
