"""Recipe files: YAML that says how to quantize a model, fine-tune it, and what to make of it; errors name the line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, model_validator

from .errors import SpecError

Place = tuple[str | int, ...]
Whole = Annotated[int, Field(strict=True)]
# YAML reads 2e-4, which has no point, as a string.
Number = Annotated[float, Field(allow_inf_nan=False)]
Switch = Annotated[bool, Field(strict=True)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class QuantizeSection(BaseModel):
    """`quantize`: the keywords of `HfQuantConfig`, which knows what they mean."""

    model_config = ConfigDict(extra="allow", frozen=True)

    method: Any

    def keywords(self) -> dict[str, Any]:
        """What `HfQuantConfig` takes."""
        return {"method": self.method, **(self.model_extra or {})}


class LoraSection(_Section):
    """`lora`: the adapters. Hu et al., "LoRA" (2021).

    `rank`, `alpha`, `dropout`, `rslora`, `dora` are PEFT's; `alpha` is by default twice the rank. `targets`:
    "all-linear" or names of layers; `experts`: names of fused weights of experts, such as "experts.gate_up_proj".
    `init`: "default" (no change at first), or an approximation of what quantization lost: "loftq" (Li et al. 2023) or
    "eora" (Liu et al. 2024). `iterations`: of LoftQ. `pooled`: one input a quantization group, so that the adapter
    merges into zero points without error (QA-LoRA, Xu et al. 2023).
    """

    rank: Annotated[Whole, Field(ge=1)] = 16
    alpha: Annotated[Number, Field(gt=0)] | None = None
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | list[StrictStr] = "all-linear"
    experts: list[StrictStr] = []
    init: Literal["default", "loftq", "eora"] = "default"
    iterations: Annotated[Whole, Field(ge=1)] = 5
    rslora: Switch = False
    dora: Switch = False
    pooled: Switch = False

    @model_validator(mode="after")
    def _fits(self) -> LoraSection:
        if self.pooled and (self.dora or self.init != "default"):
            raise ValueError("pooled adapters are plain ones: leave dora and init out")
        return self


class QatSection(_Section):
    """`qat`: all weights are trained while the model computes with their quantized values (LLM-QAT, Liu et al. 2023).

    `distill`: towards the original model's predictions instead of the text's next tokens.
    """

    distill: Switch = True


class TrainSection(_Section):
    """`train`: TRL's SFTTrainer or transformers' Trainer.

    `data`: a text file, .json or .jsonl, a dataset, or "self" for text that the model writes; None for `--data`.
    `column`, `split`: of a dataset or JSON file. `samples` windows of `length` tokens; `packing`: texts one after the
    other, without it each gives one sample, cut at `length`. `assistant_only_loss`: of conversations only what the
    assistant says is learned; None does so wherever the data are conversations. `trainer`: "auto" is TRL's where it is
    installed and can train the model; the losses are the same. `steps`: None for `epochs` over the data. `batch_size`
    is of one process and one step, `accumulate` steps make an update. `schedule` is one of transformers' schedulers.
    `optimizer`: "adamw_8bit" and "paged_adamw_8bit" need bitsandbytes, "auto" is the latter on a GPU where bitsandbytes
    is installed and "adamw" elsewhere. `dtype`: of the model; adapters are trained in float32, and so are weights under
    `qat`, where it is that of the arithmetic.
    """

    data: StrictStr | None = None
    samples: Annotated[Whole, Field(ge=1)] = 4096
    length: Annotated[Whole, Field(ge=2)] = 512
    column: StrictStr | None = None
    split: StrictStr = "train"
    packing: Switch = True
    assistant_only_loss: Switch | None = None
    trainer: Literal["auto", "trl", "transformers"] = "auto"
    steps: Annotated[Whole, Field(ge=1)] | None = None
    epochs: Annotated[Number, Field(gt=0)] = 1.0
    batch_size: Annotated[Whole, Field(ge=1)] = 8
    accumulate: Annotated[Whole, Field(ge=1)] = 1
    learning_rate: Annotated[Number, Field(gt=0)] = 2e-4
    schedule: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "cosine"
    warmup: Annotated[Number, Field(ge=0, lt=1)] = 0.03
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[Number, Field(gt=0)] = 1.0
    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    checkpointing: Switch = False
    save_every: Annotated[Whole, Field(ge=1)] = 500
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: Whole = 0


class EvaluateSection(_Section):
    """`evaluate`: on `sequences` windows of `length` tokens of `data`; None keeps them back from the training data."""

    data: StrictStr | None = None
    sequences: Annotated[Whole, Field(ge=1)] = 32
    length: Annotated[Whole, Field(ge=2)] = 256
    batch_size: Annotated[Whole, Field(ge=1)] = 8


class PushSection(_Section):
    """`push`: where the result goes on the Hub."""

    repository: StrictStr
    private: Switch = True


class Workflow(_Section):
    """A whole recipe; any part may be missing.

    `exit`: "adapter" keeps adapters beside the quantized model; "merge" merges them into the dequantized model and
    quantizes that again with the same method; "exact" moves pooled adapters into the zero points.
    """

    quantize: QuantizeSection | None = None
    lora: LoraSection | None = None
    qat: QatSection | None = None
    train: TrainSection | None = None
    exit: Literal["adapter", "merge", "exact"] | None = None
    evaluate: EvaluateSection | None = None
    push: PushSection | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Workflow:
        if reason := _contradiction(self):
            raise ValueError(reason)
        return self


_SECTIONS: dict[str, type[BaseModel]] = {
    "lora": LoraSection,
    "qat": QatSection,
    "train": TrainSection,
    "evaluate": EvaluateSection,
    "push": PushSection,
}


def _contradiction(w: Workflow) -> str | None:
    """Why the sections do not make sense together, or None."""
    if w.quantize is None and w.lora is None:
        return "there is nothing to do: write a section 'quantize' or 'lora'"
    if w.lora is not None and w.qat is not None:
        return "'lora' trains adapters, 'qat' all weights: write one of them"
    if w.qat is not None and (w.quantize is None or w.train is None):
        return "'qat' needs the sections 'quantize' and 'train'"
    if w.train is not None and w.lora is None and w.qat is None:
        return "'train' has nothing to train: write a section 'lora' or 'qat'"
    if w.lora is not None and w.train is None and w.lora.init == "default":
        return "adapters that are not trained change nothing: write a section 'train', or lora: {init: eora}"
    if w.exit is not None and w.lora is None:
        return "'exit' is about adapters, and there is no section 'lora'"
    if w.exit in ("merge", "exact") and w.quantize is None:
        return f"exit: {w.exit} quantizes again, and there is no section 'quantize'"
    if (w.exit == "exact") != (w.lora is not None and w.lora.pooled):
        return "exit: exact and lora: {pooled: true} go together"
    return None


@dataclass(frozen=True)
class RecipeFile:
    """A recipe that was read: `sha256` is that of the file, as `sha256sum` prints it; `lines` of all its entries."""

    path: Path
    sha256: str
    workflow: Workflow
    lines: dict[Place, int]

    @property
    def label(self) -> dict[str, str]:
        """What reports say of it."""
        return {"file": self.path.name, "sha256": self.sha256}

    def at(self, *place: str | int) -> str:
        """File and line of an entry, or of what it would be in."""
        while place not in self.lines:
            place = place[:-1]
        return f"{self.path}, line {self.lines[place]}"

    def quantize_keywords(self) -> dict[str, Any]:
        """The keywords of `HfQuantConfig`. Raises SpecError if the recipe does not quantize."""
        if self.workflow.quantize is None:
            raise SpecError(f"{self.path} has no section 'quantize'")
        return self.workflow.quantize.keywords()

    def blame(self, problem: SpecError) -> SpecError:
        """An error of the `quantize` section, with the line of the option that it speaks of, or else of the section."""
        said = str(problem)
        options = [place for place in self.lines if place[:1] == ("quantize",) and len(place) == 2]
        named = next((place for place in options if repr(place[1]) in said), ("quantize",))
        return SpecError(f"{self.at(*named)}: {said}")


def read_recipe(path: str | Path) -> RecipeFile:
    """Read and check a recipe file. Raises SpecError that names the file, the line and what can stand there."""
    path = Path(path)
    try:
        content = path.read_bytes()
        node = yaml.compose(content.decode(), Loader=yaml.SafeLoader)
        data = yaml.safe_load(content)
    except OSError as error:
        raise SpecError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise SpecError(f"{path}: a recipe has sections such as 'quantize', this holds {type(data).__name__}")
    if "method" in data:
        raise SpecError(f"{path}: write 'method' and its options into a section 'quantize:', indented")
    lines = _lines(node, path)
    filled = {name: {} if section is None else section for name, section in data.items()}  # `train:` alone: defaults
    try:
        workflow = Workflow.model_validate(filled)
    except ValidationError as error:
        found = RecipeFile(path, "", Workflow.model_construct(), lines)
        raise SpecError("\n".join(_told(found, problem) for problem in error.errors())) from error
    return RecipeFile(path, hashlib.sha256(content).hexdigest(), workflow, lines)


def _lines(root: yaml.Node, path: Path) -> dict[Place, int]:
    """The line, from 1, of each entry. Raises SpecError for an entry that is given twice: YAML takes the last."""
    found: dict[Place, int] = {}

    def visit(node: yaml.Node, place: Place) -> None:
        found.setdefault(place, node.start_mark.line + 1)
        for key, value in _entries(node):
            below = (*place, key)
            line = (value if isinstance(node, yaml.SequenceNode) else _key(node, value)).start_mark.line + 1
            if below in found:
                raise SpecError(f"{path}, line {line}: {key!r} is given twice, first in line {found[below]}")
            found[below] = line
            visit(value, below)

    visit(root, ())
    return found


def _entries(node: yaml.Node) -> Iterable[tuple[str | int, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        return [(key.value, value) for key, value in node.value]
    return list(enumerate(node.value)) if isinstance(node, yaml.SequenceNode) else []


def _key(node: yaml.Node, value: yaml.Node) -> yaml.Node:
    return next(key for key, found in node.value if found is value)


def _told(recipe: RecipeFile, problem: Any) -> str:
    """One problem that pydantic found, with its line."""
    place = tuple(part for part in problem["loc"] if part in _parts(recipe.lines) or problem["type"] == "missing")
    name = ".".join(map(str, place)) or "the recipe"
    given, what = problem["input"], problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        section = _section(place[:-1])
        what = f"there is no such entry; {'.'.join(map(str, place[:-1])) or 'a recipe'} has {', '.join(section)}"
    elif problem["type"] == "missing":
        what = "is missing"
    elif not isinstance(given, dict):
        what = f"{what[0].lower()}{what[1:]}, got {given!r}"
    return f"{recipe.at(*place)}: {name}: {what}"


def _parts(lines: dict[Place, int]) -> set[str | int]:
    return {part for place in lines for part in place}


def _section(place: Place) -> list[str]:
    """Names of the entries that the section at `place` may have."""
    found = _SECTIONS.get(str(place[0]), Workflow) if place else Workflow
    return list(found.model_fields)
