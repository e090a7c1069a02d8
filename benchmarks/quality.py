"""What does each method cost in quality, and does it survive outlier channels?

Mean token KL (nats) between the bundled model and its quantized form, in float32 arithmetic, on three disjoint parts of
the held-out text. "injected" has four channels of every norm enlarged 64 times, the weights behind them divided by the
same, so that its function is the original's; each part of the text comes with other channels. "spread" scales every
channel by 2^-3 to 2^3. Writes results/quality.json.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from hfquant import HfQuantConfig
from hfquant.eval import Reference, token_batches

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.models import HELDOUT, MODEL_DIR  # noqa: E402
from tests.models.outliers import save_variants  # noqa: E402

RESULT = Path(__file__).parent / "results" / "quality.json"
SEEDS = (0, 1, 2)
SEQUENCES, LENGTH = 32, 256

WEIGHTS: dict[str, tuple[str, dict]] = {
    **{f"{method} block {size}": (method, {"block_size": size}) for method in ("int4", "nf4") for size in (32, 64, -1)},
    "int4 block 64 mse": ("int4", {"block_size": 64, "range": "mse"}),
    "int4 block 64 asymmetric": ("int4", {"block_size": 64, "symmetric": False}),
    "nf4 block 64 double_quant": ("nf4", {"block_size": 64, "double_quant": True}),
    "e2m1 block 64": ("e2m1", {"block_size": 64}),
    "fp4 block 64": ("fp4", {"block_size": 64}),
    "quantile4 block 64": ("quantile4", {"block_size": 64}),
    "int3 block 64": ("int3", {"block_size": 64}),
    "int3 block 64 outliers 0.02": ("int3", {"block_size": 64, "outliers": 0.02}),
    "int8 channel": ("int8", {}),
    "dynamic8 channel": ("dynamic8", {}),
}
INPUTS: dict[str, tuple[str, dict]] = {
    "int8 vector-wise": ("llm_int8", {"threshold": None}),
    "llm_int8": ("llm_int8", {}),
    "fp8 channel": ("fp8", {}),
    "fp8 tensor": ("fp8", {"granularity": "tensor"}),
    "fp8 tile": ("fp8", {"granularity": "tile"}),
}


def kl_of(reference: Reference, source: Path, method: str, options: dict) -> float:
    """Mean token KL of the model in `source` under a method."""
    config = HfQuantConfig(method, **options)
    model = LlamaForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    return reference.compare(model).kl


def main() -> None:
    """Measure, print, write."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    text = HELDOUT.read_text()
    size = len(text) // len(SEEDS)
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for seed in SEEDS:
            part = text[seed * size : (seed + 1) * size]
            model = LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
            reference = Reference(model, token_batches(tokenizer, part, SEQUENCES, LENGTH))
            sources = save_variants(MODEL_DIR, Path(name), seed)
            for row, (method, options) in WEIGHTS.items():
                rows.setdefault(row, []).append(kl_of(reference, MODEL_DIR, method, options))
            for row, (method, options) in INPUTS.items():
                for variant, source in sources.items():
                    rows.setdefault(f"{row}, {variant}", []).append(kl_of(reference, source, method, options))
    result = {
        "question": __doc__.splitlines()[0],
        "command": "python benchmarks/quality.py",
        "seeds": SEEDS,
        "tokens": SEQUENCES * (LENGTH - 1),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("hfquant", "torch", "transformers")},
        "kl": {row: {"mean": mean(values), "by_seed": values} for row, values in rows.items()},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for row, values in rows.items():
        print(f"{row:32s} {mean(values):9.5f}   " + "  ".join(f"{value:.5f}" for value in values))


if __name__ == "__main__":
    main()
