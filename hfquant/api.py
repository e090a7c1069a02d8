"""The functions of the package: quantize a model from folder to folder, and ask a quantized model what it is."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import processes
from .calibrate import Settings, Tick
from .config import HfQuantConfig
from .coverage import Coverage
from .errors import SpecError
from .journal import forget
from .kernel import KERNELS, declined, forced_kernel
from .quantize import works_on_blocks
from .report import REPORT_NAME, PackedWeight, Report, packed_weights, peak_rss_mb, sizes, strict_json, versions
from .source import copy_companions, dtype_named, load_model, original_config, stored_dtype
from .staging import check_output, partial_folder, put_in_place, staged
from .streaming import quantize_streamed


def quantize(
    src: str | Path,
    config: HfQuantConfig,
    out: str | Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    device_map: Any = None,
    revision: str | None = None,
    resume: bool = True,
    settings: Settings | None = None,
    tick: Tick | None = None,
) -> Report:
    """Quantize the model `src` (a folder or a Hub repository) into the folder `out`, tokenizer included.

    `dtype`: of what stays in floating point, "auto" as stored. `overwrite`: replace a model in `out`. `device_map` and
    `revision` go to `from_pretrained`. `out` appears whole or not at all.

    Methods that calibrate or transform read, quantize and write one block of the model after the other. What is
    finished is kept beside `out`: the same call goes on where a killed one stopped, and ends with the same bytes;
    `resume=False` starts over. `settings`: how to calibrate. `tick(what, share)` is called as the work goes on.

    Raises SpecError for an output folder that is not empty, a source that cannot be read, and a method that finds
    nothing to quantize; CalibrationError for calibration data that cannot be used.
    """
    if not isinstance(config, HfQuantConfig):
        raise SpecError(f'config is an HfQuantConfig, such as HfQuantConfig("int4"), got {config!r}')
    started = time.perf_counter()
    _check_request(config, device_map, settings)
    out = Path(out)
    check_output(out, overwrite, keep=src)
    model_config = original_config(src, revision)
    if works_on_blocks(config.recipe):
        return _quantize_blocks(src, config, model_config, out, dtype, revision, resume, settings, tick, started)
    config = copy.deepcopy(config)  # loading notes in it what it found in this model
    options = {"dtype": dtype, "device_map": device_map, "revision": revision}
    model = load_model(src, model_config, quantization_config=config, **options)
    found = coverage(model)
    if not found.quantized:
        raise SpecError(f"nothing in {src} can be quantized by {config.method!r}: {found.line()}")
    with staged(out) as folder:
        model.save_pretrained(folder)
        copy_companions(src, folder, revision)
        report = _report(src, config, out, started, **sizes(model, found))
        _write(report, folder)
    return report


def _report(src: str | Path, config: HfQuantConfig, out: Path, started: float, **facts: Any) -> Report:
    """The report of a quantization that began at `started`; `facts`: fields that follow from what it did."""
    return Report(
        config.method,
        config.options,
        str(src),
        str(config.source_dtype),
        **facts,
        seconds=time.perf_counter() - started,
        peak_rss_mb=peak_rss_mb(),
        output=str(out),
        versions=versions(config.plugins),
        recipe=config.recipe_file,
    )


def _write(report: Report, folder: Path) -> None:
    """Put a report beside the weights."""
    (folder / REPORT_NAME).write_text(strict_json(report.to_dict()) + "\n")


def _check_request(config: HfQuantConfig, device_map: Any, settings: Settings | None) -> None:
    """Raise SpecError for arguments that would have no effect."""
    if not works_on_blocks(config.recipe):
        if settings is not None:
            raise SpecError(f"method {config.method!r} is not calibrated: leave settings out")
    elif str(device_map) not in ("None", "cpu"):
        raise SpecError(
            f"method {config.method!r} is calibrated block by block on the CPU, device_map={device_map!r} has no place "
            "there: leave it out (--device)"
        )


def _quantize_blocks(
    src: str | Path,
    config: HfQuantConfig,
    model_config: Any,
    out: Path,
    dtype: str,
    revision: str | None,
    resume: bool,
    settings: Settings | None,
    tick: Tick | None,
    started: float,
) -> Report:
    """`quantize` for methods that work on blocks."""
    config.check_data()
    config = config.copy()
    chosen = dtype_named(dtype) or stored_dtype(src, model_config, revision)
    folder = partial_folder(out)
    findings, facts = quantize_streamed(src, config, model_config, folder, chosen, revision, resume, settings, tick)
    facts |= {"calibration": config.calibration, "blocks": tuple(findings)}
    report = _report(src, config, out, started, **facts)
    if processes.rank() == 0:
        copy_companions(src, folder, revision)
        _write(report, folder)
        put_in_place(folder, out)
        forget(out)
    processes.barrier()
    return report


def coverage(model: nn.Module) -> Coverage:
    """Which share of a quantized model's weight bytes is quantized, and what is not and why. Raises SpecError."""
    found = getattr(getattr(model, "hf_quantizer", None), "coverage", None)
    if not isinstance(found, Coverage):
        raise SpecError(
            f"{type(model).__name__} was not loaded with hfquant: pass quantization_config=HfQuantConfig(...)"
        )
    return found


@dataclass(frozen=True)
class KernelUse:
    """The kernel that runs a layer, and why each kernel of higher priority does not.

    `kernel` is None where none is able to; `declined` then holds every reason.
    """

    layer: str
    grid: str
    layout: str
    device: str
    kernel: str | None
    declined: tuple[str, ...]


def explain(model: nn.Module) -> list[KernelUse]:
    """For each quantized layer the kernel in use, and why each better one said no.

    Embeddings are looked up, not multiplied, so they have no kernel and no row. Raises SpecError for a model without
    quantized layers.
    """
    weights = [weight for weight in packed_weights(model) if weight.kind != "embedding"]
    if not weights:
        raise SpecError(f"{type(model).__name__} has no quantized layers to explain")
    return [_kernel_use(model, weight) for weight in weights]


def _kernel_use(model: nn.Module, weight: PackedWeight) -> KernelUse:
    owner = weight.name.rpartition(".")[0] if weight.kind == "experts" else weight.name
    module = model.get_submodule(owner)
    device = _execution_device(module, weight)
    reasons = declined(weight.spec, device, module.dtype)  # type: ignore[arg-type]
    able = [name for name, reason in reasons.items() if reason is None]
    chosen = forced_kernel() or max(able, key=_priority, default=None)
    if chosen is None or reasons[chosen] is not None:
        chosen, better = None, list(reasons)
    else:
        better = [name for name in reasons if _priority(name) > _priority(chosen)]
    said = tuple(reason for name in better if (reason := reasons[name]) is not None)
    return KernelUse(weight.name, weight.spec.scheme.weight.grid, weight.spec.layout, device.type, chosen, said)


def _priority(name: str) -> int:
    return KERNELS.get(name).priority


def _execution_device(module: nn.Module, weight: PackedWeight) -> torch.device:
    """Where a layer runs: offloaded weights lie on the meta device, and a hook knows where they are moved."""
    device = next(iter(weight.tensors.values())).device
    hook: Any = getattr(module, "_hf_hook", None)
    for candidate in [hook, *getattr(hook, "hooks", [])]:
        target = getattr(candidate, "execution_device", None)
        if device.type == "meta" and target is not None:
            return torch.device(target)
    return device
