"""How close a quantized model stays to its reference: KL divergence, top-1 agreement, paired perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from ..errors import SpecError
from .perplexity import (
    Forward,
    Interval,
    bootstrap_mean,
    causal_logits,
    evaluating,
    log_probabilities,
    next_token_logits,
    paired_bootstrap,
    perplexity,
    rows_per_chunk,
)
from .text import check_batches, check_vocabulary

CACHE_LIMIT = 2 << 30
"""Bytes of reference logits that `Reference` keeps in memory unless told otherwise."""


@dataclass(frozen=True)
class Fidelity:
    """Fidelity of a model to its reference on next-token predictions; intervals are 95 %, over sequences."""

    kl: float  # mean KL(reference || model) per token, nats
    kl_ci: Interval
    top1: float  # share of tokens, 0 to 1, where both find the same next token most likely
    ppl: float
    ppl_ref: float
    dppl_ci: Interval  # of ppl - ppl_ref, paired
    tokens: int  # predictions: every token of a sequence but its first, or those that count
    sequences: int


@dataclass(frozen=True)
class _Sums:
    """Sums over the tokens of each sequence, all [S] float64 on the CPU."""

    kl: Tensor
    agree: Tensor
    nll: Tensor
    nll_ref: Tensor
    counts: Tensor

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(torch.cat(pair) for pair in zip(self._columns(), other._columns(), strict=True)))

    def _columns(self) -> tuple[Tensor, ...]:
        return self.kl, self.agree, self.nll, self.nll_ref, self.counts


class Reference:
    """What a full-precision model says about `batches` [B, L] int64: it runs once for all candidates."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        cache: bool | None = None,
        forward: Forward = causal_logits,
        counted: Sequence[Tensor] | None = None,
    ) -> None:
        """Run `model`, and keep its logits as they come (exact, [B, L-1, V] on the CPU) or the model itself.

        `counted` [B, L-1] bool: which predictions count, of tokens 1 to L-1 of each batch; None for all.

        `cache=None` keeps logits up to `CACHE_LIMIT` bytes; beyond that, or with `False`, every comparison
        runs the reference again, so it must stay loaded and unquantized. Raises `SpecError` for batches that
        are empty or outside the vocabulary.
        """
        check_batches(batches)
        check_vocabulary(model, batches)
        self.batches = list(batches)
        self.name = type(model).__name__
        self._counted = None if counted is None else list(counted)
        self._forward = forward
        self._model: nn.Module | None = model
        self._logits: list[Tensor] = []
        if cache is not False:
            self._fill(unlimited=cache is True)

    @property
    def cached(self) -> bool:
        """Whether logits are kept, rather than the model."""
        return self._model is None

    def compare(self, model: nn.Module, forward: Forward | None = None) -> Fidelity:
        """Measure `model` on the reference's batches, holding one batch of its logits at a time.

        `forward` (default: the reference's) runs the candidate another way, say with a quantized cache.
        Raises `HfQuantError` naming model and batch if logits are not finite, `SpecError` on another
        vocabulary.
        """
        check_vocabulary(model, self.batches)
        forward = forward or self._forward
        with evaluating(model):
            parts = [self._compare_batch(index, model, forward) for index in range(len(self.batches))]
        return _summary(reduce(_Sums.__add__, parts))

    def _compare_batch(self, index: int, model: nn.Module, forward: Forward) -> _Sums:
        # Both logits are local here, so that they are gone before the next batch's exist.
        batch = self.batches[index]
        reference = self._logits[index] if self.cached else self._run(index)
        logits = next_token_logits(model, batch, forward)
        names = f"{self.name} (reference), batch {index}", f"{type(model).__name__}, batch {index}"
        return _measure(reference, logits, batch, names, None if self._counted is None else self._counted[index])

    def _fill(self, unlimited: bool) -> None:
        """Cache logits, unless the first batch shows that all of them would exceed the limit."""
        total = sum(_predictions(batch) for batch in self.batches)
        for index in range(len(self.batches)):
            logits = self._run(index)
            size = total * logits.shape[-1] * logits.element_size()
            if index == 0 and not unlimited and size > CACHE_LIMIT:
                return
            self._logits.append(logits.cpu())
        self._model = None

    def _run(self, index: int) -> Tensor:
        """Run the reference on one batch: logits [B, L-1, V]."""
        assert self._model is not None
        with evaluating(self._model):
            return next_token_logits(self._model, self.batches[index], self._forward)


def _measure(reference: Tensor, logits: Tensor, batch: Tensor, names: tuple[str, str], counted: Tensor | None) -> _Sums:
    """Sums per sequence over two models' logits [B, L-1, V] for `batch` [B, L], where `counted` [B, L-1] is True."""
    if reference.shape != logits.shape:
        raise SpecError(
            f"{names[1]}: logits of shape {tuple(logits.shape)}; {names[0]}: {tuple(reference.shape)}; "
            "both models must share one vocabulary"
        )
    rows = rows_per_chunk(logits)
    targets = batch[:, 1:].to(logits.device)
    pieces = zip(
        reference.flatten(0, 1).split(rows),
        logits.flatten(0, 1).split(rows),
        targets.flatten().split(rows),
        strict=True,
    )
    tokens = torch.cat([_measure_tokens(p.to(q.device), q, y, names) for p, q, y in pieces], dim=1)
    counts = torch.ones_like(targets, dtype=torch.bool) if counted is None else counted.to(targets.device)
    kl, agree, nll, nll_ref = tokens.view(4, *targets.shape).where(counts, 0.0).sum(2).double().cpu()
    return _Sums(kl, agree, nll, nll_ref, counts.sum(1).cpu().double())


def _measure_tokens(reference: Tensor, logits: Tensor, targets: Tensor, names: tuple[str, str]) -> Tensor:
    """KL, agreement, and both negative log-likelihoods: [4, M] for logits [M, V] and targets [M]."""
    log_p = log_probabilities(reference, names[0])
    log_q = log_probabilities(logits, names[1])
    agree = reference.argmax(-1) == logits.argmax(-1)
    nll, nll_ref = (-x.gather(-1, targets[:, None])[:, 0] for x in (log_q, log_p))
    return torch.stack([token_kl(log_p, log_q), agree.to(nll.dtype), nll, nll_ref])


def token_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [M] in nats from log-probabilities [M, V]; infinite where q rules out what p allows."""
    p = log_p.exp()
    terms = (p * (log_p - log_q)).masked_fill(p == 0, 0.0)
    return terms.sum(-1).clamp_min(0.0)  # below zero only by rounding


def _summary(sums: _Sums) -> Fidelity:
    tokens = sums.counts.sum()
    return Fidelity(
        kl=float(sums.kl.sum() / tokens),
        kl_ci=bootstrap_mean(sums.kl, sums.counts),
        top1=float(sums.agree.sum() / tokens),
        ppl=perplexity(sums.nll, sums.counts),
        ppl_ref=perplexity(sums.nll_ref, sums.counts),
        dppl_ci=paired_bootstrap(sums.nll_ref, sums.nll, sums.counts),
        tokens=int(tokens),
        sequences=len(sums.counts),
    )


def _predictions(batch: Tensor) -> int:
    return batch.shape[0] * (batch.shape[1] - 1)
