"""Text as samples: those to train on, those to calibrate on, and those that are kept back to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..conversations import MASK, training_rows
from ..data import TEXT, batches, kind_of
from ..distill import IGNORED
from ..errors import CalibrationError
from ..eval import token_batches
from ..inputs import digest
from .request import Plan

_SHARE = 10  # at most one in so many samples is kept back

Row = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """Samples of tokens: `train` each with "input_ids" and "attention_mask" [L] int64, all of one length, and for
    conversations whose user is not imitated `MASK`; `measure` batches [B, L] int64 and `counted` [B, L-1] bool, which
    predictions of them count, None for all; `sha256` of the training samples and their masks.
    """

    train: list[Row]
    measure: list[Tensor]
    counted: list[Tensor] | None
    sha256: str | None

    @property
    def loss_tokens(self) -> int:
        """Tokens of the training samples that the loss is taken on."""
        return sum(int(predicted(row).sum()) for row in self.train)

    @property
    def tokens(self) -> int:
        """Tokens of the training samples, padding apart."""
        return sum(int(row["attention_mask"].sum()) for row in self.train)

    def calibration(self, samples: int) -> list[Tensor]:
        """The first `samples` training samples without padding, [L] each."""
        return [row["input_ids"][row["attention_mask"].bool()] for row in self.train[:samples]]

    def batches(self, samples: int, size: int) -> list[dict[str, Tensor]]:
        """The same as inputs of the model, `size` samples at a time."""
        rows = self.train[:samples]
        parts = (rows[start : start + size] for start in range(0, len(rows), size))
        names = ("input_ids", "attention_mask")
        return [{name: torch.stack([row[name] for row in part]) for name in names} for part in parts]


def read_rows(plan: Plan, writer: Any = None) -> Rows:
    """The samples that a plan asks for; `writer`: the model, if it writes its own text.

    Raises CalibrationError for text that is too short, SpecError for a text to measure on that is.
    """
    rows = _rows(plan, writer)
    how, kept = plan.evaluate, 0
    if how is not None and how.data is None:
        kept = min(how.sequences, max(1, len(rows) // _SHARE))
        if len(rows) <= kept:
            raise CalibrationError(
                f"the data gives {len(rows)} sample of {_length(rows)} tokens, and one is kept back to measure on: "
                "give more text, a smaller length, or another text to measure on (--eval-data)"
            )
    held, rows = rows[:kept], rows[kept:]
    if plan.train is not None:
        rows = rows[: plan.train.samples]
    measure, counted = _measure(plan, held)
    return Rows(rows, measure, counted, digest([_batched(row) for row in rows]) if rows else None)


def _rows(plan: Plan, writer: Any) -> list[Row]:
    """All samples with a token to learn, in the order that the seed gives, padded to the longest."""
    if plan.text is None:
        return []
    rows = _samples(plan, writer)
    longest = max(len(row["input_ids"]) for row in rows)
    padded = [{name: _wide(row[name], longest) for name in row} for row in rows]
    found = [row for row in padded if MASK not in row or bool(predicted(row).any())]
    if not found:
        raise CalibrationError(
            f"the assistant says nothing in the {len(rows)} samples of {longest} tokens: give a larger length or other "
            "conversations, or train on all tokens (assistant_only_loss: false)"
        )
    return found


def _samples(plan: Plan, writer: Any) -> list[Row]:
    """All samples [<= L], each with its own attention mask."""
    assert plan.text is not None
    if kind_of(plan.text.data) in TEXT:
        only = False if plan.train is None else plan.train.assistant_only_loss
        rows = training_rows(plan.text, plan.tokenizer, plan.model_config, only)
        return [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    found = batches(plan.text, plan.tokenizer, plan.model_config, writer, says_fewer=False)
    if not all("input_ids" in batch for batch in found):
        raise CalibrationError("language models are trained on text or tokens: the data holds neither")
    rows = []
    for batch in found:
        ids = batch["input_ids"]
        masks = batch.get("attention_mask", torch.ones_like(ids))
        rows += [{"input_ids": row, "attention_mask": mask} for row, mask in zip(ids, masks, strict=True)]
    return rows


def _wide(values: Tensor, width: int) -> Tensor:
    """`values` [L] with zeros on the right, [width] int64."""
    return torch.nn.functional.pad(values.long(), (0, width - len(values)))


def _batched(row: Row) -> Row:
    return {name: value[None] for name, value in row.items()}


def _length(rows: Sequence[Row]) -> int:
    return rows[0]["input_ids"].shape[0] if rows else 0


def _measure(plan: Plan, held: list[Row]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Batches to measure on, windows of the text that is named or else the samples kept back, and what counts there."""
    how = plan.evaluate
    if how is None:
        return [], None
    if how.data is not None:
        tokenizer = plan.tokenizer if plan.tokenizer is not None else _tokenizer(plan)
        return token_batches(tokenizer, how.data, how.sequences, how.length, how.batch_size), None
    ids = torch.stack([row["input_ids"] for row in held]).split(how.batch_size)
    counts = torch.stack([predicted(row) for row in held])
    return list(ids), None if bool(counts.all()) else list(counts.split(how.batch_size))


def _tokenizer(plan: Plan) -> Any:
    from ..tokens import load_tokenizer

    return load_tokenizer(plan.model)


def learned(row: Row) -> Tensor:
    """Which tokens of a sample are learned, [..., L] bool: all but padding, or those that the assistant says."""
    seen = row["attention_mask"]
    return (seen if MASK not in row else seen * row[MASK]) != 0


def predicted(row: Row) -> Tensor:
    """The same for the tokens that are predicted from others, [..., L-1] bool: all but the first."""
    return learned(row)[..., 1:]


def labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch [B, L] of inputs with "labels" [B, L]: its own tokens where they are learned. The model shifts them."""
    inputs = {name: value for name, value in batch.items() if name != MASK}
    return {**inputs, "labels": batch["input_ids"].masked_fill(~learned(batch), IGNORED)}


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Training samples as one batch with labels, as wide as the longest of them."""
    width = max(int(row["attention_mask"].nonzero().max()) + 1 for row in rows)
    return labels({name: torch.stack([row[name][:width] for row in rows]) for name in rows[0]})
