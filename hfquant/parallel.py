"""Tensor parallelism: which packed tensors are cut along which axis, and which layers cannot be cut.

transformers cuts a "colwise" layer along its outputs (rows of the matrix) and a "rowwise" one along its inputs, and
runs each rank's part with local tensors. A cut must fall between blocks and between bytes, or the ranks would read
each other's codes with the wrong scales; where it does not, loading is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from .errors import UnsupportedError
from .experts import QExperts
from .layouts import INPUT_NAMES, zeros_are_packed
from .nn import PackedModule, QLinear
from .spec import PackedSpec, TensorSpec

_COLWISE = ("colwise", "colwise_rep", "colwise_gather_output")
_ROWWISE = ("rowwise", "rowwise_rep", "rowwise_split_input")
_LAYOUTS = ("bytes", "dense")
_KEEP_WHOLE = "replicate"


def plan_packed(modules: Iterable[tuple[str, nn.Module]], plan: dict[str, str], ranks: int) -> None:
    """Add to a tensor-parallel `plan` the packed tensors that must not be cut the way their module is.

    Raises UnsupportedError with all reasons if some packed module cannot be cut into `ranks` parts.
    """
    whole: dict[str, str] = {}
    reasons = []
    for name, module in modules:
        generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        style = plan.get(generic)
        if style is None:
            continue
        if reason := why_not_split(module, style, ranks):
            reasons.append(f"{name}: {reason}")
        elif isinstance(module, QLinear):
            whole |= {f"{generic}.{tensor}": _KEEP_WHOLE for tensor in kept_whole(module.spec, style)}
    if reasons:
        shown = [*reasons[:8], *([f"and {len(reasons) - 8} more"] if len(reasons) > 8 else [])]
        raise UnsupportedError(f"this quantized model cannot be split over {ranks} ranks", shown)
    plan.update(whole)


def why_not_split(module: nn.Module, style: str, ranks: int) -> str | None:
    """Reason why a packed module cannot run in the tensor-parallel `style`, or None."""
    if isinstance(module, QExperts):
        return "packed experts are not split: leave them in full precision with modules_to_not_convert"
    if not isinstance(module, QLinear):
        return "a packed embedding table is not split: quantize without embeddings=True"
    if style not in _COLWISE + _ROWWISE:
        return f"style {style!r} is not known for packed weights"
    spec = module.spec
    if spec.layout not in _LAYOUTS:
        return f"layout {spec.layout!r} does not say how it is split"
    if isinstance(spec.scheme.weight.scale, TensorSpec):
        return "scales that are quantized themselves share blocks across the matrix: quantize without double_quant"
    return _why_not_rows(spec, ranks) if style in _COLWISE else _why_not_columns(spec, ranks)


def _why_not_rows(spec: PackedSpec, ranks: int) -> str | None:
    rows, (height, _) = spec.shape[0], spec.scheme.weight.blocks.sides(spec.shape)
    if rows % ranks:
        return f"{rows} output features do not divide into {ranks} parts"
    if height < rows and rows // ranks % height:
        return f"parts of {rows // ranks} output features cut blocks of {height} rows"
    return None


def _why_not_columns(spec: PackedSpec, ranks: int) -> str | None:
    weight, cols = spec.scheme.weight, spec.shape[1]
    part, width, bits = cols // ranks, weight.blocks.sides(spec.shape)[1], weight.numbers().bits
    if cols % ranks:
        return f"{cols} input features do not divide into {ranks} parts"
    if spec.rotated:
        return "it is quantized in a rotated basis of its input, which mixes all input features"
    if "order" in spec.names or spec.outliers:
        return "its input columns are reordered or partly kept in 16 bit"
    if width < cols and part % width:
        return f"parts of {part} input features cut groups of {width}"
    if spec.layout == "dense" and part * bits % 8:
        return f"parts of {part} codes of {bits} bits cut a byte"
    if zeros_are_packed(weight) and width < cols and part // width * bits % 8:
        return f"parts of {part // width} zero points of {bits} bits cut a byte"
    return _why_not_input(spec, part)


def _why_not_input(spec: PackedSpec, part: int) -> str | None:
    """Ranges of the input are taken where the layer runs, on one rank's part of the features, unless they are known."""
    if spec.scheme.input is None or not spec.scheme.input.dynamic:
        return None
    width = spec.scheme.input.tensor.blocks.cols
    return None if width != -1 and part % width == 0 else "the ranges of its quantized input span all input features"


def kept_whole(spec: PackedSpec, style: str) -> list[str]:
    """Packed tensors that every rank needs in full: those without an axis to cut."""
    count = spec.scheme.weight.blocks.counts(spec.shape)[0 if style in _COLWISE else 1]
    shared = ("scale", "zero") if count == 1 else ()
    return [name for name in spec.names if name in ("levels", "order", "outlier_index", *INPUT_NAMES, *shared)]


def to_local_specs(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Describe to each packed layer that was cut the part of the matrix that this rank holds."""
    for _, module in modules:
        if isinstance(module, PackedModule) and isinstance(codes := module._parameters["codes"], DTensor):
            module.spec = replace(module.spec, shape=_local_shape(codes, module.spec.shape))
            module.key = module.spec.key()
            module.is_cut = True


def _local_shape(codes: Tensor, shape: tuple[int, int]) -> tuple[int, int]:
    assert isinstance(codes, DTensor)
    (placement,) = codes.placements
    ranks = codes.device_mesh.size()
    if not isinstance(placement, Shard):
        return shape
    return (shape[0] // ranks, shape[1]) if placement.dim % 2 == 0 else (shape[0], shape[1] // ranks)
