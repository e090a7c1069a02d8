"""What every peer script reads and writes: calibration tokens in; parameters, seconds, settings out.

A script runs in the peer's own environment, so this imports nothing of hfquant.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "2"))  # read when torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One quantization: of the model in folder `model`, on `tokens` [samples, length] int64, taken as they are."""

    model: Path
    tokens: Tensor
    bits: int
    group_size: int
    symmetric: bool
    method: str
    dtype: torch.dtype
    output: Path


def read_job(methods: Iterable[str], description: str | None) -> Job:
    """The job on the command line; also sets the number of threads and the seed of torch."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="Hugging Face model folder")
    parser.add_argument("tokens", type=Path, help="safetensors file with int64 'tokens' [samples, length]")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--method", choices=list(methods), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the loaded model")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    options = vars(parser.parse_args())
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    options["tokens"] = load_file(options["tokens"])["tokens"]
    options["dtype"] = getattr(torch, options["dtype"])
    return Job(**options)


def timed(call: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """What `call` returns, and the seconds it took: by the clock, and of all threads' processor time.

    On a machine that does other work as well, only the second can be compared.
    """
    started = time.perf_counter(), time.process_time()
    result = call()
    return result, {"seconds": time.perf_counter() - started[0], "cpu_seconds": time.process_time() - started[1]}


def finish(
    job: Job,
    model: nn.Module,
    quantized: Mapping[str, Tensor],
    times: Mapping[str, float],
    packages: Iterable[str],
    settings: Mapping[str, Any],
) -> None:
    """Write every parameter of the checkpoint as float32, and print the JSON line that the driver reads.

    `quantized`: dequantized weights by name, where the model holds another form of them. All parameters are written,
    because a method may change others too: AWQ moves scales into the norms.
    """
    with safe_open(job.model / "model.safetensors", "pt") as file:
        names = file.keys()
    have = {**dict(model.named_parameters()), **quantized}
    save_file({name: have[name].detach().float().contiguous() for name in names}, job.output)
    versions = {name: version(name) for name in (*packages, "torch", "transformers")}
    common = {"threads": torch.get_num_threads(), "dtype": str(job.dtype), "tokens": list(job.tokens.shape)}
    print(json.dumps({**times, "versions": versions, "settings": {**settings, **common}}), flush=True)
