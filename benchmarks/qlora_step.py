"""How long is a step of QLoRA on a CPU, and how much memory does it take, next to LoRA in 16 bit and bitsandbytes?

A Llama of 0.85 billion random parameters (hidden size 2048, 16 layers, 5632 inside the MLP, 32 heads, 8 of them for
keys and values, a vocabulary of 32000) in bfloat16, with adapters of rank 16 in float32 on every linear layer of its
blocks, AdamW. "seconds": for a step, forward, backward and update; models take turns within one run, figures are
medians; "times": how many of its own steps a model does in one of bitsandbytes', the median over rounds, and the same
by processor time, which others on the machine disturb less. "memory": the largest resident memory of a process of its
own, less what it had once all was imported, while a model that was quantized before is loaded and while it trains.
Pages of mapped files are left out, and parameters copied out of them, so that all of a model counts and nothing else of
its files; the allocator maps everything from 256 kB on by itself (MALLOC_MMAP_THRESHOLD_), so that what is freed goes
back. The largest of three processes counts. Writes results/qlora_step_ISA.json and .md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import facts, result_of
from cpu_decode import config
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM
from transformers.utils import logging

from hfquant import HfQuantConfig

PLAIN, PEER = "16-bit LoRA", "bitsandbytes nf4"
MODELS = (PLAIN, "hfquant nf4", "hfquant int4", PEER)
CHECKPOINTED = ", checkpointed"
# Sequences x tokens, and how many rounds of steps are timed.
TIMED = {f"1 x 128{CHECKPOINTED}": 5, "1 x 128": 4, f"1 x 512{CHECKPOINTED}": 3}
MEASURED = (f"1 x 128{CHECKPOINTED}", f"1 x 512{CHECKPOINTED}")
PROCESSES = 3  # for each model's memory
BARS = {"times": 1.5, "of 16-bit LoRA": 0.5, "of bitsandbytes": 1.05}


def saved(name: str, folder: Path) -> Path:
    """The folder of a model that is quantized already, made from the original in `folder` if it is not there."""
    if name == PLAIN:
        return folder
    place = folder / name.replace(" ", "-")
    if not (place / "config.json").exists():
        quantized(name, folder).save_pretrained(place)
    return place


def quantized(name: str, folder: Path) -> Any:
    """A model by the name it has in the results, from the original in `folder`."""
    quantization: dict[str, Any] = {
        PLAIN: None,
        "hfquant nf4": HfQuantConfig("nf4", double_quant=True),
        "hfquant int4": HfQuantConfig("int4", group_size=64),
        PEER: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    }
    options = {"dtype": torch.bfloat16, "quantization_config": quantization[name]}
    return AutoModelForCausalLM.from_pretrained(folder, **{k: v for k, v in options.items() if v is not None})


def load(name: str, folder: Path) -> Any:
    """A model that is quantized already, with new adapters, as it is trained."""
    base = AutoModelForCausalLM.from_pretrained(saved(name, folder), dtype=torch.bfloat16)
    base.config.use_cache = False
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def steps(model: Any) -> Callable[[str], float]:
    """What does one step on a batch, by its name, and returns its loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(batch: str) -> float:
        size, _, how = batch.partition(",")
        count, length = map(int, size.split(" x "))
        if how:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        else:
            model.gradient_checkpointing_disable()
        model.train()
        ids = torch.randint(0, 32000, (count, length), generator=torch.Generator().manual_seed(0))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


