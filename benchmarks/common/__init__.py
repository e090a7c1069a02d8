"""What the measurements of quality have in common: calibration data, held-out text, and the facts of a run."""

from __future__ import annotations

import os
import platform
import random
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from hfquant import cpu  # noqa: E402
from tests.models.corpus import SourceFile, read_corpus, separator, standard_library  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def training_files() -> list[SourceFile]:
    """The files that the bundled model was trained on."""
    return [file for file in read_corpus(standard_library()) if file.split == "train"]


def calibration(tokenizer: Any, files: list[SourceFile], seed: int, samples: int, length: int) -> list[Tensor]:
    """Token samples [samples, length] of the training files in an order of their own."""
    order = list(files)
    random.Random(seed).shuffle(order)
    ids: list[int] = []
    for file in order:
        ids += tokenizer(separator(file.path) + file.text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= samples * length:
            break
    return [torch.tensor(ids[: samples * length]).reshape(samples, length)]


def facts(question: str, script: str) -> dict[str, Any]:
    """What it takes to judge figures: the question, the command, the machine, the versions."""
    return {
        "question": question.splitlines()[0],
        "command": f"python benchmarks/{Path(script).name}",
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("hfquant", "torch", "transformers")}
        | {"python": platform.python_version()},
    }


def result_of(name: str) -> Path:
    """Where figures of the CPU kernels go, without a suffix: they answer for one instruction set."""
    library = cpu.library()
    if isinstance(library, str):
        raise SystemExit(library)
    return RESULTS / f"{name}_{library.isa}"


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
