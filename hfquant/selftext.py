"""Text that a language model writes itself, for calibration without data (LLM-QAT, arXiv:2305.17888)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .errors import CalibrationError, SpecError
from .eval.perplexity import evaluating

GREEDY = (3, 5)  # fewest and most tokens after the first that are the model's most likely ones


def refusal(model_class: Any, config: Any) -> str | None:
    """Why models of this class and configuration cannot write text from nothing, or None if they can."""
    name = model_class.__name__
    can_generate = getattr(model_class, "can_generate", None)  # auto classes do not know
    if can_generate is not None and not can_generate():
        return f"{name} has no language-model head"
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} writes only answers to an input, which the data must give"
    wanted = getattr(model_class, "main_input_name", "input_ids")
    return None if wanted == "input_ids" else f"{name} reads {wanted}, not tokens"


def check_writes(model_class: Any, config: Any) -> None:
    """Raise CalibrationError, with the reason, for models that cannot write their own calibration text."""
    reason = refusal(model_class, config)
    if reason is not None:
        raise CalibrationError(f"data='self' lets the model write the text, and {reason}: give it data")


def self_text(
    model: Any,
    samples: int,
    length: int,
    seed: int = 0,
    batch_size: int = 8,
    prefix: Sequence[int] = (),
    special: Collection[int] = (),
) -> Tensor:
    """Text written by `model`: token ids [samples, length] int64 on the CPU.

    The first token is drawn from the vocabulary, the next 3 to 5 are the most likely ones, every other one is drawn
    from the model's softmax: the hybrid sampling of Liu et al., "LLM-QAT" (2023), data-free distillation. A text that
    ends early is followed by another one, begun the same way. `prefix`: tokens that go first, such as a
    beginning-of-text token. `special`: ids that begin no text, besides those that the model's configuration names.

    All that is drawn is drawn per sample before the first one is written, from a generator of its own: `batch_size`
    has no say in it, and the global random state stays untouched. Raises CalibrationError for a model that cannot
    write text or gives NaN, SpecError if `length` leaves nothing to write.
    """
    check_writes(type(model), model.config)
    if samples < 1 or batch_size < 1 or length < len(prefix) + 1:
        raise SpecError(
            f"cannot write {samples} samples of {length} tokens, {len(prefix)} of them given, {batch_size=}"
        )
    endings = _ids(model, "eos_token_id")
    marks = endings | set(special) | set(prefix) | _ids(model, "bos_token_id") | _ids(model, "pad_token_id")
    first = torch.tensor([token for token in range(vocabulary(model.config)) if token not in marks])
    generator = torch.Generator().manual_seed(seed)
    starts = first[torch.randint(len(first), (samples, length), generator=generator)]
    greedy = torch.randint(GREEDY[0], GREEDY[1] + 1, (samples,), generator=generator)
    chances = torch.rand(samples, length, generator=generator)
    texts = []
    with evaluating(model), _neutral(model):
        for part in torch.arange(samples).split(batch_size):
            begin = torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(len(part), -1), starts[part, :1]], dim=1)
            writer = _Writer(starts[part], greedy[part], chances[part], endings)
            texts.append(_write(model, begin, length, writer))
    return torch.cat(texts)


def vocabulary(config: Any) -> int:
    """Entries of the vocabulary of a model's text part."""
    return int(config.get_text_config(decoder=True).vocab_size)


def _write(model: Any, begin: Tensor, length: int, writer: _Writer) -> Tensor:
    """Continue `begin` [B, P] to [B, length]. `generate` is greedy here: the writer leaves it a single choice."""
    if begin.shape[1] == length:
        return begin
    if model.device.type != "meta":  # meta: offloaded, hooks move the inputs
        begin = begin.to(model.device)
    written: Tensor = model.generate(
        begin,
        attention_mask=torch.ones_like(begin),
        max_new_tokens=length - begin.shape[1],
        do_sample=False,
        logits_processor=LogitsProcessorList([writer]),
    )
    return written.cpu()


class _Writer(LogitsProcessor):
    """Makes each next token: it leaves every other one without a chance."""

    def __init__(self, starts: Tensor, greedy: Tensor, chances: Tensor, endings: Collection[int]) -> None:
        """`starts`, `chances` [B, L]: what to draw at each position. `greedy` [B]: how many likeliest tokens first."""
        self.starts, self.greedy, self.chances = starts, greedy, chances
        self.endings = torch.tensor(sorted(endings), dtype=torch.int64)
        self.age = torch.zeros(len(starts), dtype=torch.int64)  # tokens of the current text, its first one apart

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after the tokens [B, T]: 0 for the chosen token, -inf for the others."""
        if scores.isnan().any():
            raise CalibrationError("the model gives NaN for its own text: load it in bfloat16 or float32 (dtype=...)")
        position = input_ids.shape[1]
        ended = torch.isin(input_ids[:, -1].cpu(), self.endings)
        likely = scores.argmax(-1).cpu()
        drawn = draw(scores, self.chances[:, position]).cpu()
        chosen = torch.where(self.age < self.greedy, likely, drawn)
        chosen = torch.where(ended, self.starts[:, position], chosen)
        self.age = torch.where(ended, 0, self.age + 1)
        out = torch.full_like(scores, -torch.inf)
        return out.scatter_(1, chosen[:, None].to(scores.device), 0.0)


def draw(scores: Tensor, chances: Tensor) -> Tensor:
    """Tokens [B] int64 from the softmax of `scores` [B, V]: the inverse of its distribution at `chances` [B] in [0, 1).

    A token of probability p is drawn for a share p of all chances, one of probability 0 never.
    """
    wide = torch.float32 if scores.device.type == "mps" else torch.float64  # MPS has no float64
    reached = scores.to(wide).softmax(-1).cumsum(-1)
    wanted = chances.to(scores.device, wide)[:, None] * reached[:, -1:]
    return torch.searchsorted(reached, wanted, right=True)[:, 0].clamp_max(scores.shape[-1] - 1)


@contextmanager
def _neutral(model: Any) -> Iterator[None]:
    """The model without generation settings of its own: penalties, forced tokens, and the tokens it stops at."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _ids(model: Any, name: str) -> set[int]:
    """The token ids that a model's configurations give for one role."""
    found: set[int] = set()
    for config in (model.config, model.config.get_text_config(decoder=True), model.generation_config):
        value = getattr(config, name, None)
        found |= set() if value is None else {value} if isinstance(value, int) else set(value)
    return found
