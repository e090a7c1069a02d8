"""Hypothesis is deterministic here: the same examples on every machine, and no deadline on busy ones."""

from hypothesis import settings

settings.register_profile("hfquant", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("hfquant")
