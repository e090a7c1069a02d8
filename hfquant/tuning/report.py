"""What a recipe did: the report, its picture, and the model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from ..optional_packages import figure_class
from ..report import strict_json
from .stages import Stage

REPORT_NAME = "finetune_report.json"
CURVE_NAME = "loss.svg"


@dataclass(frozen=True)
class TuningReport:
    """What `hfquant.finetune` did; also written to finetune_report.json.

    `recipe`: name and SHA-256 of its file; `changes`: what was given in place of its entries. `quantization`: the
    report of the quantized model that `out` holds. `adapter`: trained parameters, None for none. `training`: facts
    about it, such as who trained; `losses` by step. `stages`: the model measured on text that it was not trained on.
    `initialized`: what each layer's adapter made up for at first. `seconds` of each part. `curve`: the file with the
    loss curve. `pushed`: address on the Hub.
    """

    recipe: dict[str, str]
    model: str
    output: str
    changes: dict[str, Any] = field(default_factory=dict)
    exit: str | None = None
    quantization: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    losses: tuple[dict[str, float], ...] = ()
    stages: tuple[Stage, ...] = ()
    initialized: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_mb: float | None = None
    curve: str | None = None
    pushed: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**vars(self), "stages": [stage.to_dict() for stage in self.stages]}

    def write(self, folder: Path) -> None:
        """Put it beside the weights."""
        (folder / REPORT_NAME).write_text(strict_json(self.to_dict()) + "\n")


def draw(losses: Sequence[dict[str, float]], stages: Sequence[Stage], file: Path) -> bool:
    """Draw the loss of the training, with that of the stages on held-out text as lines; False without matplotlib."""
    try:
        figure = figure_class()(figsize=(8, 4.5), layout="constrained")
    except UnsupportedError:
        return False
    axes = figure.subplots()
    axes.plot([entry["step"] for entry in losses], [entry["loss"] for entry in losses], label="training")
    for number, stage in enumerate(stages):
        axes.axhline(stage.loss, linestyle="--", color=f"C{number + 1}", label=f"{stage.name}, held-out text")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.legend()
    figure.savefig(file)
    return True


def write_card(report: TuningReport, folder: Path) -> None:
    """Write README.md: where the model comes from, how it was made, what it costs, and how to load it."""
    from huggingface_hub import ModelCard, ModelCardData

    adapters = report.exit == "adapter"
    known = None if Path(report.model).is_dir() else report.model
    data = ModelCardData(
        base_model=known,
        base_model_relation=None if known is None else "adapter" if adapters else "quantized",
        library_name="peft" if adapters else "transformers",
        tags=["hfquant", *(["lora"] if adapters else [])],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(report)}").save(folder / "README.md")


def _text(report: TuningReport) -> str:
    parts = [f"# {Path(report.output).name}", _made(report), _table(report.stages), _loading(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _made(report: TuningReport) -> str:
    made = f"Made of `{Path(report.model).name if Path(report.model).is_dir() else report.model}` with "
    made += f"hfquant {report.versions['hfquant']} and the recipe `{report.recipe['file']}` "
    made += f"(SHA-256 {report.recipe['sha256']})"
    if report.changes:
        made += ", " + ", ".join(f"{name} {value}" for name, value in report.changes.items())
    made += "."
    if report.quantization is not None:
        bits = report.quantization["bits_per_weight"]
        made += f" Method `{report.quantization['method']}`, {bits:.2f} bits per quantized weight."
    return made


def _table(stages: Sequence[Stage]) -> str:
    if not stages:
        return ""
    rows = ["| stage | loss | perplexity | KL from the original |", "|---|--:|--:|--:|"]
    for stage in stages:
        rows.append(f"| {stage.name} | {stage.loss:.4f} | {stage.fidelity.ppl:.3f} | {stage.fidelity.kl:.5f} |")
    return "\n".join(rows)


def _loading(report: TuningReport) -> str:
    code = ["```python", "from transformers import AutoModelForCausalLM"]
    quantized = report.quantization is not None
    code += ["", "import hfquant"] if quantized else []
    if report.exit == "adapter":
        code.insert(1, "from peft import PeftModel")
        base = 'FOLDER + "/base"' if quantized else repr(report.model)
        code += ["", f"base = AutoModelForCausalLM.from_pretrained({base})"]
        code += ["model = PeftModel.from_pretrained(base, FOLDER)"]
    else:
        code += ["", "model = AutoModelForCausalLM.from_pretrained(FOLDER)"]
    return "\n".join(["`FOLDER` is where these files are:", "", *code, "```"])
