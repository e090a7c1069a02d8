"""`hfquant inspect`: what is inside a quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..format_counts import Counts, grids_of
from ..inspection import Inspection, LayerInfo, inspect_checkpoint
from .findings import data_line, percent, show_findings
from .output import coverage_table, print_json, stdout, table
from .plot import check_plot, plot_findings


def inspect_command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder or Hub repository of a quantized model.")],
    reference: Annotated[
        str | None, typer.Option(help="The original model: adds each layer's error, worst first.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw what calibration found, as .png, .svg or .pdf.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show each layer's numbers and size, its error against the original, and what calibration found.

    Where layers have different formats, it counts them by type of layer.
    """
    if plot is not None:
        check_plot(plot)
    found = inspect_checkpoint(path, reference)
    if plot is not None:
        plot_findings(found, plot, path)
    if json:
        print_json(found.to_dict())
    else:
        _show(found, with_errors=reference is not None)


# What all layers have in common is said once, so that the table fits a terminal.
SHAREABLE = ("grid", "input", "block", "scale", "layout", "bits", "kept", "exact as")
NOTHING = "-"


def _show(found: Inspection, with_errors: bool) -> None:
    layers = [_cells(layer) for layer in found.layers]
    first = layers[0]
    shared = [name for name in SHAREABLE if len(layers) > 1 and all(cells[name] == first[name] for cells in layers)]
    hidden = {*shared, *([] if with_errors else ["error"]), *([] if found.blocks else ["output"])}
    out = stdout()
    common = "".join(f", {name} {first[name]}" for name in shared if first[name] != NOTHING)
    out.print(f"[bold]{escape(found.method)}[/]: {len(layers)} layers{escape(common)}\n")
    shown = [name for name in first if name not in hidden]
    made = table(*shown, right=("error", "output", "bits", "MB", "kept"))
    for cells in layers:
        made.add_row(*(cells[name] for name in shown))
    out.print(made)
    out.print("\nbits: per weight, scales included   kept: input columns in 16 bit", style="dim")
    if any(layer.exact_as for layer in found.layers):
        out.print("exact as: a format that is served, of as many bits, holds these weights exactly", style="dim")
    if with_errors:
        out.print("error: |W - W'| / |W|, worst layer first", style="dim")
    if found.blocks:
        out.print("output: |x (W - W')| / |x W| on calibration data", style="dim")
    out.print()
    for of, counts in found.formats.items():
        _show_formats(of, counts)
    _show_calibration(found)
    out.print(coverage_table(found.coverage))


def _show_formats(of: str, counts: Counts) -> None:
    """How many layers of each type have which grid, unless all have the same."""
    grids = grids_of(counts)
    if len(grids) < 2:
        return
    made = table(f"{of}s", *grids, right=tuple(grids))
    for kind, row in counts.items():
        made.add_row(kind, *(str(row.get(grid, NOTHING)) for grid in grids))
    stdout().print(made)
    stdout().print()


def _show_calibration(found: Inspection) -> None:
    """What the report beside the model tells, or that there is none."""
    out = stdout()
    data = data_line(found.calibration)
    if data is not None:
        out.print(f"Calibrated on {escape(data)}\n")
    if found.blocks:
        show_findings(out, found.blocks, worst=0)
        out.print()
    elif found.blocks is None:
        out.print(
            "No report beside the model: `hfquant quantize` writes one, `save_pretrained` does not.\n", style="dim"
        )


def _cells(layer: LayerInfo) -> dict[str, str]:
    """What is shown of a layer, by heading."""
    return {
        "error": "" if layer.error is None else f"{layer.error:.3%}",
        "output": "" if layer.output_error is None else percent(layer.output_error),
        "layer": layer.name.removeprefix("model."),
        "shape": "×".join(map(str, layer.shape if layer.count == 1 else (layer.count, *layer.shape))),
        "grid": layer.grid,
        "input": layer.input or NOTHING,
        "block": layer.blocks,
        "scale": layer.scale,
        "layout": f"{layer.layout}, rotated" if layer.rotated else layer.layout,
        "bits": f"{layer.bits_per_weight:.3f}",
        "MB": f"{layer.mb:.3f}",
        "kept": str(layer.outlier_columns or NOTHING),
        "exact as": layer.exact_as or NOTHING,
    }
