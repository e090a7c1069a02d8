"""A picture of what calibration found."""

from __future__ import annotations

from pathlib import Path

from ..errors import SpecError
from ..findings import worst_first
from ..inspection import Inspection
from ..optional_packages import figure_class
from .findings import short

FORMATS = (".png", ".svg", ".pdf")
_MOST = 60  # layers that a picture can name


def check_plot(file: Path) -> None:
    """Raise SpecError for a file that cannot be written, UnsupportedError if matplotlib is not installed."""
    if file.suffix.lower() not in FORMATS:
        raise SpecError(f"--plot {file}: name a file that ends with {', '.join(FORMATS)}")
    if not file.absolute().parent.is_dir():
        raise SpecError(f"--plot {file}: there is no folder {file.absolute().parent}")
    figure_class()


def plot_findings(found: Inspection, file: Path, title: str) -> None:
    """Draw the error of the hidden states after each block, and the error of each layer's output, worst first.

    Raises SpecError for a model without findings.
    """
    if not found.blocks:
        raise SpecError(f"--plot: there is no report of a calibrated quantization beside {title}, so nothing to draw")
    blocks = [block.error for block in found.blocks if block.error is not None]
    layers = worst_first(layer for block in found.blocks for layer in block.layers if layer.error is not None)[:_MOST]
    figure = figure_class()(figsize=(10, 4 + 0.18 * len(layers)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3, max(3.0, 0.18 * len(layers))])
    above.plot(range(len(blocks)), [100 * error for error in blocks], marker="o")
    above.set_title(f"{title}: {found.method}")
    above.set_xlabel("block")
    above.set_ylabel("error of hidden states, %")
    above.set_ylim(bottom=0)
    above.locator_params(axis="x", integer=True)
    below.barh([short(layer.name) for layer in layers], [100 * (layer.error or 0.0) for layer in layers])
    below.invert_yaxis()
    below.set_xlabel("error of the layer's output, %")
    figure.savefig(file)
