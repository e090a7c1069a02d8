"""How the measurements of calibrated methods judge a row: seeds, each with its own data, and the KL to the original."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from hfquant import HfQuantConfig
from hfquant.eval import Reference, token_batches
from tests.models import HELDOUT, MODEL_DIR
from tests.models.outliers import save_variants

from . import calibration, facts, training_files

SEEDS = (0, 1, 2)
SAMPLES, LENGTH = 128, 256  # of the calibration data
SEQUENCES = 32  # of held-out text, of LENGTH tokens too


@dataclass(frozen=True)
class Trial:
    """What a seed decides: `reference` on a part of the held-out text, `sources` by variant, calibration `data`."""

    seed: int
    reference: Reference
    sources: dict[str, Path]
    data: list[Tensor]

    def kl(self, method: str, options: dict[str, Any], variant: str) -> float:
        """Mean token KL (nats) of a quantized variant of the bundled model, in float32 arithmetic."""
        config = HfQuantConfig(method, **options)
        if config.needs_data:
            config = HfQuantConfig(method, **options, data=self.data, samples=SAMPLES, length=LENGTH, batch_size=16)
        source = self.sources[variant]
        model = LlamaForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
        return self.reference.compare(model).kl


def trials() -> Iterator[Trial]:
    """One trial for each seed; the files of `sources` are gone when the iteration is."""
    tokenizer, files, text = AutoTokenizer.from_pretrained(MODEL_DIR), training_files(), HELDOUT.read_text()
    size = len(text) // len(SEEDS)
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            model = LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
            part = text[seed * size : (seed + 1) * size]
            reference = Reference(model, token_batches(tokenizer, part, SEQUENCES, LENGTH), cache=True)
            sources = save_variants(MODEL_DIR, Path(folder), seed)
            yield Trial(seed, reference, sources, calibration(tokenizer, files, seed, SAMPLES, LENGTH))


def setting(question: str, script: str) -> dict[str, Any]:
    """What it takes to judge the figures of a script."""
    return {
        **facts(question, script),
        "seeds": SEEDS,
        "tokens": SEQUENCES * (LENGTH - 1),
        "calibration": {"samples": SAMPLES, "length": LENGTH},
    }
