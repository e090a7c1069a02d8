"""How long does FPQ take, next to GPTQ on the bundled model, and on the layers of a 7B model?

1. Weights of 4 bits and inputs as they are, the bundled model, 128 samples of 256 tokens: seconds from the first byte
   read to the finished model, FPQ and GPTQ in turns, medians of three after a run of each that does not count.
2. Layers of LLaMA-7B (32 blocks, hidden size 4096, 11008 inside the MLP) with random weights: seconds to gather the
   statistics of an input for each token, and seconds to search the formats and largest values of a weight. With the
   seconds that a block takes to run in bfloat16, these give the time of the whole model on 32 samples of 1024 tokens,
   the calibration data of the reference implementation. The sum leaves out reading and writing the files.
3. As a check, one such block quantized from beginning to end.
Writes results/fpq_time.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import RESULTS, calibration, facts, training_files
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hfquant import HfQuantConfig
from hfquant.calibrate import Calibration
from hfquant.coverage import survey
from hfquant.ranges import RANGES
from hfquant.spec import TensorSpec
from hfquant.stats import CHANNELS, HESSIAN, InputStats, Stats
from hfquant_fpq.preset import fpq
from tests.models import MODEL_DIR

BLOCKS, HIDDEN, INNER = 32, 4096, 11008
SAMPLES, LENGTH, AT_ONCE = 32, 1024, 4
TIMES_GPTQ, HOURS = 3.0, 2.0  # bars
SHAPES = {"q, k, v, o": (HIDDEN, HIDDEN, 4), "gate, up": (INNER, HIDDEN, 2), "down": (HIDDEN, INNER, 1)}
INPUTS = {HIDDEN: 3, INNER: 1}  # inputs of a block by their width: of q, k and v, of o, of gate and up; of down


def timed(run: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def small() -> dict[str, Any]:
    """The bundled model: seconds of both methods."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    data = calibration(tokenizer, training_files(), 0, 128, 256)
    asked = {"data": data, "samples": 128, "length": 256, "batch_size": 16}
    configs = {
        "FPQ": lambda: HfQuantConfig("fpq", **asked),
        "GPTQ": lambda: HfQuantConfig("gptq", bits=4, group_size=-1, **asked),
    }
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for turn in range(4):
        for name, config in configs.items():
            took = timed(lambda: LlamaForCausalLM.from_pretrained(MODEL_DIR, quantization_config=config()))  # noqa: B023
            if turn:
                seconds[name].append(took)
    medians = {name: median(values) for name, values in seconds.items()}
    return {"seconds": seconds, "medians": medians, "ratio": medians["FPQ"] / medians["GPTQ"], "bar": TIMES_GPTQ}


def statistics(width: int) -> tuple[float, InputStats]:
    """Seconds for each token, without the first ones, and the statistics themselves."""
    stats = InputStats(width, frozenset({CHANNELS, HESSIAN}))
    size = torch.randn(width, generator=torch.Generator().manual_seed(1)).exp()
    rows = (torch.randn(AT_ONCE * LENGTH, width, generator=torch.Generator().manual_seed(2)) * size).bfloat16()
    stats.add(rows)
    return timed(lambda: stats.add(rows)) / len(rows), stats


def search(rows: int, columns: int, stats: InputStats) -> float:
    """Seconds to find the format and the largest values of a weight [rows, columns]."""
    stats.memo.clear()
    step, spec = fpq().range, fpq().scheme.weight
    assert isinstance(spec, TensorSpec)
    w = (0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))).bfloat16()
    return timed(lambda: RANGES.get(step.name)(w, spec, Stats("layer", inputs=stats), **step.options))


def block_model() -> LlamaForCausalLM:
    """One block of LLaMA-7B with random weights, between small embeddings and a small output layer."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=32
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def large() -> dict[str, Any]:
    """The layers of a 7B model, the sum, and one block as a check."""
    tokens = SAMPLES * LENGTH
    per_token, searched = {}, {}
    for width in INPUTS:
        per_token[width], stats = statistics(width)
        for name, (rows, columns, _) in SHAPES.items():
            if columns == width:
                searched[name] = search(rows, columns, stats)
                print(f"{name}: {rows} x {columns} searched in {searched[name]:.1f} s", flush=True)
        print(f"{width} wide: {1e6 * per_token[width]:.0f} us for each token", flush=True)
        del stats
    model = block_model()
    ids = torch.randint(256, (AT_ONCE, LENGTH), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        model(ids)
        forward = timed(lambda: model(ids)) / ids.numel()
    print(f"a block runs in {1e6 * forward:.0f} us for each token", flush=True)
    parts = {
        "statistics": sum(count * per_token[width] for width, count in INPUTS.items()) * tokens,
        "search": sum(count * searched[name] for name, (_, _, count) in SHAPES.items()),
        # The quantized model runs about 1.5 times through a block: its first part is not run again.
        "running": 1.5 * forward * tokens,
    }
    hours = BLOCKS * sum(parts.values()) / 3600
    data = [{"input_ids": ids.roll(shift, 1)} for shift in range(SAMPLES // AT_ONCE)]
    block = timed(lambda: quantize(model, data))
    return {
        "calibration_tokens": tokens,
        "statistics_us_per_token": {str(width): 1e6 * seconds for width, seconds in per_token.items()},
        "search_seconds": searched,
        "block_us_per_token": 1e6 * forward,
        "seconds_per_block": parts,
        "hours": hours,
        "bar": HOURS,
        "one_block_measured_seconds": block,
        "hours_from_that_block": BLOCKS * block / 3600,
    }


def quantize(model: LlamaForCausalLM, data: list[dict[str, torch.Tensor]]) -> None:
    """Quantize the only block of a model."""
    config = HfQuantConfig("fpq", data=data)
    Calibration(model, survey(model, None, False)[0], config, data).run()


def main() -> None:
    """Measure, print, write; exit status 1 if a bar is missed."""
    logging.disable_progress_bar()
    result = {**facts(str(__doc__), __file__), "small": small()}
    print(json.dumps(result["small"], indent=1), flush=True)
    result["large"] = large()
    (RESULTS / "fpq_time.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["large"], indent=1))
    missed = [name for name, key in (("small", "ratio"), ("large", "hours")) if result[name][key] > result[name]["bar"]]
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
