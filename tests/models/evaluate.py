"""Loss of the test model on a vector of token ids."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def sequences(tokens: Tensor, length: int, limit: int | None = None) -> Tensor:
    """Cut ``tokens`` into at most ``limit`` consecutive rows of ``length`` ids; the remainder is dropped."""
    count = tokens.numel() // length
    if limit is not None:
        count = min(count, limit)
    return tokens[: count * length].view(count, length)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats per token, of ``(batch, time, vocabulary)`` logits in float32."""
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, rows: Tensor, batch_size: int = 16) -> float:
    """Mean next-token loss, in nats, over ``(sequences, length)`` token ids.

    The first token of a row is context only, so a row counts ``length - 1`` predictions.
    """
    total = 0.0
    for batch in rows.split(batch_size):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        total += token_loss(logits, batch[:, 1:]).item() * len(batch)
    return total / len(rows)


def perplexity(model: PreTrainedModel, rows: Tensor) -> float:
    """Perplexity, ``exp`` of the mean next-token loss, over ``(sequences, length)`` token ids."""
    return math.exp(mean_loss(model, rows))
