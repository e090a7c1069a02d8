"""Several methods on one model: each is quantized, saved, reloaded and measured on the same text."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .. import api
from ..config import HfQuantConfig
from ..errors import SpecError
from ..eval import Fidelity, Reference
from ..report import versions
from ..source import load_model, original_config, stored_dtype
from .evaluate import read_batches, ticking
from .options import parse_options
from .output import method_label, progress

BASELINE = "original"


@dataclass(frozen=True)
class Row:
    """One line of the comparison; megabytes are 10^6 bytes of parameters, `coverage` a share from 0 to 1."""

    method: str
    options: dict[str, Any]
    bits_per_weight: float
    mb: float
    coverage: float
    fidelity: Fidelity
    seconds: float

    @property
    def label(self) -> str:
        """The method with the options that differ from its defaults."""
        return method_label(self.method, self.options)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"label": self.label, **asdict(self)}


def parse_methods(text: str) -> list[HfQuantConfig]:
    """Configs of a list such as "int8,nf4:double_quant=true": options follow a method after colons.

    Every name and option is looked up, so a missing plugin is an error here and not a missing row. Raises SpecError.
    """
    configs = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        method, *pairs = entry.split(":")
        configs.append(HfQuantConfig(method, **parse_options(pairs)))
    if not configs:
        raise SpecError("no methods to compare: name some, such as int8,nf4,int4")
    return configs


def compare(
    model: str | Path, data: Path, configs: Sequence[HfQuantConfig], sequences: int, length: int
) -> tuple[list[Row], dict[str, Any]]:
    """Measure the original and each config on `data`; returns the rows and the facts needed to judge them.

    All models compute in float32 on the CPU: 16-bit arithmetic would add an error of its own to every row.
    """
    started = time.perf_counter()
    model_config = original_config(model)
    dtype = stored_dtype(model, model_config)
    batches = read_batches(str(model), data, sequences, length, batch_size=16)
    with progress("reading the original", len(batches) * (len(configs) + 2)) as tick:
        original = load_model(model, dtype="float32")
        size = sum(parameter.numel() for parameter in original.parameters()) * dtype.itemsize
        reference = Reference(original, batches, cache=True, forward=ticking(tick, "measuring the original"))
        itself = reference.compare(original, ticking(tick, "measuring the original"))
        del original
        baseline = str(dtype).removeprefix("torch.")
        rows = [Row(f"{baseline} ({BASELINE})", {}, 8.0 * dtype.itemsize, size / 1e6, 0.0, itself, 0.0)]
        for config in configs:
            begun = time.perf_counter()
            with TemporaryDirectory(prefix="hfquant-demo-") as folder:
                report = api.quantize(model, config, Path(folder) / "model")
                candidate = load_model(Path(folder) / "model", dtype="float32")
                fidelity = reference.compare(candidate, ticking(tick, f"measuring {config.method}"))
            seconds = time.perf_counter() - begun
            sizes = report.bits_per_weight, report.mb_after, report.coverage.share
            rows.append(Row(config.method, config.options, *sizes, fidelity, seconds))
    facts = {
        "model": Path(model).name,
        "data": data.name,
        "sequences": sequences,
        "length": length,
        "arithmetic": "float32",
        "seconds": time.perf_counter() - started,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "device": "cpu"},
        "versions": versions(),
    }
    return rows, facts
