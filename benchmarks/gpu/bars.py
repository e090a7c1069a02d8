"""What the kernels have to reach, as data: of each bar how it follows from the results, and what limits it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .findings import DONE, last_line
from .jobs import JOBS
from .setting import SIZES

Result = dict[str, Any]
Row = dict[str, Any]
Found = tuple[float, str]
"""A figure, and where it is from with what limits it there."""


def part_rows(result: Result, part: str) -> list[Row]:
    """Rows of all jobs of a part that measured or checked something."""
    return [row for job in jobs_of(result, part).values() for row in job.get("rows", [])]


def jobs_of(result: Result, part: str) -> dict[str, Any]:
    """What the jobs of a part found, by name."""
    parts = result.get("parts", {})
    return {name: found for name, found in parts.items() if name.partition(" ")[0] == part}


def _share(row: Row, name: str, of: str) -> str:
    return f"{100 * row[name]:.0f}% of {of}" if name in row else ""


def limiter(row: Row) -> str:
    """Where a row of `layers` was measured, and how near it is to what the GPU can do."""
    n, k = row["shape"]
    shares = [_share(row, "of_copy", "copy"), _share(row, "of_product", "bf16 product")]
    how = row["runs"]["ours"].get("how", "")
    wrong = "" if row["agrees"] else "results are wrong"
    parts = [
        wrong,
        f"{n} × {k}",
        f"{1e6 * row['runs']['ours']['seconds']:.1f} µs",
        *shares,
        "" if how == "graph" else how,
    ]
    return ", ".join(part for part in parts if part)


def layers(format: str, rows: int, value: Callable[[Row], float | None]) -> Callable[[Result], Found | None]:
    """The worst of all shapes of a format with so many rows; None if one of them was not measured."""

    def found(result: Result) -> Found | None:
        mine = [row for row in part_rows(result, "layers") if row.get("format") == format and row.get("rows") == rows]
        values = [(figure(row, value), row) for row in mine]
        shapes = {tuple(row["shape"]) for row in mine}
        if shapes != set(SIZES[result["size"]].shapes) or any(each is None for each, _ in values):
            return None
        worst, row = min(((each, row) for each, row in values if each is not None), key=lambda pair: pair[0])
        return worst, limiter(row)

    return found


def figure(row: Row, value: Callable[[Row], float | None]) -> float | None:
    """The figure of a row: none without a measurement, and 0 where results are wrong, however fast they come."""
    if "error" in row or value(row) is None:
        return None
    return value(row) if row["agrees"] else 0.0


def times(name: str) -> Callable[[Row], float | None]:
    """How many times as fast as something else."""
    return lambda row: row.get("times", {}).get(name)


def of_copy(row: Row) -> float | None:
    """Bytes in a second over those of a copy."""
    value: float | None = row.get("of_copy")
    return value


def ratio(part: str, slow: str, fast: str, key: str) -> Callable[[Result], Found | None]:
    """`key` of one model over that of another."""

    def found(result: Result) -> Found | None:
        rows = {row["model"]: row for row in part_rows(result, part) if row.get(key)}
        if slow not in rows or fast not in rows:
            return None
        figures = f"{1e3 * rows[fast][key]:.2f} ms against {1e3 * rows[slow][key]:.2f} ms"
        how = rows[fast].get("how", "graph")
        return rows[slow][key] / rows[fast][key], figures if how == "graph" else f"{figures}, {how}"

    return found


def right(part: str, wrong: Callable[[Row], bool]) -> Callable[[Result], Found | None]:
    """Share of rows that are right, 1 for all; None if the part did not come to its end."""

    names = {job.name for job in JOBS if job.part == part and not job.compiles}

    def found(result: Result) -> Found | None:
        jobs, rows = jobs_of(result, part), part_rows(result, part)
        bad = [row for row in rows if "error" in row or wrong(row)]
        whole = jobs.keys() == names and all(
            job.get("state") == DONE and not job.get("left_out") for job in jobs.values()
        )
        if not rows or (not bad and not whole):
            return None
        called = [str(row.get("name") or row.get("operator") or row.get("tool")) for row in bad]
        said = f"{len(rows)} checked" + (f"; not right: {', '.join(dict.fromkeys(called))}" if bad else "")
        return (len(rows) - len(bad)) / len(rows), said

    return found


@dataclass(frozen=True)
class Bar:
    """`of` the results is at least `least`; `part`: where it is measured, for which `format`, `against` what."""

    name: str
    part: str
    least: float
    of: Callable[[Result], Found | None]
    format: str = ""
    against: str = ""


def speed(name: str, format: str, rows: int, least: float, against: str) -> Bar:
    """A bar of one layer: how many times as fast as something else, or for `COPY` its share of the bytes of a copy."""
    counted = "1 row" if rows == 1 else f"{rows} rows"
    value = of_copy if against == COPY else times(against)
    return Bar(f"{name}, {counted}", "layers", least, layers(format, rows, value), format, against)


W4A16, NF4, LLM_INT8, FP8_ROWS, FP8_TILES = "int4 g128", "nf4 g64", "llm.int8", "fp8 rows", "fp8 tiles"
COPY, BF16, SCALED_MM, BNB_NF4, BNB_INT8 = "copy", "bf16", "_scaled_mm", "bitsandbytes nf4", "bitsandbytes int8"
BARS = (
    Bar("results agree with the reference", "agreement", 1, right("agreement", lambda row: not row["agrees"])),
    Bar("operators are well-formed", "operators", 1, right("operators", lambda row: "result" not in row)),
    Bar("memory is not touched by mistake", "sanitizer", 1, right("sanitizer", lambda row: row["state"] != "clean")),
    speed("W4A16, bytes of copy", W4A16, 1, 0.85, COPY),
    speed("W4A16, times bf16", W4A16, 1, 3.3, BF16),
    speed("W4A16, times bf16", W4A16, 16, 3.0, BF16),
    speed("W4A16, times bf16", W4A16, 64, 1.5, BF16),
    speed("W4A16, times bf16", W4A16, 4096, 0.9, BF16),
    speed("NF4, times bitsandbytes", NF4, 1, 2.0, BNB_NF4),
    speed("LLM.int8, times bitsandbytes", LLM_INT8, 1, 2.0, BNB_INT8),
    speed("LLM.int8, times bitsandbytes", LLM_INT8, 512, 2.0, BNB_INT8),
    speed("FP8 rows, times bf16", FP8_ROWS, 4096, 1.7, BF16),
    speed("FP8 tiles, times bf16", FP8_TILES, 4096, 1.7, BF16),
    speed("FP8 rows, times _scaled_mm", FP8_ROWS, 4096, 1.0, SCALED_MM),
    speed("FP8 tiles, times _scaled_mm", FP8_TILES, 4096, 1.0, SCALED_MM),
    Bar("7B decode in 4 bits, times bf16", "decode", 2.5, ratio("decode", BF16, W4A16, "decode")),
    Bar("QLoRA step, times bitsandbytes", "qlora", 1.3, ratio("qlora", BNB_NF4, NF4, "seconds")),
)
MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"


def judged(result: Result, bars: Sequence[Bar] = BARS) -> list[Row]:
    """Each bar with its figure: met, missed or not measured. Bars of parts that nobody asked for are left out."""
    asked = result.get("asked") or None
    found = []
    for bar in bars:
        if asked is not None and bar.part not in asked:
            continue
        value = bar.of(result)
        line: Row = {"name": bar.name, "part": bar.part, "least": bar.least}
        if value is None:
            line |= {"state": NOT_MEASURED, "value": None, "said": why_not(result, bar)}
        else:
            line |= {"state": MET if value[0] >= bar.least else MISSED, "value": value[0], "said": value[1]}
        found.append(line)
    return found


def why_not(result: Result, bar: Bar) -> str:
    """Why there is no figure for a bar."""
    jobs = jobs_of(result, bar.part)
    if not jobs:
        return "its part did not run"
    said = [job.get("absent", "") or last_line(job.get("error", "")) for job in jobs.values()]
    for row in part_rows(result, bar.part):
        if row.get("format", "") == bar.format:
            failed = {name: run["error"] for name, run in row.get("runs", {}).items() if "error" in run}
            others = {**row.get("missing", {}), **failed}
            others = {name: text for name, text in others.items() if name in ("ours", bar.against)}
            said += [last_line(row.get("error", "")), *(f"{name}: {text}" for name, text in others.items())]
    states = [f"{name} {job.get('state')}" for name, job in jobs.items() if job.get("state") != DONE]
    return "; ".join(dict.fromkeys(text for text in [*said, *states] if text)) or "no row of the results has it"


def holds(lines: Sequence[Row]) -> bool:
    """Whether everything was measured and reaches its bar."""
    return bool(lines) and all(line["state"] == MET for line in lines)
