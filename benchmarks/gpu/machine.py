"""What is this machine, and what can it do at best? Versions, the device, copies of memory, products in bfloat16."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .findings import Findings
from .setting import Setting
from .timing import Contender, race

PACKAGES = ("hfquant", "torch", "triton", "transformers", "peft", "bitsandbytes", "gemlite", "torchao")
QUERY = "name,driver_version,power.limit,clocks.max.sm,clocks.max.memory,memory.total"


def versions() -> dict[str, str]:
    """What is installed of what matters here."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda or torch.version.hip)}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def device(setting: Setting) -> dict[str, Any]:
    """Name and size of the device."""
    if not setting.is_gpu:
        return {"name": platform.processor() or platform.machine(), "type": setting.device.type}
    properties = torch.cuda.get_device_properties(setting.device)
    return {
        "name": properties.name,
        "type": "cuda",
        "capability": [properties.major, properties.minor],
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "driver": smi(),
    }


def smi() -> str:
    """What the driver says of the device, "" where it has no such tool."""
    try:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def ceilings(setting: Setting) -> dict[str, float]:
    """Bytes read and written in a second by a copy, and operations in a second of a large product in bfloat16."""
    sizes, place = setting.sizes, setting.device
    source = torch.zeros(int(sizes.copied), dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    a, b = (torch.randn(sizes.square, sizes.square, device=place, dtype=torch.bfloat16) for _ in range(2))
    found = race(
        setting,
        {
            "copy": Contender(lambda number: target.copy_(source), 4),
            "product": Contender(lambda number: a @ b, 4),
        },
        sizes.rounds,
    )
    copied = 2 * source.numel() / found["copy"]["seconds"]
    return {"bytes_per_second": copied, "flops_per_second": 2 * sizes.square**3 / found["product"]["seconds"]}


@torch.no_grad()
def run(setting: Setting, findings: Findings) -> None:
    """All of it."""
    findings.put(versions=versions(), device=device(setting))
    findings.put(ceilings=ceilings(setting))
