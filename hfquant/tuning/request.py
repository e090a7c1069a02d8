"""What a user asks for, checked before anything long starts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..config import HfQuantConfig
from ..data import CalibrationData, check, tokenizer_for
from ..errors import CalibrationError, SpecError
from ..hub import check_repository
from ..optional_packages import is_installed
from ..qat import why_not
from ..recipe_file import EvaluateSection, PushSection, RecipeFile, TrainSection, Workflow, read_recipe
from ..selftext import refusal
from ..source import check_device, dtype_named, model_class, original_config, stored_dtype
from ..staging import check_output
from . import sharded
from .trainers import Choice, choose

_8BIT = ("adamw_8bit", "paged_adamw_8bit")


@dataclass(frozen=True)
class Request:
    """The arguments of `hfquant.finetune`."""

    recipe: str | Path
    model: str | Path
    out: str | Path | None  # None to look only
    data: Any = None
    eval_data: str | Path | None = None
    max_steps: int | None = None
    seed: int | None = None
    device: str | None = None
    overwrite: bool = False
    resume: bool = True
    push: str | None = None
    private: bool = True


@dataclass(frozen=True)
class Plan:
    """A request that can be carried out.

    `config`: how to quantize, None for a model that stays as it is; it may still lack its calibration data. `train` and
    `text`: how and on what to train, None for no training; `trainer`: who trains. `tokenizer`: None where token tensors
    are given.
    """

    recipe: RecipeFile
    model: str
    out: Path
    model_config: Any
    tokenizer: Any
    config: HfQuantConfig | None
    train: TrainSection | None
    text: CalibrationData | None
    evaluate: EvaluateSection | None
    dtype: torch.dtype
    device: torch.device
    push: PushSection | None
    trainer: Choice | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def workflow(self) -> Workflow:
        """The sections of the recipe, as they are in the file."""
        return self.recipe.workflow

    @property
    def seed(self) -> int:
        """Of everything that is drawn."""
        return self.train.seed if self.train is not None else 0

    @property
    def optimizer(self) -> str:
        """transformers' name of the optimizer."""
        assert self.train is not None
        name = self.train.optimizer
        if name == "auto":
            name = "paged_adamw_8bit" if self.device.type == "cuda" and is_installed("bitsandbytes") else "adamw"
        return {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit"}.get(name, name)


def plan(request: Request) -> Plan:
    """Read the recipe and look at the model and the data. Raises SpecError or CalibrationError."""
    recipe = read_recipe(request.recipe)
    work, out = recipe.workflow, Path(request.out or "out")
    if request.out is not None:
        check_output(out, request.overwrite, keep=request.model)
    train = _changed(work.train, recipe, request)
    model_config = original_config(request.model)
    _check_class(model_config, request.model)
    config = _config(recipe, request)
    text = _text(request.data, train, config, recipe)
    if text is None and config is not None:
        config.check_data()
    tokenizer = None
    if text is not None:
        tokenizer = tokenizer_for(text, request.model)
        check(text, tokenizer, model_config)
    dtype = dtype_named("auto" if train is None else train.dtype) or stored_dtype(request.model, model_config)
    device = _device(request.device)
    found = Plan(
        recipe,
        str(request.model),
        out,
        model_config,
        tokenizer,
        config,
        train,
        text,
        _evaluate(work, request, text),
        dtype,
        device,
        _push(request, work),
        choose(recipe, config, model_config, device),
        _asked(request),
    )
    return sharded.check(found)


def _asked(request: Request) -> dict[str, Any]:
    """What the request says in place of entries of the recipe."""
    changes = {"max_steps": request.max_steps, "seed": request.seed}
    return {name: value for name, value in changes.items() if value is not None}


def _changed(train: TrainSection | None, recipe: RecipeFile, request: Request) -> TrainSection | None:
    """The section `train` with what the request says in its place. Raises SpecError if there is nothing to change."""
    asked = _asked(request)
    given = {"steps" if name == "max_steps" else name: value for name, value in asked.items()}
    if train is None:
        if given:
            raise SpecError(f"{recipe.path} does not train (it has no section 'train'): leave {', '.join(asked)} out")
        return None
    if request.max_steps is not None and request.max_steps < 1:
        raise SpecError(f"max_steps is a whole number from 1, got {request.max_steps}")
    if train.optimizer in _8BIT and not is_installed("bitsandbytes"):
        raise SpecError(
            f"{recipe.at('train', 'optimizer')}: {train.optimizer} needs bitsandbytes, which is not installed: "
            'pip install "hfquant[bitsandbytes]", or write optimizer: adamw'
        )
    return train.model_copy(update=given)


def _check_class(model_config: Any, model: str | Path) -> None:
    reason = refusal(model_class(model_config), model_config)
    if reason is not None:
        raise SpecError(f"{model} cannot be fine-tuned on text: {reason}. Give a causal language model")


def _config(recipe: RecipeFile, request: Request) -> HfQuantConfig | None:
    """How to quantize; data that is given takes the place of what the recipe names. Raises SpecError."""
    if recipe.workflow.quantize is None:
        return None
    config = HfQuantConfig.from_recipe(recipe.path, **({} if request.data is None else {"data": None}))
    if recipe.workflow.qat is not None and (reason := why_not(config.recipe)):
        raise SpecError(f"{recipe.at('quantize')}: weights cannot be trained through {config.method!r}: {reason}")
    return config


def _text(
    data: Any, train: TrainSection | None, config: HfQuantConfig | None, recipe: RecipeFile
) -> CalibrationData | None:
    """What the recipe trains on, or else calibrates or measures on. Raises CalibrationError if there is nothing.

    What is given takes the place of what the recipe names.
    """
    measured = recipe.workflow.evaluate
    kept = measured.sequences if measured is not None else 0
    if train is not None:
        data = train.data if data is None else data
        if data is None:
            raise CalibrationError(
                f"{recipe.path} trains, and names nothing to train on: give --data (data=): a text file, a dataset, "
                'or "self" for text that the model writes'
            )
        sizes = (train.samples + kept, train.length, train.batch_size, train.seed)
        return CalibrationData(data, *sizes, train.column, train.split, train.packing)
    how = CalibrationData() if config is None else config.data
    data = how.data if data is None else data
    return None if data is None else replace(how, data=data, samples=how.samples + kept)


def _evaluate(work: Workflow, request: Request, text: CalibrationData | None) -> EvaluateSection | None:
    """How to measure, None for not at all. Raises SpecError for a file that is not there."""
    section = work.evaluate
    named = request.eval_data if request.eval_data is not None else (section.data if section is not None else None)
    if named is not None and not Path(named).is_file():
        raise SpecError(f"the text to measure on, {named}, is not a file: give a text file (--eval-data, eval_data=)")
    if section is None and named is None:
        return None
    if named is None and text is None:
        raise SpecError(f"{request.recipe} measures, and there is no text: give --eval-data (eval_data=) or --data")
    return (section or EvaluateSection()).model_copy(update={"data": None if named is None else str(named)})


def _push(request: Request, work: Workflow) -> PushSection | None:
    """Where to upload to. Raises SpecError for what is no repository."""
    found = work.push
    if request.push is not None:
        found = PushSection(repository=request.push, private=request.private)
    if found is not None:
        check_repository(found.repository)
    return found


def _device(asked: str | None) -> torch.device:
    """The device that is asked for, or that of this process. Raises SpecError if it cannot be used."""
    from accelerate import PartialState

    # Told of the CPU, it joins processes that share one; it would take them for single ones otherwise.
    cpu = asked == "cpu" or not torch.accelerator.is_available()
    # What processes tell each other lies on the CPU, where NCCL, which is all they would have, does not go.
    both = not cpu and torch.cuda.is_available() and "LOCAL_RANK" in os.environ
    state = PartialState(cpu=cpu, **({"backend": "cuda:nccl,cpu:gloo"} if both else {}))
    check_device(asked)
    return torch.device(state.device if asked is None else asked)
