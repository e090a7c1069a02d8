"""How fast is a quantized language model on a CPU, from the first token to the last?

A Llama of 0.85 billion random parameters (hidden size 2048, 16 layers, 5632 inside the MLP, 32 heads, 8 of them for
keys and values, a vocabulary of 32000) in bfloat16, and the same quantized by hfquant and by bitsandbytes, all through
transformers. "decode": seconds for a token after a prompt of 32, "prefill": seconds for a prompt of 512 tokens; models
take turns within one run, figures are medians. "load": seconds to read the model and run it once, in a process of its
own, with its files in memory. Writes results/cpu_decode_ISA.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import facts, result_of
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import hfquant
from hfquant import HfQuantConfig
from hfquant.report import peak_rss_mb

PROMPT, PREFILL, TOKENS, ROUNDS = 32, 512, 12, 5
METHODS: dict[str, dict[str, Any]] = {"int4": {"group_size": 64}, "nf4": {}, "int8": {}, "w8a8": {"transform": None}}
HEAD, OPTIMIZED = " and lm_head", ", optimized"
# Rows besides those of METHODS; what is optimized shares its weights with the row of the same name without it.
MORE = [
    f"int4{OPTIMIZED}",
    f"int4{HEAD}",
    f"int4{HEAD}{OPTIMIZED}",
    f"nf4{OPTIMIZED}",
    f"nf4{HEAD}",
    f"nf4{HEAD}{OPTIMIZED}",
]
ABOUT_MORE = (
    '"and lm_head": the output layer is quantized like the others (`modules_to_not_convert=[]`); "optimized": after '
    "`hfquant.optimize(model)`."
)
LOADS = ("bf16", "nf4, quantized before", "nf4, on the fly", "bitsandbytes nf4, on the fly")


def config() -> LlamaConfig:
    """The model's shape."""
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
    )


def bitsandbytes_config() -> Any:
    """NF4 as bitsandbytes has it."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def load(name: str, folder: Path) -> Any:
    """A model by the name it has in the results."""
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if name == "nf4, quantized before":
        return AutoModelForCausalLM.from_pretrained(folder / "nf4", **options)
    method, head, _ = name.partition(",")[0].partition(HEAD)
    if method.startswith("bitsandbytes"):
        options["quantization_config"] = bitsandbytes_config()
    elif method != "bf16":
        whole: dict[str, Any] = {"modules_to_not_convert": []} if head else {}
        options["quantization_config"] = HfQuantConfig(method, **METHODS[method], **whole)
    return AutoModelForCausalLM.from_pretrained(folder / "bf16", **options)


def optimized(model: Any) -> Any:
    """The model after `hfquant.optimize`, a copy with the same weights in memory."""
    made = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    hfquant.optimize(made)
    return made


def decode(model: Any) -> Callable[[], float]:
    """Seconds a token: the prompt first, then one token after the other."""

    def run() -> float:
        out = model(torch.arange(PROMPT)[None] + 5, use_cache=True)
        started = time.perf_counter()
        for _ in range(TOKENS):
            token: Tensor = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return (time.perf_counter() - started) / TOKENS

    return run


def prefill(model: Any) -> Callable[[], float]:
    """Seconds for the whole prompt."""
    ids = torch.randint(0, 32000, (1, PREFILL), generator=torch.Generator().manual_seed(0))

    def run() -> float:
        started = time.perf_counter()
        model(ids, use_cache=True)
        return time.perf_counter() - started

    return run


def loaded(name: str, folder: str) -> None:
    """Load a model in this process and print what it took."""
    started = time.perf_counter()
    model = load(name, Path(folder))
    model(torch.arange(4)[None])  # what is read when it is used belongs to it
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_mb": peak_rss_mb()}))


@torch.no_grad()
def main() -> None:
    """Measure, print, write."""
    target = result_of("cpu_decode")  # or an error, before anything takes time
    logging.disable_progress_bar()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        LlamaForCausalLM(config()).to(torch.bfloat16).save_pretrained(folder / "bf16")
        hfquant.quantize(folder / "bf16", HfQuantConfig("nf4"), folder / "nf4")
        loads = {name: in_process(name, folder) for _ in range(2) for name in LOADS}  # the second reads from memory
        models: dict[str, Any] = {}
        for name in ["bf16", *METHODS, *MORE]:
            plain = name.removesuffix(OPTIMIZED)
            models[name] = load(name, folder) if name == plain else optimized(models[plain])
        try:
            models["bitsandbytes nf4"] = load("bitsandbytes nf4", folder)
        except (ImportError, RuntimeError) as error:
            print(f"bitsandbytes does not run here: {error}")
    rows: dict[str, dict[str, Any]] = {name: {} for name in models}
    for what, make in (("decode", decode), ("prefill", prefill)):
        runs = {name: make(model) for name, model in models.items()}
        found: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(ROUNDS + 1):
            for name, run in runs.items():
                seconds = run()
                if turn:
                    found[name].append(seconds)
        for name, values in found.items():
            rows[name][what] = median(values)
            rows[name][f"{what}_times"] = median(found["bf16"]) / median(values)
            print(f"{what:8s} {name:27s} {1e3 * median(values):8.1f} ms  {rows[name][f'{what}_times']:.2f}", flush=True)
    result = {**facts(str(__doc__), __file__), "rows": rows, "loads": loads}
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    target.with_suffix(".md").write_text(markdown(result))


def in_process(name: str, folder: Path) -> dict[str, float]:
    """`loaded` in a fresh process."""
    command = [sys.executable, __file__, "--load", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"load     {name:30s} {found['seconds']:6.1f} s  {found['peak_mb']:6.0f} MB", flush=True)
    return found


def markdown(result: dict[str, Any]) -> str:
    """The tables as text."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    about = " ".join(str(__doc__).split("\n\n")[1].split()).partition(" Writes ")[0]
    about += f" {ABOUT_MORE}" if any(OPTIMIZED in name for name in result["rows"]) else ""
    out = ["# A language model on a CPU", "", "Made by `benchmarks/cpu_decode.py`; do not edit.", "", about, ""]
    out += ["| model | tokens/s | times bf16 | prefill, tokens/s | times bf16 |", "|---|---|---|---|---|"]
    for name, row in result["rows"].items():
        speed, prompt = 1 / row["decode"], PREFILL / row["prefill"]
        out.append(f"| {name} | {speed:.1f} | {row['decode_times']:.2f} | {prompt:.0f} | {row['prefill_times']:.2f} |")
    out += ["", "| load | seconds | peak MB |", "|---|---|---|"]
    out += [f"| {name} | {row['seconds']:.1f} | {row['peak_mb']:.0f} |" for name, row in result["loads"].items()]
    machine = result["machine"]
    return "\n".join([*out, "", f"{machine['processor']}, {machine['threads']} threads; {versions}.", ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", nargs=2, metavar=("MODEL", "FOLDER"), help="only load a model, in this process")
    given = parser.parse_args().load
    loaded(*given) if given else main()