class Peak:
    """The largest memory that this process had of its own within the block, in MB (10^6 bytes), looked at every 3 ms.

    Pages of files that are mapped are left out: whether they count as resident is up to the system.
    """

    def __enter__(self) -> Peak:
        self.size, self._done = own(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.003):
            self.size = max(self.size, own())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def own() -> float:
    """Resident memory of this process that is no file's, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon:"))


def memory(name: str, folder: str) -> None:
    """Load a model in this process, train it, and print what that took."""
    if name == PEER:
        import bitsandbytes  # noqa: F401
    before = own()
    with Peak() as peak:
        model = load(name, Path(folder))
        for parameter in model.parameters():  # pages of the checkpoint until now
            parameter.data = parameter.data.clone()
    found, step = {"imports": before, "loading": peak.size - before}, steps(model)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading has freed, and the allocator kept, is not needed to train
    for batch in MEASURED:
        with Peak() as peak:
            for _ in range(2 if batch == MEASURED[0] else 1):  # the first makes what the optimizer keeps
                step(batch)
        found[batch] = peak.size - before
    print(json.dumps(found))


def in_process(name: str, folder: Path) -> dict[str, float]:
    """`memory` in fresh processes: the largest figures."""
    saved(name, folder)
    runs: list[dict[str, float]] = []
    for _ in range(PROCESSES):
        done = subprocess.run(
            [sys.executable, __file__, "--memory", name, str(folder)], capture_output=True, text=True, check=True,
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"},
        )  # fmt: skip
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    found = {what: max(run[what] for run in runs) for what in runs[0]}
    found["spread"] = max(max(run[what] for run in runs) - min(run[what] for run in runs) for what in runs[0])
    print(f"{name:18s} " + "  ".join(f"{what} {size:.0f} MB" for what, size in found.items()), flush=True)
    return found


def timed(folder: Path) -> dict[str, dict[str, Any]]:
    """Seconds of steps by batch and model, and losses."""
    models = {name: steps(load(name, folder)) for name in MODELS}
    rows: dict[str, dict[str, Any]] = {}
    for batch, rounds in TIMED.items():
        found: dict[str, list[float]] = {name: [] for name in models}
        busy: dict[str, list[float]] = {name: [] for name in models}
        losses: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(rounds + (not rows)):  # the very first is not counted
            for name, step in models.items():
                started, worked = time.perf_counter(), time.process_time()
                losses[name].append(step(batch))
                if turn or rows:
                    found[name].append(time.perf_counter() - started)
                    busy[name].append(time.process_time() - worked)
        rows[batch] = {
            name: {
                "seconds": median(values),
                "times": _times(found[PEER], values),
                "processor_times": _times(busy[PEER], busy[name]),
                "rounds": values,
                "processor_rounds": busy[name],
                "losses": [losses[name][0], losses[name][-1]],
            }
            for name, values in found.items()
        }
        for name, row in rows[batch].items():
            print(
                f"{batch:25s} {name:18s} {row['seconds']:6.2f} s  {row['times']:.2f} {row['processor_times']:.2f}",
                flush=True,
            )
    return rows


def _times(peer: list[float], own: list[float]) -> float:
    """Median of how many times faster than the peer, round by round."""
    return median(a / b for a, b in zip(peer, own, strict=True))


def main(folder: Path, only: str | None = None) -> None:
    """Measure, print, write; `only` "memory" or "steps", what else was measured before stays."""
    target = result_of("qlora_step")  # or an error, before anything takes time
    logging.disable_progress_bar()
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        LlamaForCausalLM(config()).to(torch.bfloat16).save_pretrained(folder)
    setting = facts(str(__doc__), __file__)
    setting["versions"] |= {name: version(name) for name in ("peft", "bitsandbytes")}
    setting["machine"]["load"] = os.getloadavg()[0]
    result = json.loads(target.with_suffix(".json").read_text()) if only else {"bars": BARS}
    result |= {name: setting[name] for name in ("question", "command")}
    facts_of = {name: setting[name] for name in ("machine", "versions")}
    if only != "steps":
        result |= {"memory_facts": facts_of, "memory_mb": {name: in_process(name, folder) for name in MODELS}}
    if only != "memory":
        result |= {**facts_of, "steps": timed(folder)}
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    target.with_suffix(".md").write_text(markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """The tables as text."""
    about = " ".join(str(__doc__).split("\n\n")[1].split()).partition(" Writes ")[0]
    out = ["# A step of QLoRA on a CPU", "", "Made by `benchmarks/qlora_step.py`; do not edit.", "", about, ""]
    batches = list(result["steps"])
    heads = " | ".join(f"{batch}, s | times | by processor" for batch in batches)
    out += [f"| model | {heads} |", "|---" * (1 + 3 * len(batches)) + "|"]
    for name in MODELS:
        cells = (result["steps"][batch][name] for batch in batches)
        figures = (f"{cell['seconds']:.2f} | {cell['times']:.2f} | {cell['processor_times']:.2f}" for cell in cells)
        out.append(f"| {name} | " + " | ".join(figures) + " |")
    sizes = result["memory_mb"]
    batches = [what for what in sizes[PLAIN] if what not in ("imports", "loading", "spread")]
    heads = " | ".join(f"{batch}, MB | of 16-bit LoRA | of bitsandbytes" for batch in batches)
    out += ["", f"| model | loading, MB | {heads} |", "|---" * (2 + 3 * len(batches)) + "|"]
    for name, row in sizes.items():
        shares = (
            f"{row[batch]:.0f} | {row[batch] / sizes[PLAIN][batch]:.2f} | {row[batch] / sizes[PEER][batch]:.2f}"
            for batch in batches
        )
        out.append(f"| {name} | {row['loading']:.0f} | " + " | ".join(shares) + " |")
    machine, versions = result["machine"], ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return "\n".join([*out, "", f"{machine['processor']}, {machine['threads']} threads; {versions}.", ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "FOLDER"), help="only train a model, in this process")
    parser.add_argument("--only", choices=("memory", "steps"), help="keep what else was measured before")
    parser.add_argument("--model", type=Path, help="folder of the model, made if it is not there (default: temporary)")
    given = parser.parse_args()
    if given.memory:
        memory(*given.memory)
    elif given.model:
        main(given.model, given.only)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch), given.only)
