"""Are the kernels right and fast on this GPU?

In ten minutes: the results of every kernel against the reference, the operators, memory errors, the speed of one layer
next to bfloat16 and other packages, a language model of 7 billion parameters decoding and training, quantization, and
the best sizes of tiles. Each part runs in a process of its own and writes its rows as it finds them. The figures are
held against the bars of `gpu/bars.py`; the exit status is 0 only if everything was measured and reaches its bar.
Without a GPU it refuses. Writes results/gpu_check.json and .md, and for `--quick` or `--only` partial.json and .md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, facts
from gpu import bars, jobs
from gpu.children import run_all
from gpu.findings import Findings, write
from gpu.setting import SIZES, Setting
from gpu.table import markdown

REFUSED = "gpu-check measures GPU kernels, and torch finds no CUDA or ROCm device here: run it on a machine with one"
SCRIPT = Path(__file__).resolve()

__all__ = ["main", "markdown"]


def has_gpu() -> bool:
    """Whether there is something to measure."""
    return torch.cuda.is_available()


def options(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what begins with "child" is for the processes that this one starts."""
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = [part for part in jobs.PARTS if part != "machine"]
    parser.add_argument("--only", action="append", choices=parts, default=[], help="only this part; can be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and a model with fewer layers")
    parser.add_argument("--out", type=Path, help="where the JSON goes; the page lies beside it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument(
        "--seconds", type=float, default=jobs.TOTAL, help="time for everything (default: %(default).0f)"
    )
    parser.add_argument("--size", choices=list(SIZES), default="full", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def child(name: str, size: str, seconds: float, folder: Path | None, device: str = "cuda") -> int:
    """One job in this process; the sanitizer's has no folder, and what is wrong there is its exit status."""
    job = jobs.named(name)
    findings = Findings(None if folder is None else jobs.path_of(job, folder))
    setting = Setting(torch.device(device), SIZES[size], time.monotonic() + seconds)
    jobs.run(job, setting, findings, folder or Path(), SCRIPT)
    bad = [row for row in findings.rows if "error" in row or not row.get("agrees", True)]
    if folder is None:
        print("\n".join(str(row) for row in bad), findings.data.get("error", ""), sep="\n")
    return int(folder is None and (bool(bad) or "error" in findings.data))


class Report:
    """The whole result, on the disk from the first finding on."""

    def __init__(self, path: Path, size: str, only: Sequence[str]) -> None:
        self.path, self.started = path, time.monotonic()
        self.result: dict[str, Any] = {**facts(str(__doc__), str(SCRIPT)), "size": size, "asked": list(only)}
        self.result |= {"seconds": 0.0, "parts": {}}

    def tell(self, name: str, found: dict[str, Any]) -> None:
        """Take what a job has found so far."""
        before = self.result["parts"].get(name, {}).get("state")
        self.result["parts"][name] = found
        self.save()
        if found.get("state") != before:
            print(f"{self.result['seconds']:6.0f} s  {name}: {found.get('state')}", flush=True)

    def save(self) -> None:
        """Write it."""
        self.result["seconds"] = round(time.monotonic() - self.started, 1)
        write(self.path, self.result)

    def close(self) -> int:
        """Judge, print, write the page; the exit status."""
        self.result["bars"] = bars.judged(self.result)
        self.save()
        page = markdown(self.result)
        self.path.with_suffix(".md").write_text(page)
        print(page)
        return 0 if bars.holds(self.result["bars"]) else 1


def where(given: argparse.Namespace) -> Path:
    """The file for the results: part of a check does not take the place of a whole one."""
    whole = not (given.only or given.quick)
    path: Path = given.out or RESULTS / ("gpu_check.json" if whole else "partial.json")
    return path


def main(given: Sequence[str] | None = None) -> int:
    """The whole check, or one job of it. Exits with one sentence where there is no GPU."""
    told = options(given)
    if not has_gpu():
        sys.exit(REFUSED)
    size = "quick" if told.quick else told.size
    if told.child:
        return child(told.child, size, told.seconds, told.folder)
    report = Report(where(told), size, told.only)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        folder = Path(scratch)

        def command(job: jobs.Job, seconds: float) -> list[str]:
            own = ["--child", job.name, "--size", size, "--seconds", f"{seconds:.1f}", "--folder", str(folder)]
            return [sys.executable, str(SCRIPT), *own]

        try:
            run_all(jobs.chosen(told.only), command, folder, told.seconds, report.tell)
        finally:
            status = report.close()
    return status


if __name__ == "__main__":
    sys.exit(main())
