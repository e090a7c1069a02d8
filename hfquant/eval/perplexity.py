"""Negative log-likelihood per sequence, perplexity, and bootstrap intervals over sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import HfQuantError, SpecError
from .text import check_batches, check_vocabulary

Forward = Callable[[nn.Module, Tensor], Tensor]
"""Runs a model on token ids [B, T] int64 and returns next-token logits [B, T, V]."""

Interval = tuple[float, float]

CHUNK = 1 << 22
"""Logits widened to float64 at a time: 32 MiB, however large the vocabulary or the batch."""


# ---- running a model


def causal_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [B, T, V] of a causal language model for token ids [B, T], in one pass without a cache."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def next_token_logits(model: nn.Module, batch: Tensor, forward: Forward) -> Tensor:
    """Logits [B, L-1, V] that predict tokens 1 to L-1 of `batch` [B, L], on the model's device."""
    ids = batch[:, :-1]
    device = getattr(model, "device", None)
    if device is not None and device.type != "meta":  # meta: offloaded, accelerate's hooks move the inputs
        ids = ids.to(device)
    return forward(model, ids)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is back in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not inference_mode: weights that a layer repacks in its first forward would never train again.
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def log_probabilities(logits: Tensor, who: str) -> Tensor:
    """Natural log-softmax [M, V] of logits, in float64. Raises `HfQuantError` naming `who` if not finite."""
    # MPS has no float64.
    wide = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
    normaliser = wide.logsumexp(-1, keepdim=True)
    if not normaliser.isfinite().all():  # a single -inf is a token ruled out; NaN and +inf spoil the whole row
        bad = int((~normaliser.isfinite()).sum())
        raise HfQuantError(f"{who}: the logits of {bad} of {len(logits)} tokens hold NaN or infinity")
    return wide - normaliser


def rows_per_chunk(logits: Tensor) -> int:
    """Rows of `logits` [..., V] that fit in one chunk of `CHUNK` numbers, at least one."""
    return max(1, CHUNK // logits.shape[-1])


def sequence_nll(
    model: nn.Module, batches: Sequence[Tensor], forward: Forward = causal_logits
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood [S] float64, nats summed over each sequence, and predicted tokens [S] float64.

    `batches` [B, L] int64; the first token of a sequence is context only. Raises `SpecError` for no batches
    or an id outside the vocabulary, `HfQuantError` if logits are not finite.
    """
    check_batches(batches)
    check_vocabulary(model, batches)
    sums = []
    with evaluating(model):
        for index, batch in enumerate(batches):
            who = f"{type(model).__name__}, batch {index}"
            # The logits get no name here: they would stay alive through the next batch's forward.
            sums.append(_batch_nll(next_token_logits(model, batch, forward), batch, who))
    counts = torch.cat([torch.full((len(batch),), batch.shape[1] - 1) for batch in batches])
    return torch.cat(sums), counts.double()


def _batch_nll(logits: Tensor, batch: Tensor, who: str) -> Tensor:
    """Negative log-likelihood [B] of `batch` [B, L] under `logits` [B, L-1, V], summed, on the CPU."""
    rows = rows_per_chunk(logits)
    targets = batch[:, 1:].to(logits.device)
    pieces = zip(logits.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    tokens = [-log_probabilities(x, who).gather(-1, y[:, None])[:, 0] for x, y in pieces]
    return torch.cat(tokens).view(targets.shape).sum(1).double().cpu()


def perplexity(nll: Tensor, counts: Tensor) -> float:
    """`exp` of the mean negative log-likelihood per token; `nll` [S] sums in nats, `counts` [S] tokens."""
    return float((nll.sum() / counts.sum()).exp())


# ---- intervals


def bootstrap_mean(sums: Tensor, counts: Tensor, samples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Percentile interval of the mean per token; `sums` [S] over a sequence's tokens, `counts` [S] tokens.

    Sequences are resampled whole, because tokens of one sequence are not independent. A single sequence says
    nothing about the spread: its interval is infinite. Raises `SpecError` for bad shapes or settings.
    """
    (totals,), tokens = _resampled([sums], counts, samples, seed)
    return _interval(totals / tokens, len(counts), level)


def paired_bootstrap(
    nll_a: Tensor, nll_b: Tensor, counts: Tensor, samples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile interval of the perplexity of b minus that of a; `nll_a`, `nll_b` [S] nats, `counts` [S].

    Both models are scored on the same resampled sequences, so that what makes a text hard cancels. Single
    sequences and errors as in `bootstrap_mean`.
    """
    (a, b), tokens = _resampled([nll_a, nll_b], counts, samples, seed)
    return _interval((b / tokens).exp() - (a / tokens).exp(), len(counts), level)


def _resampled(columns: list[Tensor], counts: Tensor, samples: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Totals [samples] of each column [S] and of `counts` [S] over sequences drawn with replacement."""
    if any(column.shape != counts.shape or column.ndim != 1 for column in columns) or not len(counts):
        shapes = [tuple(column.shape) for column in (*columns, counts)]
        raise SpecError(f"bootstrap: needs one number per sequence, all of one length [S], but got shapes {shapes}")
    if samples < 1:
        raise SpecError(f"bootstrap: samples must be at least 1, not {samples}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(counts), (samples, len(counts)), generator=generator)
    totals = [column.double().cpu()[drawn].sum(1) for column in (*columns, counts)]
    return totals[:-1], totals[-1]


def _interval(statistic: Tensor, sequences: int, level: float) -> Interval:
    """Central `level` of the resampled `statistic` [samples]."""
    if not 0 < level < 1:
        raise SpecError(f"bootstrap: level must lie between 0 and 1, not {level}")
    if sequences == 1:
        return -torch.inf, torch.inf
    tail = (1 - level) / 2
    low, high = statistic.quantile(torch.tensor([tail, 1 - tail], dtype=statistic.dtype)).tolist()
    return low, high
