"""Are calibrated methods as good, and as fast, as those of GPTQModel, llm-compressor and AutoRound?

Mean token KL (nats) between the bundled model and its quantized form, in float32 arithmetic for every package, on three
disjoint parts of the held-out text. Every package gets the same calibration tokens: per seed another draw of 128
sequences of 256 tokens from the files that the model was trained on. Packages run in turns with hfquant, each in an
interpreter of its own: see peers/README.md. Finished runs are kept in --work, so that an interrupted comparison goes on
where it was. Writes results/peers.json, and the table of it, results/peers.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

THREADS = os.environ.setdefault("OMP_NUM_THREADS", "2")  # the peers inherit it

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from hfquant import HfQuantConfig  # noqa: E402
from hfquant.eval import Reference, token_batches  # noqa: E402
from hfquant.nn import QLinear  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.models import HELDOUT, MODEL_DIR  # noqa: E402
from tests.models.corpus import read_corpus, select, standard_library  # noqa: E402
from tests.models.tokenizer import encode_documents  # noqa: E402

SCRIPTS = Path(__file__).parent / "peers"
RESULT = Path(__file__).parent / "results" / "peers.json"
SEEDS = (0, 1, 2)
SEQUENCES, LENGTH, BATCH = 128, 256, 8  # calibration; the peers run batches of 8 too
PARTS, HELDOUT_SEQUENCES = 3, 32  # evaluation, also of LENGTH tokens
PEERS = ("gptqmodel", "llmcompressor", "autoround")


@dataclass(frozen=True)
class Setting:
    """The grid that all packages quantize to."""

    bits: int
    group_size: int
    symmetric: bool

    def __str__(self) -> str:
        return f"w{self.bits} g{self.group_size} {'symmetric' if self.symmetric else 'asymmetric'}"


@dataclass(frozen=True)
class Run:
    """A method of a package; `package` is a peer or "hfquant". `options` are hfquant's, beside those of the setting."""

    package: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    uses_tokens: bool = True

    def __str__(self) -> str:
        return " ".join((self.package, self.method, *(f"{name}={value}" for name, value in self.options.items())))


W4, W3, W4_SYMMETRIC = Setting(4, 64, False), Setting(3, 64, False), Setting(4, 64, True)

NEAREST = Run("hfquant", "nearest", uses_tokens=False)
GPTQ, GPTAQ = Run("hfquant", "gptq"), Run("hfquant", "gptq", {"gptaq": 0.25})
AWQ = Run("hfquant", "awq")

# What a peer does, and the hfquant run that follows it. Not in W4_SYMMETRIC: what exists asymmetric only adds time.
PAIRS = (
    (Run("llmcompressor", "nearest", uses_tokens=False), NEAREST, (W4, W3, W4_SYMMETRIC)),
    (Run("gptqmodel", "gptq"), GPTQ, (W4, W3, W4_SYMMETRIC)),
    (Run("gptqmodel", "gptq-act-order"), GPTAQ, (W4,)),
    (Run("llmcompressor", "gptq"), GPTQ, (W4, W3)),
    (Run("llmcompressor", "awq"), AWQ, (W4,)),
    (Run("autoround", "signround"), GPTAQ, (W4, W3)),
)


# ---- hfquant


def run_hfquant(run: Run, setting: Setting, tokens: Tensor) -> tuple[nn.Module, dict[str, Any]]:
    """Quantize the bundled model in this process; `tokens` [samples, length] int64 are for calibrated methods.

    Returns the model to evaluate, and what a peer's script prints: seconds, cpu_seconds, versions, settings. Only the
    quantization is timed.
    """
    options = {"group_size": setting.group_size, "symmetric": setting.symmetric, **run.options}
    if run.method == "nearest":
        config = HfQuantConfig(f"int{setting.bits}", **options)
    else:
        options["bits"] = setting.bits
        given = {"data": [tokens], "samples": len(tokens), "length": tokens.shape[1], "batch_size": BATCH}
        config = HfQuantConfig(run.method, **options, **given)
    started = time.perf_counter(), time.process_time()
    # Loading is part of it: hfquant quantizes what it loads.
    model = LlamaForCausalLM.from_pretrained(MODEL_DIR, quantization_config=config, dtype=torch.float32)
    times = {"seconds": time.perf_counter() - started[0], "cpu_seconds": time.process_time() - started[1]}
    versions = {name: version(name) for name in ("hfquant", "torch", "transformers")}
    return model, {**times, "versions": versions, "settings": {"method": config.method, **options}}


# ---- peers


