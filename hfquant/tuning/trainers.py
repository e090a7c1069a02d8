"""Who trains: TRL's SFTTrainer where it is installed, or transformers' Trainer; what they compute is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from .. import processes
from ..config import HfQuantConfig
from ..coverage import survey
from ..distill import DistillationTrainer
from ..errors import SpecError, UnsupportedError
from ..eval.perplexity import evaluating
from ..optional_packages import installed_version
from ..recipe_file import RecipeFile
from ..source import empty_model
from . import sharded

OLDEST = "1.0"
"""Of TRL; older versions have other arguments."""

_TRIED = 64  # tokens: logits of more can be large
_TOLERANCE = 0.01  # bfloat16 has steps of 0.4 %

SFT, PLAIN, DISTILL = "trl.SFTTrainer", "transformers.Trainer", "hfquant.distill.DistillationTrainer"


@dataclass(frozen=True)
class Choice:
    """A trainer, and the version of TRL or else of transformers; `because`: why it is not TRL's, which is there."""

    name: str
    version: str
    because: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def choose(recipe: RecipeFile, config: HfQuantConfig | None, model_config: Any, device: torch.device) -> Choice | None:
    """The trainer of a recipe, None for no training. Raises SpecError if it asks for TRL's and cannot have it."""
    work = recipe.workflow
    if work.train is None:
        return None
    distills = work.qat is not None and work.qat.distill
    choice = Choice(DISTILL if distills else PLAIN, version("transformers"))
    if work.train.trainer == "transformers":
        return choice
    reason = _why_not(recipe, config, model_config, device)
    found = installed_version("trl")
    if reason is None and found is not None:
        return Choice(SFT, found)
    if work.train.trainer == "trl":
        raise SpecError(f"{recipe.at('train', 'trainer')}: trainer: trl, and {reason}; or write trainer: transformers")
    expected = work.qat is not None or found is None
    return choice if expected else Choice(choice.name, choice.version, reason)


def _why_not(recipe: RecipeFile, config: HfQuantConfig | None, model_config: Any, device: torch.device) -> str | None:
    """Why TRL's trainer cannot carry out a recipe, or None."""
    if recipe.workflow.qat is not None:
        return "'qat' trains towards the original's predictions or through rounding, with trainers of its own"
    found = installed_version("trl")
    if found is None:
        return 'TRL is not installed: pip install "hfquant[trl]"'
    if Version(found) < Version(OLDEST):
        return f'TRL {found} is older than {OLDEST}: pip install "hfquant[trl]"'
    if sharded.is_sharded():
        return "it takes the whole weight of the output layer, of which each process holds a part"
    try:
        from trl import SFTConfig, SFTTrainer  # noqa: F401 - an incompatible version is better found now than later
    except Exception as error:  # it patches and imports other libraries
        return f"TRL cannot be imported ({type(error).__name__}: {error})"
    if device.type == "cuda" and processes.world() == 1 and torch.cuda.device_count() > 1:
        return "it trains on one GPU of a process: start one for each, or show one (CUDA_VISIBLE_DEVICES)"
    return _head_in_the_way(recipe, config, empty_model(model_config, torch.float32))


def _head_in_the_way(recipe: RecipeFile, config: HfQuantConfig | None, model: Any) -> str | None:
    """Why the output layer of a model cannot be used as a matrix, as TRL does to take the loss without logits."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if not isinstance(head, nn.Linear) or name is None:
        return f"it needs an output layer that is linear, and {type(model).__name__} has another one"
    quantized = [] if config is None else survey(model, config.modules_to_not_convert, config.embeddings)[0]
    if name in {target.name for target in quantized}:
        return f"it takes the weight of the output layer {name}, which is going to be quantized, past its kernel"
    lora = recipe.workflow.lora
    wanted = [] if lora is None or isinstance(lora.targets, str) else [*lora.targets, *lora.experts]
    if any(f".{name}".endswith(f".{target.removesuffix('.weight')}") for target in wanted):
        return f"it takes the weight of the output layer {name} past its adapter, which would learn nothing"
    return None


def build(
    name: str,
    model: Any,
    given: dict[str, Any],
    rows: Sequence[dict[str, Tensor]],
    collate: Callable[[Any], dict[str, Tensor]],
    callbacks: list[Any],
    teacher: Any = None,
) -> Any:
    """The trainer `name` of `model`; `given`: what `TrainingArguments` takes."""
    if name == SFT:
        return _sft(model, given, rows, collate, callbacks)
    kind, extra = (Trainer, {}) if name == PLAIN else (DistillationTrainer, {"teacher": teacher})
    arguments = TrainingArguments(**given)
    sharded.begin(arguments.device)
    return kind(model, arguments, train_dataset=rows, data_collator=collate, callbacks=callbacks, **extra)


def _sft(
    model: Any,
    given: dict[str, Any],
    rows: Sequence[dict[str, Tensor]],
    collate: Callable[[Any], dict[str, Tensor]],
    callbacks: list[Any],
) -> Any:
    """TRL's SFTTrainer on samples that are ready: it adds no tokens, cuts nothing, and changes no dtype."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Quiet(SFTTrainer):
        """What a user trains with which hardware stays here, unless the user tells."""

        def _send_telemetry(self) -> None:
            pass

    # What TRL turns on by itself and transformers does not. Checkpointing comes with the adapters where it is wanted.
    settings: dict[str, Any] = {"bf16": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    known = SFTConfig.__dataclass_fields__
    settings["activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"] = False
    balances = getattr(model.config.get_text_config(), "output_router_logits", False)
    if "router_aux_loss_coef" in known and not balances:
        settings["router_aux_loss_coef"] = 0.0
    columns = {name: torch.stack([row[name] for row in rows]).numpy() for name in rows[0]}
    made = Quiet(
        model,
        SFTConfig(**{**settings, **given}),
        train_dataset=Dataset.from_dict(columns).with_format("torch"),
        data_collator=collate,
        callbacks=callbacks,
        processing_class=PreTrainedTokenizerBase(),  # asked for, and without work: the samples are tokens
    )
    made.processing_class = None  # or its special tokens, none, would become the model's
    _check_loss(made, model, max(rows, key=lambda row: int(row["attention_mask"].sum())))
    return made


def _check_loss(made: Any, model: Any, row: dict[str, Tensor]) -> None:
    """Raise UnsupportedError if a trainer that does without logits takes another loss than the model, at a few tokens.

    A model may do more with its last hidden state than its configuration tells.
    """
    ids = row["input_ids"][row["attention_mask"].bool()][None, :_TRIED].to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if ids.shape[1] < 2:
        return
    with evaluating(model):
        own, theirs = float(model(**inputs).loss), float(made.compute_loss(model, dict(inputs)))
    if not abs(own - theirs) <= _TOLERANCE * abs(own) + _TOLERANCE:
        raise UnsupportedError(
            f"TRL's SFTTrainer takes a loss of {theirs:.4f} where {type(model.get_base_model()).__name__} itself gives "
            f"{own:.4f}: it leaves out what the model does with its logits. Write trainer: transformers"
        )


def _kept(config: Any) -> dict[str, Any]:
    names = ("use_cache", "output_router_logits", "router_aux_loss_coef")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


@contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """Take back what trainers set in a model beside its parameters: its forward, and its configuration."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = [(config, _kept(config)) for config in (base.config, base.config.get_text_config())]
    forward = vars(base).get("forward")
    try:
        yield
    finally:
        for config, values in kept:
            for name, value in values.items():
                setattr(config, name, value)
        if forward is None:
            vars(base).pop("forward", None)
        else:
            base.forward = forward
