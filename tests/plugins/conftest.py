"""The trained model and its copy with injected outlier channels, and how far quantization takes each from itself."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hfquant import HfQuantConfig
from hfquant.eval import Reference, token_batches

MODELS = Path(__file__).parents[1] / "models"
TRAINED = Path(os.environ.get("HFQUANT_TEST_MODEL", MODELS / "tiny-llama"))
SEQUENCES, LENGTH = 16, 256


def _module(path: Path) -> ModuleType:
    """Import a file of tests/models, which is no package that other tests could import."""
    spec = importlib.util.spec_from_file_location(f"models_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def batches() -> list[Tensor]:
    """Held-out token ids, two batches [8, 256]."""
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    return token_batches(tokenizer, MODELS / "heldout.txt", SEQUENCES, LENGTH)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the trained model: "plain", and "injected" with 4 channels 64 times larger and the same logits."""
    model = AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.bfloat16)
    folders = {name: tmp_path_factory.mktemp(name) for name in ("plain", "injected")}
    model.save_pretrained(folders["plain"])
    _module(MODELS / "outliers.py").inject(model, factor=64.0, channels=4).save_pretrained(folders["injected"])
    return folders


@pytest.fixture(scope="session")
def quantized(trained: dict[str, Path]) -> Callable[..., PreTrainedModel]:
    """Load one of the trained models, quantized by a method with options, computing in float32."""

    def load(which: str, method: str, **options: Any) -> PreTrainedModel:
        config = HfQuantConfig(method, **options)
        return AutoModelForCausalLM.from_pretrained(trained[which], dtype=torch.float32, quantization_config=config)

    return load


@pytest.fixture(scope="session")
def kl(
    trained: dict[str, Path], batches: list[Tensor], quantized: Callable[..., PreTrainedModel]
) -> Callable[..., float]:
    """KL(full precision || quantized) per token, of one of the trained models by a method with options; remembered."""
    model = AutoModelForCausalLM.from_pretrained(trained["plain"], dtype=torch.float32)
    reference = Reference(model, batches)
    known: dict[str, float] = {}

    def measure(which: str, method: str, **options: Any) -> float:
        key = f"{which} {method} {options}"
        if key not in known:
            known[key] = reference.compare(quantized(which, method, **options)).kl
        return known[key]

    return measure
