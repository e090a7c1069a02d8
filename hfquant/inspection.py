"""What is inside a quantized model: each layer's numbers, size and, against the original, its error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Operands
from .config import QUANT_METHOD, HfQuantConfig
from .coverage import Coverage, survey
from .errors import FormatError, SpecError
from .findings import BlockFinding, LayerFinding, worst_first
from .format_counts import Counts, count_formats
from .nn import PackedModule
from .report import REPORT_NAME, PackedWeight, packed_weights
from .served_formats import Read, exact_as
from .source import empty_model, load_model, method_of, original_config, read_config, stored_dtype
from .spec import Scheme, TensorSpec
from .stored import StoredTensors
from .swap import packed_modules, swap_in, swap_in_operands


@dataclass(frozen=True)
class LayerInfo:
    """A quantized weight: its grid, who shares a scale, how it is stored, and what it takes.

    `count`: matrices in it (experts). `scale`: dtype or grid of the scales. `error`: |W - W'| / |W| in the Frobenius
    norm, None without the original. `rotated`: it is quantized in the Hadamard basis of its input. `exact_as`: a served
    format that holds this weight exactly, see `served_formats.exact_as`.

    What calibration found, None without: `output_error`: of x W^T, the largest of several experts. `tokens`: how many
    reached it, the fewest of several. `notes`: remedies and fallbacks.
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
    rotated: bool = False
    output_error: float | None = None
    tokens: int | None = None
    notes: tuple[str, ...] = ()
    exact_as: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Inspection:
    """A quantized model seen layer by layer; worst first where errors are known.

    `calibration`: what it was calibrated on. `blocks`: what was found there, None where no report lies beside the
    model, and empty for methods that are not calibrated. `operands`: grids of the operands of attention's products, by
    module and operand.
    """

    method: str
    layers: tuple[LayerInfo, ...]
    coverage: Coverage
    calibration: dict[str, Any] | None = None
    blocks: tuple[BlockFinding, ...] | None = field(default=None, compare=False)
    operands: dict[str, str] = field(default_factory=dict)

    @property
    def formats(self) -> dict[str, Counts]:
        """How many layers of each type have which grid: of the "weight", and of the "input" where it is quantized.

        "operand": how many attention modules have which grid for each operand of their products.
        """
        inputs = [(layer.name, layer.input and layer.input.partition("/")[0]) for layer in self.layers]
        return {
            "weight": count_formats((layer.name, layer.grid) for layer in self.layers),
            "input": count_formats(inputs),
            "operand": count_formats(self.operands.items()),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        layers = [layer.to_dict() for layer in self.layers]
        blocks = None if self.blocks is None else [block.to_dict() for block in self.blocks]
        found = {"formats": self.formats, "calibration": self.calibration, "blocks": blocks}
        return {"method": self.method, "layers": layers, "coverage": self.coverage.to_dict(), **found}


def inspect_checkpoint(path: str | Path, reference: str | Path | None = None) -> Inspection:
    """Look into a native checkpoint. Without `reference` only its configuration and file headers are read, and the few
    tensors that tell whether a served format is exact.

    With `reference` (the original model) both are loaded, on the CPU, and every weight is compared. What calibration
    found is read from the report that `hfquant.quantize` left in the folder. Raises SpecError if `path` holds no native
    checkpoint, FormatError if its tensors are not the ones its configuration promises, or if the report is damaged.
    """
    config = read_config(path)
    if method_of(config) != QUANT_METHOD:
        found = method_of(config) or "not quantized"
        raise SpecError(f"{path} is no hfquant checkpoint ({found}): inspect a folder written by `hfquant quantize`")
    blocks = read_findings(path)
    if reference is not None:
        _check_comparable(HfQuantConfig.from_dict(config.quantization_config))
        original = load_model(reference, original_config(reference), dtype="auto")
        return _with_findings(inspect_model(load_model(path, dtype="auto"), original), blocks)
    stored = HfQuantConfig.from_dict(config.quantization_config)
    model = empty_model(config, stored_dtype(path, config))
    targets, coverage = survey(model, stored.skipped, stored.embeddings)
    swap_in(model, targets, stored.recipe, stored)
    swap_in_operands(model, stored.attention)
    files = StoredTensors(path)
    files.check(model)
    layers = tuple(_describe(weight, partial(files.read, weight)) for weight in packed_weights(model))
    made = Inspection(stored.method, layers, coverage, stored.calibration, operands=_operands(model))
    return _with_findings(made, blocks)


def inspect_model(model: nn.Module, reference: nn.Module | None = None) -> Inspection:
    """Look into a loaded quantized model. Raises SpecError if it is not, or if `reference` has other layers."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    config = getattr(quantizer, "quantization_config", None)
    if not isinstance(config, HfQuantConfig):
        raise SpecError(f"{type(model).__name__} was not loaded with hfquant: there is nothing to inspect")
    if reference is not None:
        _check_comparable(config)
    errors = {} if reference is None else weight_errors(model, reference)
    layers = [_describe(weight, partial(_held, weight), errors.get(weight.name)) for weight in packed_weights(model)]
    if reference is not None:
        layers.sort(key=lambda layer: -(layer.error or 0.0))
    facts = (tuple(layers), quantizer.coverage, config.calibration)
    made = Inspection(config.method, *facts, operands=_operands(model))
    return _with_findings(made, quantizer.findings)


def _operands(model: nn.Module) -> dict[str, str]:
    """Grids of the operands of attention's products."""
    parts = ((name, module) for name, module in model.named_modules() if isinstance(module, Operands))
    return {f"{name}.{operand}": spec.tensor.grid for name, part in parts for operand, spec in part.specs.items()}


def read_findings(path: str | Path) -> tuple[BlockFinding, ...] | None:
    """What the report beside a model says that calibration found, None if there is no report.

    Raises FormatError for a damaged one.
    """
    file = Path(path) / REPORT_NAME
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
        return tuple(BlockFinding.from_dict(block) for block in found.get("blocks", ()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FormatError(f"{file} is damaged ({error!r}): remove it to see the model without it") from error


def _with_findings(found: Inspection, blocks: Sequence[BlockFinding] | None) -> Inspection:
    """The same with what calibration found about each layer; the worst output first, if nothing else gives an order."""
    if blocks is None:
        return found
    parts: dict[str, list[LayerFinding]] = {}
    for layer in (layer for block in blocks for layer in block.layers):
        parts.setdefault(re.sub(r"\[\d+\]$", "", layer.name), []).append(layer)
    layers = [_joined(layer, parts[layer.name]) if layer.name in parts else layer for layer in found.layers]
    if parts and all(layer.error is None for layer in layers):
        layers.sort(key=lambda layer: -(layer.output_error or 0.0))
    return replace(found, layers=tuple(layers), blocks=tuple(blocks))


def _joined(layer: LayerInfo, parts: list[LayerFinding]) -> LayerInfo:
    """A layer with the findings about its matrices."""
    single = len(parts) == 1 and parts[0].name == layer.name
    notes = tuple(note if single else f"{part.name}: {note}" for part in parts for note in part.notes)
    error = worst_first(parts)[0].error
    return replace(layer, output_error=error, tokens=min(part.tokens for part in parts), notes=notes)


def _check_comparable(config: HfQuantConfig) -> None:
    """Raise SpecError where weights are not meant to be near the original ones, because the model was rewritten."""
    if config.recipe.transforms:
        names = ", ".join(step.name for step in config.recipe.transforms)
        raise SpecError(
            f"{config.method!r} rewrote the model before quantizing it ({names}), so its weights are not near those of "
            "the reference although its outputs are: inspect it without one, which shows the output errors that "
            "calibration measured, or compare the models with `hfquant eval`"
        )


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


def _held(weight: PackedWeight, name: str) -> Tensor | None:
    """A packed tensor of a loaded model, None where it has been offloaded."""
    return None if weight.tensors[name].is_meta else weight.tensors[name]


def _describe(weight: PackedWeight, read: Read, error: float | None = None) -> LayerInfo:
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
        spec.rotated,
        exact_as=None if weight.kind == "embedding" else exact_as(spec, read),  # engines serve layers that multiply
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
    if scheme.input is None:
        return None
    static = "" if scheme.input.dynamic else " static"
    return f"{scheme.input.tensor.grid}/{blocks_name(scheme.input.tensor)}{static}"
