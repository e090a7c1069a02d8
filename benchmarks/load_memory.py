"""What does loading a model cost in memory and time, when it is quantized on the way?

Loads a random 1.16 GB Llama in fresh processes, one per method and round, the methods interleaved. Peak memory is the
high-water mark of the whole process, interpreter and libraries included; `import` is what the libraries take alone.
Writes results/load_memory.json. Peers are measured when they are installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROUNDS = 3
RESULT = Path(__file__).parent / "results" / "load_memory.json"
METHODS = ["plain", "int8", "int4", "nf4", "llm_int8", "fp8"]
PEERS = ["bitsandbytes nf4"] if importlib.util.find_spec("bitsandbytes") else []

CHILD = """
import sys, time
import torch, transformers, hfquant
if "bitsandbytes" in sys.argv[2]:
    import bitsandbytes
def peak():
    status = dict(line.split(":") for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) * 1024
path, method = sys.argv[1:]
config = None
if method == "bitsandbytes nf4":
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
elif method != "plain":
    config = hfquant.HfQuantConfig(method)
before, start = peak(), time.perf_counter()
model = transformers.LlamaForCausalLM.from_pretrained(path, quantization_config=config)
seconds = time.perf_counter() - start
size = sum(parameter.nbytes for parameter in model.parameters())
print(size, before, peak(), seconds)
"""


def write_model(folder: Path) -> None:
    """A random Llama in bfloat16: hidden size 2048, 10 layers, vocabulary 32000."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(**shape, **heads, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    weights = {name: torch.randn(size).mul_(0.02).bfloat16() for name, size in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def measure(folder: Path, method: str) -> dict[str, float]:
    """One load in a fresh process: bytes and seconds."""
    command = [sys.executable, "-c", CHILD, str(folder), method]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size, before, peak, seconds = map(float, done.stdout.split()[-4:])
    return {"model_bytes": size, "import_bytes": before, "peak_bytes": peak, "seconds": seconds}


def main() -> None:
    """Measure, print a table, write the result."""
    names = METHODS + PEERS
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, "--write", name], check=True)
        size = (folder / "model.safetensors").stat().st_size
        for _ in range(ROUNDS):
            for method in names:
                runs[method].append(measure(folder, method))
    rows = {
        method: {key: statistics.median(run[key] for run in of_method) for key in of_method[0]}
        for method, of_method in runs.items()
    }
    packages = ["hfquant", "torch", "transformers", *(["bitsandbytes"] if PEERS else [])]
    result = {
        "question": __doc__.splitlines()[0],
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "command": "python benchmarks/load_memory.py",
        "rounds": ROUNDS,
        "checkpoint_bytes": size,
        "median": rows,
        "runs": runs,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"checkpoint {size / 1e9:.2f} GB; medians of {ROUNDS} rounds")
    for method, row in rows.items():
        loaded, peak = row["model_bytes"] / 1e9, row["peak_bytes"] / 1e9
        print(f"{method:18s} model {loaded:.2f} GB   peak {peak:.2f} GB   {row['seconds']:6.1f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_model(Path(sys.argv[2]))
    else:
        main()
