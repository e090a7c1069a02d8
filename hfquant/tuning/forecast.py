"""What a recipe is going to do to a model: everything that can be told without reading weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import processes
from ..conversations import MASK
from ..data import kind_of
from ..preview import preview
from ..source import empty_model
from .attach import attach, size_of
from .base import name_of
from .request import Plan, Request, plan
from .rows import read_rows
from .training import steps


@dataclass(frozen=True)
class Forecast:
    """What is known beforehand. `quantization`: the preview of `hfquant quantize --dry-run`, None for none.

    `adapter`: parameters that are going to be trained. `steps`: updates of one process. `samples`: to train on.
    `assistant_only_loss`: whether only what the assistant says is learned. `trainer`: who trains, and its version;
    `because`: why not TRL's SFTTrainer, though TRL is installed.
    """

    recipe: dict[str, str]
    model: str
    device: str
    dtype: str
    quantization: dict[str, Any] | None
    adapter: int | None
    samples: int | None
    steps: int | None
    optimizer: str | None
    assistant_only_loss: bool | None
    trainer: str | None
    because: str | None
    exit: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dict(vars(self))

    def lines(self) -> list[str]:
        """The same for people."""
        found = [f"{self.model}, in {self.dtype} on {self.device}"]
        if (q := self.quantization) is not None:
            sizes = f"{q['mb_before']:.2f} → {q['mb_after']:.2f} MB"
            found.append(f"quantize: {q['method']}, {q['bits_per_weight']:.3f} bits per quantized weight, {sizes}")
        if self.adapter is not None:
            found.append(f"adapters: {self.adapter:,} parameters")
        if self.steps is not None:
            what = ", on what the assistant says" if self.assistant_only_loss else ""
            found.append(f"train: {self.steps} steps with {self.optimizer} on {self.samples} samples{what}")
            found.append(f"trainer: {self.trainer}" + ("" if self.because is None else f", as {self.because}"))
        if self.exit is not None:
            found.append(f"exit: {self.exit}")
        return found


def forecast(recipe: Any, model: Any, out: Any, **options: Any) -> Forecast:
    """The arguments of `hfquant.finetune`. Raises like it, as far as that can be told beforehand."""
    chosen = plan(Request(recipe, model, out, **options))
    samples, updates, assistant = _training(chosen)
    work = chosen.workflow
    dtype = name_of(chosen.dtype)
    shown = None if chosen.config is None else preview(chosen.model, chosen.config, dtype, None).to_dict()
    return Forecast(
        recipe=chosen.recipe.label,
        model=chosen.model,
        device=chosen.device.type,
        dtype=dtype,
        quantization=shown,
        adapter=None if work.lora is None else _parameters(chosen),
        samples=samples,
        steps=updates,
        optimizer=None if updates is None else chosen.optimizer,
        assistant_only_loss=assistant,
        trainer=None if chosen.trainer is None else str(chosen.trainer),
        because=None if chosen.trainer is None else chosen.trainer.because,
        exit=work.exit or (None if work.lora is None else "adapter"),
    )


def _training(chosen: Plan) -> tuple[int | None, int | None, bool | None]:
    """Samples, updates, and whether only what an assistant says is learned; None for no training."""
    if chosen.train is None or chosen.text is None:
        return None, None, None
    rows = [] if kind_of(chosen.text.data) == "self" else read_rows(chosen).train
    samples = len(rows) or chosen.train.samples
    return samples, steps(chosen.train, samples, processes.world()), any(MASK in row for row in rows)


def _parameters(chosen: Plan) -> int:
    """Parameters of the adapters, counted on a model without values."""
    found: int = size_of(attach(empty_model(chosen.model_config, chosen.dtype), chosen))["parameters"]
    return found
