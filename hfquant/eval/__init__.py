"""Measure a quantized model against the model it came from: fidelity, perplexity, intervals."""

# Not the function `perplexity`: under this package its name would hide the module of the same name.

from .fidelity import Fidelity, Reference
from .perplexity import bootstrap_mean, paired_bootstrap, sequence_nll
from .text import check_vocabulary, token_batches

__all__ = [
    "Fidelity",
    "Reference",
    "bootstrap_mean",
    "check_vocabulary",
    "paired_bootstrap",
    "sequence_nll",
    "token_batches",
]
