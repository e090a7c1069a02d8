"""`hfquant quantize`: a model in, a smaller model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from .. import api, processes
from ..calibration_state import Settings
from ..config import HfQuantConfig
from ..errors import SpecError
from ..preview import preview
from ..quantize import works_on_blocks
from ..report import Report
from .findings import data_line, show_findings
from .forecast import show_estimate
from .options import build_config, parse_value, refuse_without_blocks
from .output import coverage_table, method_label, print_json, share_progress, stdout

CALIBRATION = "Calibration"  # heading of its options in the help


def quantize_command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Folder or Hub repository of the original model.")],
    method: Annotated[
        str | None,
        typer.Option(help="What `hfquant backends` lists: int4, nf4, fp8, llm_int8, gptq, ...", show_default="int4"),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML file with method and options; options given here win.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.", show_default=False)] = None,
    bits: Annotated[int | None, typer.Option(help="Bits per code, as in --method int --bits 4.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale; -1 for a whole row.")] = None,
    block_size: Annotated[int | None, typer.Option(help="The same as --group-size.")] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--no-symmetric", help="Without or with zero points.", show_default=False)
    ] = None,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="Quantize the scales as well.")] = False,
    range: Annotated[str | None, typer.Option(help="absmax, percentile, mse or kl; or JSON with its options.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Another option of the method, value as JSON. Repeat.")
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Module to leave alone in place of the output layer; none for none. Repeat."),
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Quantize input embeddings as well.")] = False,
    dtype: Annotated[
        str, typer.Option(help="Of what is not quantized: auto (as stored), float32, float16, bfloat16.")
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to quantize: cpu, cuda, auto.", show_default=False)] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Text file, .json or .jsonl, dataset name, or self.", rich_help_panel=CALIBRATION),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="At most so many.", show_default="128", rich_help_panel=CALIBRATION)
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens in each.", show_default="512", rich_help_panel=CALIBRATION)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples at a time.", show_default="8", rich_help_panel=CALIBRATION)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Which part of the data.", show_default="0", rich_help_panel=CALIBRATION)
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Column of a dataset or JSON file.", rich_help_panel=CALIBRATION)
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Part of a dataset.", show_default="train", rich_help_panel=CALIBRATION)
    ] = None,
    no_packing: Annotated[
        bool, typer.Option("--no-packing", help="A sample for each text, padded.", rich_help_panel=CALIBRATION)
    ] = False,
    offload: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep hidden states there instead of in memory.", rich_help_panel=CALIBRATION),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Go on with an interrupted run, or start over.",
            show_default="resume",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Quantize a model and save it with its tokenizer and a report."""
    how = {"data": data, "samples": samples, "length": length, "batch_size": batch_size, "seed": seed}
    how |= {"column": column, "split": split, "packing": False if no_packing else None}
    config = build_config(
        method,
        bits,
        skip or (),
        embeddings,
        option or (),
        recipe,
        how,
        group_size=group_size,
        block_size=block_size,
        symmetric=symmetric,
        double_quant=True if double_quant else None,
        range=None if range is None else parse_value(range),
    )
    settings = _settings(config, offload, resume)
    if dry_run:
        report = preview(src, config, dtype, revision, settings)
    elif output is None:
        raise SpecError("name the folder to write with --output, or look first with --dry-run")
    else:
        options: dict[str, Any] = {"dtype": dtype, "overwrite": overwrite, "device_map": device, "revision": revision}
        if settings is None:
            report = api.quantize(src, config, output, **options)
        else:
            with share_progress("reading") as tick:
                options |= {"resume": resume is not False, "settings": settings, "tick": tick}
                report = api.quantize(src, config, output, **options)
    if processes.rank() > 0:  # one of several tells what all of them found
        return
    if json:
        print_json(report.to_dict())
    else:
        _show(report)


def _settings(config: HfQuantConfig, offload: Path | None, resume: bool | None) -> Settings | None:
    """How to calibrate, None for methods that do not. Raises SpecError for options without effect."""
    given = {"--offload": offload is not None}
    given["--no-resume" if resume is False else "--resume"] = resume is not None
    refuse_without_blocks(config, [name for name, there in given.items() if there])
    return Settings(offload) if works_on_blocks(config.recipe) else None


def _show(report: Report) -> None:
    out = stdout()
    if report.coverage.quantized:
        saved = f"{report.mb_before:.2f} → {report.mb_after:.2f} MB ({report.mb_after / report.mb_before:.0%})"
        out.print(f"[bold]{escape(method_label(report.method, report.options))}[/]")
        out.print(f"{report.bits_per_weight:.3f} bits per quantized weight, scales included")
        out.print(f"model {saved}, {report.dtype} where not quantized")
    out.print()
    out.print(coverage_table(report.coverage))
    out.print()
    data = data_line(report.calibration)
    if report.output is None:
        if report.estimate is not None:
            show_estimate(out, report.estimate, data)
        out.print("Dry run: nothing was read but the configuration, nothing was written.")
        return
    if report.blocks:
        if data is not None:
            out.print(f"Calibrated on {escape(data)}")
            out.print()
        show_findings(out, report.blocks)
        out.print()
    memory = "" if report.peak_rss_mb is None else f", peak memory {report.peak_rss_mb:.0f} MB"
    out.print(f"{report.seconds:.1f} s{memory}. Written to [bold]{escape(report.output)}[/].")
    out.print("Measure it:", style="dim")
    out.print(f"  hfquant eval {report.output} --reference {report.source} --data TEXT", style="dim", soft_wrap=True)
