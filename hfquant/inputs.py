"""Tensors that a model is to be run on: whether they can be its inputs, and their fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import CalibrationError

Batch = dict[str, Tensor]


def check_length(length: int, what: str, config: Any) -> None:
    """Raise CalibrationError if the model of `config` cannot read that many tokens."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise CalibrationError(f"{what}: the model reads at most {limit} tokens (max_position_embeddings), give fewer")


def check_tokens(ids: Tensor, what: str, config: Any) -> None:
    """Raise CalibrationError unless `ids` are tokens of the model, [L] or [B, L] of integers."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise CalibrationError(f"{what} is {ids.dtype}: token ids are integers, such as torch.int64")
    if ids.ndim not in (1, 2):
        raise CalibrationError(f"{what} has shape {tuple(ids.shape)}: token ids are [length] or [batch, length]")
    if not ids.numel():
        raise CalibrationError(f"{what} is empty, of shape {tuple(ids.shape)}")
    check_vocabulary(ids, what, config)
    check_length(ids.shape[-1], f"{what} has {ids.shape[-1]} tokens", config)


def check_vocabulary(ids: Tensor, what: str, config: Any) -> None:
    """Raise CalibrationError unless every token id [...] is in the vocabulary of `config`."""
    size = getattr(config, "vocab_size", None)
    if size is None:
        raise CalibrationError(
            f"{what}: a {config.model_type} model has no vocabulary, give a list of dicts of model inputs"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise CalibrationError(
            f"{what} holds the token id {low if low < 0 else high}, outside the model's vocabulary of {size}: "
            "it was made with another model's tokenizer"
        )


def check_inputs(inputs: Mapping[str, Any], what: str, config: Any) -> None:
    """Raise CalibrationError unless `inputs` are tensors of one batch, finite, and tokens of the model."""
    wrong = [f"{name} ({type(value).__name__})" for name, value in inputs.items() if not isinstance(value, Tensor)]
    if wrong or not inputs:
        raise CalibrationError(f"{what} must hold tensors of model inputs, it holds {', '.join(wrong) or 'nothing'}")
    if any(not value.ndim or not value.numel() for value in inputs.values()):
        raise CalibrationError(f"{what} has an input without a sample: {_shapes(inputs)}")
    if len({value.shape[0] for value in inputs.values()}) > 1:
        raise CalibrationError(f"the inputs of {what} differ in their first axis, the samples: {_shapes(inputs)}")
    for name, value in inputs.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CalibrationError(f"{name} of {what} holds NaN or infinite values")
    if "input_ids" in inputs:
        check_tokens(inputs["input_ids"], f"input_ids of {what}", config)


def _shapes(inputs: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())


def rows_of(batch: Batch) -> int:
    """How many samples a batch holds."""
    return next(iter(batch.values())).shape[0]


def tokens_of(batch: Batch) -> int:
    """How many tokens a batch of token ids holds, padding apart."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def digest(batches: Sequence[Batch]) -> str:
    """SHA-256 of every sample's tensors, names, dtypes and shapes, in hexadecimal."""
    state = hashlib.sha256()
    for batch in batches:
        for row in range(rows_of(batch)):
            for name in sorted(batch):
                value = batch[name][row].detach().cpu().contiguous()
                state.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
                state.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
