"""`hfquant finetune`: a recipe, carried out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from .. import processes
from ..errors import SpecError
from ..tuning import finetune
from .output import method_label, print_json, share_progress, stdout, table


def finetune_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file: quantize, adapters, training, exit.")],
    model: Annotated[str, typer.Option(help="Folder or Hub repository of the original model.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.", show_default=False)] = None,
    data: Annotated[
        str | None,
        typer.Option(help="What to train on: text file, .json or .jsonl, dataset name, or self.", show_default=False),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Text file to measure on.", show_default="a part of the data, kept back")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Updates, in place of what the recipe says.")] = None,
    seed: Annotated[int | None, typer.Option(help="In place of what the recipe says.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...", show_default="a GPU if there is one")] = None,
    push: Annotated[str | None, typer.Option(metavar="REPOSITORY", help="Upload the result to the Hub.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository for everybody to see.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted run stopped.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Quantize a model, train adapters on it, and make of it what the recipe says.

    Several processes: `accelerate launch -m hfquant finetune ...`.
    """
    if public and push is None:
        raise SpecError("--public is of a repository: name it with --push, or leave --public out")
    options: dict[str, Any] = {"data": data, "eval_data": eval_data, "max_steps": max_steps, "seed": seed}
    options |= {"device": device, "overwrite": overwrite, "resume": resume}
    if dry_run:
        from ..tuning.forecast import forecast

        _show_forecast(forecast(recipe, model, output, **options), json)
        return
    if output is None:
        raise SpecError("name the folder to write with --output, or look first with --dry-run")
    with share_progress("reading") as tick:
        report = finetune(recipe, model, output, push=push, private=not public, tick=tick, **options)
    if processes.rank() > 0:
        return
    if json:
        print_json(report.to_dict())
    else:
        _show(report)


def _show_forecast(found: Any, json: bool) -> None:
    if json:
        print_json(found.to_dict())
        return
    out = stdout()
    for line in found.lines():
        out.print(escape(line), soft_wrap=True)
    out.print("Dry run: no weights were read, nothing was written.")


def _show(report: Any) -> None:
    out = stdout()
    if report.quantization is not None:
        label = method_label(report.quantization["method"], report.quantization["options"])
        out.print(f"[bold]{escape(label)}[/], {report.quantization['bits_per_weight']:.3f} bits per quantized weight")
    if report.adapter is not None:
        out.print(f"adapters with {report.adapter['parameters']:,} parameters, {report.adapter['mb']:.2f} MB")
    if report.training is not None:
        facts = report.training
        learned = f", {facts['loss_tokens']:,} of them the assistant's" if facts["assistant_only_loss"] else ""
        out.print(
            f"{facts['steps']} steps with {facts['optimizer']} in {facts['trainer']}, {facts['tokens']:,} tokens"
            f"{learned}; the loss went from {facts['first_loss']:.3f} to {facts['last_loss']:.3f}",
            soft_wrap=True,
        )
    if report.stages:
        out.print()
        out.print(_stages(report.stages))
    for note in report.notes:
        out.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    out.print()
    memory = "" if report.peak_rss_mb is None else f", peak memory {report.peak_rss_mb:.0f} MB"
    out.print(f"{sum(report.seconds.values()):.1f} s{memory}. Written to [bold]{escape(report.output)}[/].")
    if report.pushed is not None:
        out.print(f"Uploaded to {escape(report.pushed)}.")


def _stages(stages: Any) -> Any:
    """Loss at each stage on held-out text."""
    made = table("stage", "loss", "change", "perplexity", "KL", right=("loss", "change", "perplexity", "KL"))
    for stage in stages:
        change = "" if stage.change is None else f"{stage.change:+.4f}"
        kl = "" if stage.name == "original" else f"{stage.fidelity.kl:.5f}"
        made.add_row(stage.name, f"{stage.loss:.4f}", change, f"{stage.fidelity.ppl:.3f}", kl)
    return made
