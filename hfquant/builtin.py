"""The core's own backend: what the tables hold before any plugin is asked."""

from __future__ import annotations

from . import (
    codebooks,
    columns,
    cpu,
    gpu,
    input_ranges,
    layouts,
    presets,
    ranges,
    rotation,
    rounders,
    smooth,
    w8a8,
    weighted_ranges,
)
from .backend import Backend, register
from .compiled import ROUNDINGS
from .kernel import REFERENCE

CORE = Backend(
    "core",
    grids=codebooks.BUILTIN,
    layouts=layouts.BUILTIN,
    kernels=(REFERENCE, cpu.KERNEL, *gpu.KERNELS),
    ranges={**ranges.BUILTIN, **weighted_ranges.BUILTIN},
    input_ranges=input_ranges.BUILTIN,
    rounders=rounders.BUILTIN,
    columns=columns.BUILTIN,
    transforms={**rotation.BUILTIN, **smooth.BUILTIN},
    presets={**presets.BUILTIN, **w8a8.BUILTIN},
)

register(CORE, "hfquant")
for _rounding in (cpu.ROUNDING, gpu.ROUNDING):
    ROUNDINGS.add(_rounding.name, _rounding, "hfquant")
