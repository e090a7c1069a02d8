"""What a quantization cost and saved: bits, bytes, coverage, time, memory, and the versions behind it."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .coverage import Coverage
from .experts import QExperts
from .findings import BlockFinding
from .nn import PackedModule
from .spec import PackedSpec
from .swap import packed_modules

REPORT_NAME = "quantization_report.json"
_DISTRIBUTIONS = ("hfquant", "torch", "transformers", "accelerate", "safetensors", "peft")


@dataclass(frozen=True)
class PackedWeight:
    """One packed weight of a model: its layer's name, its tensors by name, and what they mean.

    `count`: matrices in it, the number of experts for a fused weight.
    """

    name: str
    kind: str
    tensors: dict[str, Tensor]
    spec: PackedSpec
    count: int = 1

    @property
    def bytes(self) -> int:
        """Bytes of all its tensors."""
        return total_bytes(self.tensors.values())

    @property
    def weights(self) -> int:
        """Number of weights it stands for."""
        return self.count * self.spec.shape[0] * self.spec.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales and all other overhead included."""
        return 8 * self.bytes / self.weights


def packed_weights(model: nn.Module) -> list[PackedWeight]:
    """Every packed weight of a model; of fused experts, one for each projection."""
    found = []
    for name, module in packed_modules(model):
        if isinstance(module, PackedModule):
            tensors = dict(zip(module.spec.names, module.packed(), strict=True))
            found.append(PackedWeight(name, module.kind, tensors, module.spec))
            continue
        for projection, spec in module.specs.items():
            tensors = {key: _parameter(module, f"{projection}_{key}") for key in spec.names}
            count = next(iter(tensors.values())).shape[0]
            found.append(PackedWeight(f"{name}.{projection}", "experts", tensors, spec, count))
    return found


def _parameter(module: QExperts, name: str) -> Tensor:
    found = module._parameters[name]
    assert found is not None
    return found


def strict_json(data: Any) -> str:
    """JSON that every parser reads: infinities (an interval of one sequence, no threshold) become null."""
    return json.dumps(_finite(data), indent=2, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and math.isinf(data) else data


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors on any device, the meta device included."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Report:
    """What `hfquant.quantize` did; also written to quantization_report.json.

    Megabytes are 10^6 bytes of parameters. `bits_per_weight` counts everything stored for the quantized weights.
    `seconds`: loading, quantizing and saving together. `peak_rss_mb`: largest resident memory of the process so far,
    None where the system does not tell. `calibration`: what the method looked at. `blocks`: what it found there.
    `estimate`: in a preview, what calibrating is going to take. `recipe`: name and SHA-256 of the recipe file, if one
    was read; options given beside it win, `options` holds what counted.
    """

    method: str
    options: dict[str, Any]
    source: str
    dtype: str
    bits_per_weight: float
    mb_before: float
    mb_after: float
    coverage: Coverage
    seconds: float | None = None
    peak_rss_mb: float | None = None
    output: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    blocks: tuple[BlockFinding, ...] = ()
    estimate: dict[str, Any] | None = None
    recipe: dict[str, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = {name: value for name, value in vars(self).items() if name != "estimate" or value is not None}
        blocks = [block.to_dict() for block in self.blocks]
        return {**plain, "coverage": self.coverage.to_dict(), "blocks": blocks}


def sizes(model: nn.Module, coverage: Coverage) -> dict[str, Any]:
    """The fields of a report that follow from a quantized model: bits, megabytes, coverage."""
    weights = packed_weights(model)
    stored, count = sum(weight.bytes for weight in weights), sum(weight.weights for weight in weights)
    return {
        "bits_per_weight": 8 * stored / count if count else 0.0,
        "mb_before": coverage.total / 1e6,
        "mb_after": total_bytes(model.parameters()) / 1e6,
        "coverage": coverage,
    }


def versions(plugins: dict[str, dict[str, str]] | None = None) -> dict[str, str]:
    """Versions of Python, the system, the libraries that are installed, and the plugins given."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {f"backend {name}": source["version"] for name, source in (plugins or {}).items()}


def peak_rss_mb() -> float | None:
    """Largest resident memory of this process so far in MB (10^6 bytes), or None where the system does not tell.

    Linux tells it in /proc; what `getrusage` says there includes the process that this one was started from.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes on macOS, KiB elsewhere