def run_peer(python: Path, run: Run, setting: Setting, tokens: Tensor, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Quantize with a peer in its interpreter: the file of its parameters, and the figures it printed.

    A run that `folder` holds from before is not repeated. Raises SystemExit with the end of its output if it fails.
    """
    scripts = b"".join((SCRIPTS / name).read_bytes() for name in (f"{run.package}_run.py", "exchange.py"))
    identity = repr((run, setting, THREADS)).encode() + scripts + tokens.numpy().tobytes()
    name = f"{run.package}-{run.method}-{hashlib.sha256(identity).hexdigest()[:16]}"
    weights, figures = folder / f"{name}.safetensors", folder / f"{name}.json"
    if not figures.exists():
        save_file({"tokens": tokens}, folder / "tokens.safetensors")
        command = [python, SCRIPTS / f"{run.package}_run.py", MODEL_DIR, folder / "tokens.safetensors"]
        command += ["--method", run.method, "--bits", setting.bits, "--group-size", setting.group_size]
        command += ["--symmetric" if setting.symmetric else "--no-symmetric", "--output", weights]
        done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
        if done.returncode or not lines:
            raise SystemExit(f"{run}, {setting} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        figures.write_text(lines[-1])
    return weights, json.loads(figures.read_text())


def interpreters(given: list[str], needed: set[str]) -> dict[str, Path]:
    """The Python of each peer, from --python NAME=PATH or the environment. Raises SystemExit for a missing one."""
    paths = {name: os.environ.get(f"{name.upper()}_PYTHON", "") for name in PEERS}
    paths |= dict(item.split("=", 1) for item in given)
    if unknown := set(paths) - set(PEERS):
        raise SystemExit(f"--python: no peer is named {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    if missing := [name for name in sorted(needed) if not os.access(paths[name] or "-", os.X_OK)]:
        lines = [f"  --python {name}=PATH or {name.upper()}_PYTHON=PATH, now {paths[name]!r}" for name in missing]
        hint = f"{SCRIPTS / 'README.md'} says how to make the environments; --peers leaves some out."
        raise SystemExit("\n".join(("no interpreter for these peers:", *lines, hint)))
    return {name: Path(path) for name, path in paths.items() if path}


def load(weights: Path, setting: Setting) -> nn.Module:
    """A float32 Llama with a peer's parameters. Raises SystemExit if they are not all on the grid that was asked for.

    A group of a quantized weight has at most 2^bits values; the embedding and the head are the original's.
    """
    model = LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    original = model.state_dict()
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if "_proj" in name:
            groups = tensor.reshape(-1, setting.group_size).sort(1).values
            if int((groups.diff(dim=1) != 0).sum(1).max()) >= 2**setting.bits:
                raise SystemExit(f"{weights}: {name} is not quantized to {setting}")
        elif not name.endswith("norm.weight") and not torch.equal(tensor, original[name]):
            raise SystemExit(f"{weights}: {name} was to be left alone")
    model.load_state_dict(tensors)
    return model


# ---- data


def draws(tokenizer: Any) -> list[Tensor]:
    """Calibration tokens [SEQUENCES, LENGTH] int64 for each seed, of random places in the training text."""
    files = select(read_corpus(standard_library()), "train")
    stream = encode_documents(tokenizer, [file.text for file in files])
    found = []
    for seed in SEEDS:
        windows = stream.unfold(0, LENGTH, LENGTH)
        chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:SEQUENCES]
        found.append(windows[chosen].contiguous())
    return found


def references(tokenizer: Any) -> list[Reference]:
    """The original model on each part of the held-out text."""
    text = HELDOUT.read_text()
    size = len(text) // PARTS
    model = LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    parts = [text[part * size : (part + 1) * size] for part in range(PARTS)]
    return [Reference(model, token_batches(tokenizer, part, HELDOUT_SEQUENCES, LENGTH)) for part in parts]


# ---- the comparison


def schedule(peers: set[str], settings: set[str], seeds: int) -> Iterator[tuple[int, Setting, Run]]:
    """Seed by seed, every peer's run with hfquant's after it; what needs no tokens runs for the first seed only."""
    for seed in range(seeds):
        for setting in (W4, W3, W4_SYMMETRIC):
            for peer, ours, where in PAIRS:
                if setting in where and str(setting) in settings and peer.package in peers:
                    yield from ((seed, setting, run) for run in (peer, ours) if run.uses_tokens or seed == 0)


def nearest_agreement(weights: Path, setting: Setting, parts: list[Reference]) -> dict[str, Any]:
    """Compare llm-compressor's rounding to nearest with hfquant's, both with float32 scales.

    A difference is a tie if both levels are equally far from the weight: bfloat16 weights have many of those.
    """
    run = Run("hfquant", "nearest", {"scale_dtype": "float32"})
    model, _ = run_hfquant(run, setting, torch.empty(0))
    original, theirs = load_file(MODEL_DIR / "model.safetensors"), load_file(weights)
    differ = ties = total = 0
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            a, b, w = module.qtensor().dequantize(), theirs[f"{name}.weight"], original[f"{name}.weight"].float()
            other = (a - b).abs() > 1e-6 + 1e-4 * b.abs()
            equal = ((a - w).abs() - (b - w).abs()).abs() < 1e-4 * (a - b).abs()
            total, differ, ties = total + w.numel(), differ + int(other.sum()), ties + int((other & equal).sum())
    return {
        "kl hfquant": [part.compare(model).kl for part in parts],
        "kl llmcompressor": [part.compare(load(weights, setting)).kl for part in parts],
        "weights": total,
        "weights on another level": differ,
        "of these, ties": ties,
    }


def measure(options: argparse.Namespace, paths: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Make every scheduled run and write the results after each; returns the rows, by setting and run."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokens, parts = draws(tokenizer), references(tokenizer)
    rows: dict[str, dict[str, Any]] = {}
    agreement = {}
    for seed, setting, run in schedule(set(options.peers), set(options.settings), options.seeds):
        if run.package == "hfquant":
            model, figures = run_hfquant(run, setting, tokens[seed])
        else:
            weights, figures = run_peer(paths[run.package], run, setting, tokens[seed], options.work)
            model = load(weights, setting)
            if run.method == "nearest":
                agreement[str(setting)] = nearest_agreement(weights, setting, parts)
        empty = {"kl": {}, "seconds": [], "cpu_seconds": []}
        row = rows.setdefault(str(setting), {}).setdefault(str(run), empty)
        if str(SEEDS[seed]) not in row["kl"]:
            row["kl"][str(SEEDS[seed])] = [part.compare(model).kl for part in parts]
        for name in ("seconds", "cpu_seconds"):
            row[name].append(figures[name])
        row |= {"versions": figures["versions"], "settings": figures["settings"]}
        print(f"[{SEEDS[seed]}] {line(setting, run, row)}", flush=True)
        write(options, {"rows": rows, "nearest_agreement": agreement})
    return rows


def line(setting: Any, run: Any, row: dict[str, Any]) -> str:
    """One line of the table."""
    kl = [mean(values) for values in row["kl"].values()]
    spread = f"{min(kl):.5f} to {max(kl):.5f}" if len(kl) > 1 else ""
    times = f"{median(row['seconds']):8.1f} {median(row['cpu_seconds']):8.1f}"
    return f"{setting!s:16s} {run!s:30s} {mean(kl):9.5f} {times}   {len(kl)} {spread}"


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    seeds, (samples, length, _) = len(result["seeds"]), result["calibration"]
    threads = result["machine"]["threads"]
    lines = [
        "# Calibrated methods next to other packages",
        "",
        f"KL in nats per token, mean of {seeds} draws of {samples} x {length} calibration tokens (least to largest),",
        f"and the median of the seconds that quantizing took with {threads} threads, the packages in turns.",
        f"`{result['command']}` makes it again.",
    ]
    for setting, rows in result["rows"].items():
        lines += ["", f"## {setting}", "", "| | KL | seconds |", "|---|---|---|"]
        for run, row in sorted(rows.items(), key=lambda item: average(item[1])):
            kl = [mean(values) for values in row["kl"].values()]
            spread = f" ({min(kl):.4f} to {max(kl):.4f})" if len(kl) > 1 else ""
            lines.append(f"| {run} | {average(row):.4f}{spread} | {median(row['seconds']):.1f} |")
    every = [row for rows in result["rows"].values() for row in rows.values()]
    packages = sorted({f"{name} {number}" for row in every for name, number in row["versions"].items()})
    return "\n".join([*lines, "", ", ".join(packages), ""])


def average(row: dict[str, Any]) -> float:
    """The mean KL of a row, over seeds and parts of the text."""
    return mean(mean(values) for values in row["kl"].values())


def write(options: argparse.Namespace, measured: dict[str, Any]) -> None:
    """Write what is measured so far."""
    result = {
        "question": __doc__.splitlines()[0],
        "command": "python benchmarks/peers.py",
        "seeds": SEEDS[: options.seeds],
        "calibration": [SEQUENCES, LENGTH, BATCH],
        "tokens": PARTS * HELDOUT_SEQUENCES * (LENGTH - 1),
        "kl": "by seed, of each part of the held-out text",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": int(THREADS),
            "load at the end": os.getloadavg()[0],
        },
        "python": platform.python_version(),
        **measured,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(markdown(result))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    settings = [str(setting) for setting in (W4, W3, W4_SYMMETRIC)]
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of a peer")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--settings", nargs="+", choices=settings, default=settings)
    parser.add_argument("--seeds", type=int, choices=range(1, len(SEEDS) + 1), default=len(SEEDS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "hfquant-peers")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    options = read_options()
    paths = interpreters(options.python, set(options.peers))
    torch.set_num_threads(int(THREADS))
    disable_progress_bar()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = measure(options, paths)
    print(f"\n{'setting':16s} {'run':30s} {'KL':>9s} {'seconds':>8s} {'cpu s':>8s}   seeds, least to largest KL")
    for setting, runs in rows.items():
        for run, row in runs.items():
            print(line(setting, run, row))


if __name__ == "__main__":
    main()
