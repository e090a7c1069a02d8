"""Text as samples: those to train on, those to calibrate on, and those that are kept back to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import batches
from ..distill import IGNORED
from ..errors import CalibrationError
from ..eval import token_batches
from ..inputs import digest
from .request import Plan

_SHARE = 10  # at most one in so many samples is kept back


@dataclass(frozen=True)
class Rows:
    """Samples of tokens: `train` each with "input_ids" and "attention_mask" [L] int64, all of one length; `measure`
    batches [B, L] int64 of full windows; `sha256` of the training samples.
    """

    train: list[dict[str, Tensor]]
    measure: list[Tensor]
    sha256: str | None

    def calibration(self, samples: int) -> list[Tensor]:
        """The first `samples` training samples without padding, [L] each."""
        return [row["input_ids"][row["attention_mask"].bool()] for row in self.train[:samples]]

    def batches(self, samples: int, size: int) -> list[dict[str, Tensor]]:
        """The same as inputs of the model, `size` samples at a time."""
        rows = self.train[:samples]
        parts = (rows[start : start + size] for start in range(0, len(rows), size))
        return [{name: torch.stack([row[name] for row in part]) for name in part[0]} for part in parts]


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
    return Rows(rows, _measure(plan, held), digest([_batched(row) for row in rows]) if rows else None)


def _rows(plan: Plan, writer: Any) -> list[dict[str, Tensor]]:
    """All samples, in the order that the seed gives, padded to the longest."""
    if plan.text is None:
        return []
    found = batches(plan.text, plan.tokenizer, plan.model_config, writer, says_fewer=False)
    if not all("input_ids" in batch for batch in found):
        raise CalibrationError("language models are trained on text or tokens: the data holds neither")
    longest = max(batch["input_ids"].shape[1] for batch in found)
    rows: list[dict[str, Tensor]] = []
    for batch in found:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        for row, seen in zip(_wide(ids, longest), _wide(mask, longest), strict=True):
            rows.append({"input_ids": row, "attention_mask": seen})
    return rows


def _wide(values: Tensor, width: int) -> Tensor:
    """`values` [B, L] with zeros on the right, [B, width] int64."""
    return torch.nn.functional.pad(values.long(), (0, width - values.shape[1]))


def _batched(row: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[None] for name, value in row.items()}


def _length(rows: Sequence[dict[str, Tensor]]) -> int:
    return rows[0]["input_ids"].shape[0] if rows else 0


def _measure(plan: Plan, held: list[dict[str, Tensor]]) -> list[Tensor]:
    """Batches to measure on: windows of the text that is named, or else the samples that were kept back."""
    how = plan.evaluate
    if how is None:
        return []
    if how.data is not None:
        tokenizer = plan.tokenizer if plan.tokenizer is not None else _tokenizer(plan)
        return token_batches(tokenizer, how.data, how.sequences, how.length, how.batch_size)
    full = [row["input_ids"] for row in held if bool(row["attention_mask"].all())]
    if not full:
        raise CalibrationError("no sample that was kept back to measure on is full: give a text for it (--eval-data)")
    return list(torch.stack(full).split(how.batch_size))


def _tokenizer(plan: Plan) -> Any:
    from ..tokens import load_tokenizer

    return load_tokenizer(plan.model)


def labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch [B, L] with "labels" [B, L]: its own tokens, padding ignored. The model shifts them."""
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Training samples as one batch with labels."""
    return labels({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
