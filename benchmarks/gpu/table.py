"""The results as a page."""

from __future__ import annotations

from typing import Any

from .bars import BARS, judged, part_rows
from .findings import DONE, last_line

Result = dict[str, Any]
Row = dict[str, Any]


def markdown(result: Result) -> str:
    """All tables; parts that found nothing have none."""
    sections = (head, bars, agreement, layers, models, training, quantizing, sweep, troubles)
    return "\n".join(line for section in sections for line in section(result)) + "\n"


def table(title: str, columns: list[str], rows: list[list[str]]) -> list[str]:
    """One table under its heading, nothing without rows."""
    if not rows:
        return []
    lines = [f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows]]
    return ["", f"## {title}", "", *lines]


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"


def head(result: Result) -> list[str]:
    """What this is, and where it was measured."""
    machine = result.get("parts", {}).get("machine", {})
    device, ceilings = machine.get("device", {}), machine.get("ceilings", {})
    versions = ", ".join(f"{name} {found}" for name, found in machine.get("versions", result["versions"]).items())
    out = ["# Kernels on a GPU", "", "Made by `benchmarks/gpu_check.py`; do not edit.", ""]
    out.append(f"{device.get('name', 'an unknown device')}; {versions}.")
    if ceilings:
        copy, product = ceilings["bytes_per_second"] / 1e12, ceilings["flops_per_second"] / 1e12
        out += [
            "",
            f"A copy moves {copy:.2f} TB/s, read and written; a large bf16 product makes {product:.0f} TFLOP/s.",
        ]
    kinds = {"quick": " Fewer shapes than usual.", "tiny": " On tiny shapes: figures mean nothing."}
    out.append(f"{result['seconds']:.0f} seconds.{kinds.get(result['size'], '')}")
    return out


def bars(result: Result) -> list[str]:
    """Every bar, and what limits it."""
    lines = judged(result, BARS)
    rows = [
        [line["name"], number(line["value"]), f"{line['least']:g}", line["state"], _cell(line["said"])]
        for line in lines
    ]
    return table("Bars", ["what", "measured", "bar", "", "where, and what limits it"], rows)


def _cell(text: str) -> str:
    """Text that a table can hold."""
    return " ".join(text.replace("|", "/").split())[:300]


def agreement(result: Result) -> list[str]:
    """Of each kernel and dtype the largest distance."""
    worst: dict[tuple[str, str], list[Row]] = {}
    for row in part_rows(result, "agreement"):
        if "kernel" in row:
            worst.setdefault((row["kernel"], row["dtype"]), []).append(row)
    rows = []
    for (kernel, dtype), found in worst.items():
        far = max((row.get("distance", 0.0) for row in found), default=0.0)
        back = max((row.get("gradient", 0.0) for row in found), default=0.0)
        bad = sum("error" in row or not row["agrees"] for row in found)
        rows.append([kernel, dtype, str(len(found)), f"{far:.1e}", f"{back:.1e}", str(bad)])
    return table("Distance to the reference", ["kernel", "dtype", "checks", "result", "gradient", "not right"], rows)


def layers(result: Result) -> list[str]:
    """One line for each measurement."""
    rows = []
    for row in part_rows(result, "layers"):
        seconds = row.get("runs", {}).get("ours", {}).get("seconds")
        if seconds is None:
            continue
        n, k = row["shape"]
        others = ", ".join(f"{name} {value:.2f}" for name, value in row["times"].items() if name != "bf16")
        shares = [number(row.get("of_copy")), number(row.get("of_product"))]
        took = f"{1e6 * seconds:.1f}" + (" (wrong)" if row.get("agrees") is False else "")
        line = [row["format"], row["kernel"], f"{n} × {k}", str(row["rows"]), took, *shares]
        rows.append([*line, number(row["times"].get("bf16")), others])
    columns = ["format", "kernel", "weight", "rows", "µs", "of copy", "of product", "times bf16", "times others"]
    return table("One layer", columns, rows)


def models(result: Result) -> list[str]:
    """Decode and prefill."""
    found = [row for row in part_rows(result, "decode") if row.get("decode")]
    bf16 = next((row for row in found if row["model"] == "bf16"), None)
    rows = []
    for row in found:
        prompts = [
            f"{length}: {1e3 * run['seconds']:.1f}"
            for length, run in row.get("prefill", {}).items()
            if "seconds" in run
        ]
        faster = number(bf16["decode"] / row["decode"]) if bf16 else "–"
        line = [row["model"], row["kernel"], f"{row['bytes'] / 1e9:.2f}", f"{1 / row['decode']:.0f}", faster]
        rows.append([*line, ", ".join(prompts), row["how"], "yes" if row["same_text"] else "no"])
    columns = ["model", "kernel", "GB", "tokens/s", "times bf16", "prompt, ms", "how", "same text as without a graph"]
    return table("A language model of 7 billion parameters", columns, rows)


def training(result: Result) -> list[str]:
    """Steps of QLoRA."""
    rows = [
        [row["model"], row["kernel"], f"{1e3 * row['seconds']:.1f}", f"{row.get('peak_bytes', 0) / 1e9:.1f}"]
        for row in part_rows(result, "qlora")
        if row.get("seconds")
    ]
    return table("A step of QLoRA training", ["model", "kernel", "ms", "peak GB"], rows)


def quantizing(result: Result) -> list[str]:
    """Seconds to quantize."""
    rows = []
    for row in part_rows(result, "quantizing"):
        if "seconds" in row:
            shape = f"{row['shape'][0]} × {row['shape'][1]}" if "shape" in row else ""
            rows.append([row["what"], row.get("method", ""), shape, number(row["seconds"], 3)])
    return table("Quantizing", ["what", "method", "weight", "seconds"], rows)


def sweep(result: Result) -> list[str]:
    """The best tiles."""
    rows = []
    for row in part_rows(result, "sweep"):
        if "best" in row:
            many = "more" if row["rows"] is None else f"up to {row['rows']}"
            rows.append([row["format"], row["kernel"], row["what"], many, row["best"], number(row["times"])])
    columns = ["format", "kernel", "of", "rows", "best (bm, bn, bk, warps, stages, split)", "times the present one"]
    return table("Sizes of tiles", columns, rows)


def troubles(result: Result) -> list[str]:
    """Whatever failed, was left out or is not there."""
    out = []
    for name, job in result.get("parts", {}).items():
        state = job.get("state", "")
        notes = (
            [] if state == DONE else [f"{state} after {job.get('seconds', 0):.0f} s", last_line(job.get("error", ""))]
        )
        notes += [job.get("absent", ""), *(f"left out of {what}: {n}" for what, n in job.get("left_out", {}).items())]
        for row in job.get("rows", []):
            if "error" in row:
                what = " ".join(
                    str(row[key]) for key in ("name", "format", "model", "method", "what", "rows") if key in row
                )
                notes.append(f"{what}: {last_line(row['error'])}")
        out += [f"- {name}: {_cell(note)}" for note in notes if note]
    return ["", "## What did not work", "", *out] if out else []
