"""What is inside a quantized model: each layer's numbers, size and, against the original, its error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import QUANT_METHOD, HfQuantConfig
from .coverage import Coverage, survey
from .errors import FormatError, SpecError
from .nn import PackedModule
from .report import PackedWeight, packed_weights
from .source import (
    empty_model,
    headers,
    load_model,
    method_of,
    original_config,
    read_config,
    stored_dtype,
    weight_files,
)
from .spec import Scheme, TensorSpec
from .swap import packed_modules, swap_in

_DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class LayerInfo:
    """A quantized weight: its grid, who shares a scale, how it is stored, and what it takes.

    `count`: matrices in it (experts). `scale`: dtype or grid of the scales. `error`: |W - W'| / |W| in the Frobenius
    norm, None without the original.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    count: int
    grid: str
    blocks: str
    scale: str
    input: str | None
    layout: str
    bits_per_weight: float
    mb: float
    outlier_columns: int
    error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Inspection:
    """A quantized model seen layer by layer; worst first where errors are known."""

    method: str
    layers: tuple[LayerInfo, ...]
    coverage: Coverage

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        layers = [layer.to_dict() for layer in self.layers]
        return {"method": self.method, "layers": layers, "coverage": self.coverage.to_dict()}


def inspect_checkpoint(path: str | Path, reference: str | Path | None = None) -> Inspection:
    """Look into a native checkpoint. Without `reference` only its configuration and file headers are read.

    With `reference` (the original model) both are loaded, on the CPU, and every weight is compared. Raises SpecError if
    `path` holds no native checkpoint, FormatError if its tensors are not the ones its configuration promises.
    """
    config = read_config(path)
    if method_of(config) != QUANT_METHOD:
        found = method_of(config) or "not quantized"
        raise SpecError(f"{path} is no hfquant checkpoint ({found}): inspect a folder written by `hfquant quantize`")
    if reference is not None:
        original = load_model(reference, original_config(reference), dtype="auto")
        return inspect_model(load_model(path, dtype="auto"), original)
    stored = HfQuantConfig.from_dict(config.quantization_config)
    model = empty_model(config, stored_dtype(path, config))
    targets, coverage = survey(model, stored.skipped, stored.embeddings)
    swap_in(model, targets, stored.recipe, stored.outlier_columns, wait=False)
    _check_files(path, model)
    return Inspection(stored.method, tuple(_describe(weight) for weight in packed_weights(model)), coverage)


def inspect_model(model: nn.Module, reference: nn.Module | None = None) -> Inspection:
    """Look into a loaded quantized model. Raises SpecError if it is not, or if `reference` has other layers."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    config = getattr(quantizer, "quantization_config", None)
    if not isinstance(config, HfQuantConfig):
        raise SpecError(f"{type(model).__name__} was not loaded with hfquant: there is nothing to inspect")
    errors = {} if reference is None else weight_errors(model, reference)
    layers = [_describe(weight, errors.get(weight.name)) for weight in packed_weights(model)]
    if reference is not None:
        layers.sort(key=lambda layer: -(layer.error or 0.0))
    return Inspection(config.method, tuple(layers), quantizer.coverage)


def weight_errors(model: nn.Module, reference: nn.Module) -> dict[str, float]:
    """Relative error |W - W'| / |W| (Frobenius norm, float32) of each packed weight by name.

    `reference` is the model before quantization. Raises SpecError if a layer is missing there or has another shape.
    """
    found = {}
    for name, module in packed_modules(model):
        for label, leaf, quantized in _dequantized(name, module):
            original = _original(reference, name, leaf)
            if isinstance(module, PackedModule) and module.kind == "conv1d" and original is not None:
                original = original.T
            if original is None or original.shape != quantized.shape:
                shape = "nothing" if original is None else f"shape {tuple(original.shape)}"
                raise SpecError(
                    f"the reference has {shape} for {label}, the quantized model {tuple(quantized.shape)}: give the "
                    "model that it was made from"
                )
            exact = original.detach().float()
            found[label] = float((exact - quantized).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return found


def _dequantized(name: str, module: Any) -> Iterator[tuple[str, str, Tensor]]:
    """Label, parameter name and float32 values of each weight in a packed module."""
    if isinstance(module, PackedModule):
        yield name, "weight", module.qtensor().dequantize()
    else:
        for projection in module.specs:
            yield f"{name}.{projection}", projection, module.dequantize(projection, torch.float32)


def _original(reference: nn.Module, name: str, leaf: str) -> Tensor | None:
    try:
        found = getattr(reference.get_submodule(name), leaf, None)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def _describe(weight: PackedWeight, error: float | None = None) -> LayerInfo:
    scheme, spec = weight.spec.scheme, weight.spec
    return LayerInfo(
        weight.name,
        weight.kind,
        spec.shape,
        weight.count,
        scheme.weight.grid,
        blocks_name(scheme.weight),
        scheme.weight.scale if isinstance(scheme.weight.scale, str) else scheme.weight.scale.grid,
        input_name(scheme),
        spec.layout,
        weight.bits_per_weight,
        weight.bytes / 1e6,
        spec.outliers,
        error,
    )


def blocks_name(spec: TensorSpec) -> str:
    """Who shares a scale, in a word: "tensor", "row", "64" (columns of one row), "128x128"."""
    rows, cols = spec.blocks.rows, spec.blocks.cols
    if (rows, cols) == (-1, -1):
        return "tensor"
    if (rows, cols) == (1, -1):
        return "row"
    return str(cols) if rows == 1 else f"{rows}x{cols}".replace("-1", "all")


def input_name(scheme: Scheme) -> str | None:
    """How a layer's input is quantized, in a word, or None if it is not."""
    return None if scheme.input is None else f"{scheme.input.tensor.grid}/{blocks_name(scheme.input.tensor)}"


def _check_files(path: str | Path, model: nn.Module) -> None:
    """Compare the files' headers with what the model expects. A Hub repository is not downloaded for this."""
    if not Path(path).is_dir():
        return
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in weight_files(path):
        stored |= headers(file)
    tied = _tied(model)
    for name, parameter in model.named_parameters():
        if name not in stored:
            if name not in tied:
                raise FormatError(f"{path} is incomplete: no file holds the tensor {name!r}")
            continue
        dtype, shape = stored[name]
        converts = parameter.dtype in (torch.float32, torch.float16, torch.bfloat16)  # to the dtype of the model
        if shape != tuple(parameter.shape) or not (converts or _DTYPES.get(dtype) == parameter.dtype):
            expected = f"{parameter.dtype} {tuple(parameter.shape)}".removeprefix("torch.")
            raise FormatError(f"{path}: tensor {name!r} is {dtype} {shape}, its configuration says {expected}")


def _tied(model: Any) -> set[str]:
    """Names of parameters that are stored under another name."""
    return {key for pair in model.all_tied_weights_keys.items() for key in pair}
