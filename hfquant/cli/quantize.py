"""`hfquant quantize`: a model in, a smaller model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .. import api
from ..errors import SpecError
from ..preview import preview
from ..report import Report
from .options import build_config, parse_value
from .output import coverage_table, method_label, print_json, stdout


def quantize_command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Folder or Hub repository of the original model.")],
    method: Annotated[str, typer.Option(help="What `hfquant backends` lists: int4, nf4, fp8, llm_int8, ...")] = "int4",
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
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Quantize a model and save it with its tokenizer and a report."""
    config = build_config(
        method,
        bits,
        skip or (),
        embeddings,
        option or (),
        group_size=group_size,
        block_size=block_size,
        symmetric=symmetric,
        double_quant=True if double_quant else None,
        range=None if range is None else parse_value(range),
    )
    if dry_run:
        report = preview(src, config, dtype, revision)
    elif output is None:
        raise SpecError("name the folder to write with --output, or look first with --dry-run")
    else:
        report = api.quantize(
            src, config, output, dtype=dtype, overwrite=overwrite, device_map=device, revision=revision
        )
    if json:
        print_json(report.to_dict())
    else:
        _show(report)


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
    if report.output is None:
        out.print("Dry run: nothing was read but the configuration, nothing was written.")
        return
    memory = "" if report.peak_rss_mb is None else f", peak memory {report.peak_rss_mb:.0f} MB"
    out.print(f"{report.seconds:.1f} s{memory}. Written to [bold]{escape(report.output)}[/].")
    out.print("Measure it:", style="dim")
    out.print(f"  hfquant eval {report.output} --reference {report.source} --data TEXT", style="dim", soft_wrap=True)
