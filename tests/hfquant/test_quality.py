"""On a trained model the known order of methods holds: better grids and smaller blocks stay closer to the original."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfquant import HfQuantConfig
from hfquant.eval import Fidelity, Reference, token_batches

MODELS = Path(__file__).parents[1] / "models"
MODEL = MODELS / "tiny-llama"


@cache
def reference() -> Reference:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return Reference(model, token_batches(tokenizer, MODELS / "heldout.txt", sequences=16, length=256))


@cache
def fidelity(method: str, block_size: int) -> Fidelity:
    """Fidelity on 16 x 256 tokens of text that the model was not trained on."""
    config = HfQuantConfig(method, block_size=block_size)
    return reference().compare(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, quantization_config=config)
    )


def test_nf4_is_closer_than_integers_of_the_same_size() -> None:
    # e1m2 is the narrow four-bit integer grid: 15 levels at equal distances.
    assert fidelity("nf4", 64).kl < fidelity("e1m2", 64).kl


@pytest.mark.parametrize("method", ["int4", "nf4"])
def test_smaller_blocks_are_closer(method: str) -> None:
    divergence = [fidelity(method, size).kl for size in (32, 64, -1)]
    assert divergence == sorted(divergence) and divergence[0] < divergence[-1]


def test_eight_bits_are_far_closer_than_four() -> None:
    assert 30 * fidelity("int8", -1).kl < fidelity("int4", -1).kl
    assert fidelity("int8", -1).top1 > fidelity("int4", -1).top1
