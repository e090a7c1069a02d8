"""Does calibrated quantization of a large model stay within the memory of one block?

Quantizes a random 2 GB Llama in bfloat16 with 4-bit GPTQ, from folder to folder, in a fresh process. Its peak memory,
interpreter and libraries included, is held against one block, the statistics of its widest layer, the hidden states of
the original and of the quantized model, and 0.5 GB for everything else. Writes results/calibrated_memory.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "calibrated_memory.json"
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 32000}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
LAYERS, SAMPLES, LENGTH, BATCH = 20, 16, 512, 2
ELSE = 500_000_000  # bytes for interpreter, libraries, and what is alive for a moment
METHOD = {"method": "gptq", "bits": 4, "group_size": 128}

CHILD = """
import json, sys, time
import torch, transformers, hfquant
def memory(key):
    status = dict(line.split(":") for line in open("/proc/self/status"))
    return int(status[key].split()[0]) * 1024
path, method, samples, length, batch = sys.argv[1], *map(json.loads, sys.argv[2:])
hfquant.HfQuantConfig(**method, data="self")  # bring the plugin in
tokens = torch.randint(32000, (samples, length), generator=torch.Generator().manual_seed(0))
config = hfquant.HfQuantConfig(**method, data=tokens, batch_size=batch, length=length, samples=samples)
before, after, start = memory("VmHWM"), [], time.perf_counter()
def tick(what, share):
    if not after or after[-1]["what"] != what:
        after.append({"what": what, "peak_bytes": 0, "seconds": 0})
    after[-1].update(peak_bytes=memory("VmHWM"), seconds=round(time.perf_counter() - start, 1))
report = hfquant.quantize(path + "/source", config, path + "/quantized", tick=tick)
print(json.dumps({"import_bytes": before, "peak_bytes": memory("VmHWM"), "seconds": time.perf_counter() - start,
                  "source_mb": report.mb_before, "quantized_mb": report.mb_after, "progress": after}))
"""


def write_model(folder: Path, layers: int) -> int:
    """A random Llama in bfloat16, written without building it; returns the bytes of one block."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {**SHAPE, **HEADS, "num_hidden_layers": layers}
    config = LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    noise = torch.randn(1 << 20).mul_(0.02).bfloat16()
    weights = {
        name: torch.ones(size, dtype=torch.bfloat16)
        if len(size) == 1
        else noise.roll(number).repeat(-(-size.numel() // noise.numel()))[: size.numel()].reshape(size).clone()
        for number, (name, size) in enumerate(shapes.items())
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return sum(2 * size.numel() for name, size in shapes.items() if name.startswith("model.layers.0."))


def terms(block: int) -> dict[str, int]:
    """What the memory is for, in bytes."""
    return {
        "block": block,
        "statistics": 8 * max(SHAPE["hidden_size"], SHAPE["intermediate_size"]) ** 2,  # float64, one layer at a time
        "hidden_states": 2 * SAMPLES * LENGTH * SHAPE["hidden_size"] * 2,  # of two models, in bfloat16
        "else": ELSE,
    }


def measure(layers: int) -> dict[str, Any]:
    """One quantization in a fresh process: its memory, and what it may take."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        source.mkdir()
        arguments = [sys.executable, __file__, "--write", str(source), str(layers)]
        block = int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()[-1])
        size = (source / "model.safetensors").stat().st_size
        options = [json.dumps(value) for value in (METHOD, SAMPLES, LENGTH, BATCH)]
        done = subprocess.run([sys.executable, "-c", CHILD, name, *options], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
    allowed = terms(block)
    found = json.loads(done.stdout.splitlines()[-1])
    return {"checkpoint_bytes": size, **found, "allowed": allowed, "allowed_bytes": sum(allowed.values())}


def main(layers: int = LAYERS) -> None:
    """Measure, print, write the result."""
    found = measure(layers)
    result = {
        "question": __doc__.splitlines()[0],
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("hfquant", "torch", "transformers")},
        },
        "command": "python benchmarks/calibrated_memory.py",
        "model": {**SHAPE, **HEADS, "num_hidden_layers": layers},
        "calibration": {"samples": SAMPLES, "length": LENGTH, "batch_size": BATCH},
        "method": METHOD,
        **found,
    }
    print(f"checkpoint {found['checkpoint_bytes'] / 1e9:.2f} GB, {found['seconds']:.0f} s")
    for name, size in found["allowed"].items():
        print(f"  {name:14s} {size / 1e6:6.0f} MB")
    print(f"peak {found['peak_bytes'] / 1e6:.0f} MB of {found['allowed_bytes'] / 1e6:.0f} MB allowed")
    if layers == LAYERS:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        print(write_model(Path(sys.argv[2]), int(sys.argv[3])))
    else:
        main(*map(int, sys.argv[1:2]))
