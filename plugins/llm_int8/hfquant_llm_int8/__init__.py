"""LLM.int8 for hfquant: 8-bit weights and activations, with 16-bit columns for the few that 8 bits cannot hold."""

from hfquant.backend import Backend

from .calibrate import find_outliers
from .columns import keep_columns
from .preset import llm_int8

backend = Backend("llm_int8", columns={"llm_int8": keep_columns}, presets={"llm_int8": llm_int8})

__all__ = ["backend", "find_outliers", "keep_columns", "llm_int8"]
