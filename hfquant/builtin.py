"""The core's own backend: what the tables hold before any plugin is asked."""

from __future__ import annotations

from . import codebooks, columns, layouts, presets, ranges, rounders
from .backend import Backend, register
from .kernel import REFERENCE

CORE = Backend(
    "core",
    grids=codebooks.BUILTIN,
    layouts=layouts.BUILTIN,
    kernels=(REFERENCE,),
    ranges=ranges.BUILTIN,
    rounders=rounders.BUILTIN,
    columns=columns.BUILTIN,
    presets=presets.BUILTIN,
)

register(CORE, "hfquant")
