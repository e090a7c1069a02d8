"""GPTQ for hfquant: weights rounded one column after the other, each making up for the errors of those before it."""

from hfquant.backend import Backend

from . import preset, rounder
from .hessian import Factor, factorize

backend = Backend("gptq", rounders={"gptq": rounder.gptq}, presets={"gptq": preset.gptq})

__all__ = ["Factor", "backend", "factorize"]
