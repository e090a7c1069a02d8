"""The training of a recipe, as it sets the trainer up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .. import processes
from ..calibration_state import Tick
from ..conversations import MASK
from ..errors import HfQuantError
from ..lora.check import check_gradients
from ..recipe_file import TrainSection
from . import sharded
from .request import Plan
from .rows import Rows, collate
from .trainers import as_it_was, build

_LOGGED = 500  # losses of a run, at most about so many
_MEASURES = ("entropy", "mean_token_accuracy")  # what some trainers tell beside the loss


def arguments(plan: Plan, folder: Path, samples: int, workers: int) -> dict[str, Any]:
    """What `TrainingArguments` takes; `folder` is for what is needed to go on after a crash."""
    section = plan.train
    assert section is not None
    updates = steps(section, samples, workers)
    return {
        "output_dir": str(folder),
        "max_steps": updates,
        "per_device_train_batch_size": section.batch_size,
        "gradient_accumulation_steps": section.accumulate,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.schedule,
        "warmup_steps": 0 if section.schedule == "constant" else round(section.warmup * updates),
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "optim": plan.optimizer,
        "bf16": plan.workflow.qat is not None and section.dtype == "bfloat16",  # its weights stay in float32
        "save_strategy": "steps",
        "save_steps": section.save_every,
        "save_total_limit": 1,
        "logging_steps": max(1, updates // _LOGGED),
        "logging_nan_inf_filter": False,
        "seed": section.seed,
        "data_seed": section.seed,
        "use_cpu": plan.device.type == "cpu",
        "dataloader_pin_memory": plan.device.type != "cpu",
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
    }


def steps(section: TrainSection, samples: int, workers: int) -> int:
    """Updates of the whole training on that many samples, by that many processes."""
    if section.steps is not None:
        return section.steps
    return max(1, math.ceil(section.epochs * samples / (section.batch_size * section.accumulate * workers)))


class CheckAdapters(TrainerCallback):
    """Sees in the first steps that every adapter learns: one that does not is an error, not a shorter report."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients. Raises SpecError that names what has none."""
        first = args.warmup_steps + 1  # the rate of the first step of a warmup is 0
        if state.global_step in (0, first):
            check_gradients(kwargs["model"], state.global_step)


class Watch(TrainerCallback):
    """Tells how the training goes, and ends it where it went wrong."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick
        self.loss: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report an update."""
        said = "" if self.loss is None else f", loss {self.loss:.3f}"
        self.tick(f"training{said}", state.global_step / max(1, state.max_steps))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note the loss. Raises HfQuantError if it is not a finite number."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(float(loss)):
            raise HfQuantError(
                f"the loss is {loss} in step {state.global_step}: the training diverged. Lower learning_rate, or train "
                "in float32 (dtype: float32)"
            )
        self.loss = float(loss)


def train(
    model: Any, rows: Rows, plan: Plan, folder: Path, tick: Tick, teacher: Any = None
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Train `model` on samples, from the last state in `folder` if there is one; facts, and the losses by step.

    `teacher`: whose predictions it learns in place of the next tokens, None for none. Raises HfQuantError if the
    training diverges, SpecError for adapters that learn nothing.
    """
    section, choice, samples = plan.train, plan.trainer, len(rows.train)
    assert section is not None and choice is not None
    workers = processes.world()
    given = arguments(plan, folder, samples, workers)
    watched: list[Any] = [Watch(tick)] if plan.workflow.lora is None else [Watch(tick), CheckAdapters()]
    with as_it_was(model):
        made = build(choice.name, model, given, rows.train, collate, watched, teacher)
        made.remove_callback(PrinterCallback)  # the report has all that it prints
        model.config.use_cache = False
        done = made.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    losses = [_entry(logged) for logged in made.state.log_history if "loss" in logged]
    seen = given["max_steps"] * section.batch_size * section.accumulate * workers
    facts = {
        "steps": given["max_steps"],
        "samples": samples,
        "tokens": round(seen * rows.tokens / samples),
        "loss_tokens": round(seen * rows.loss_tokens / samples),
        "assistant_only_loss": MASK in rows.train[0],
        "optimizer": plan.optimizer,
        "processes": workers,
        "first_loss": losses[0]["loss"],
        "last_loss": losses[-1]["loss"],
        "seconds": done.metrics["train_runtime"],
        "sharded": sharded.megabytes(model),
    }
    return facts, losses


def _entry(logged: dict[str, Any]) -> dict[str, float]:
    """What a report keeps of a step."""
    return {name: logged[name] for name in ("step", "loss", *_MEASURES) if name in logged}
