"""Conversations as samples to train on: which tokens the assistant says, and which it only reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from .data import CalibrationData, check, texts_of, windows
from .errors import CalibrationError
from .inputs import check_vocabulary
from .texts import Text, is_chat
from .tokens import Frame, check_template, encode, frame_of

MASK = "assistant_masks"
"""Name of the mask of a sample [L]: 1 for tokens that the assistant says, 0 for all others."""

_SAID = 1 << 32  # added to the ids of those tokens while samples are cut: one number for both, cut and moved as one
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
_ALL = "or train on all tokens (assistant_only_loss: false)"

Span = tuple[int, int]


def training_rows(
    data: CalibrationData, tokenizer: Any, config: Any, assistant_only: bool | None
) -> list[dict[str, Tensor]]:
    """Samples of text: "input_ids" [<= length] int64, and for conversations `MASK`, unless `assistant_only` is False.

    The tokens are those that `data.batches` gives. Raises CalibrationError for what that refuses, for texts if
    `assistant_only` is True, for conversations among texts, and where it cannot be told what the assistant says.
    """
    check(data, tokenizer, config)
    frame, texts = frame_of(tokenizer), texts_of(data)
    first = next(texts, "")
    chats = is_chat(first)
    if chats:
        check_template(tokenizer)
    if assistant_only and not chats:
        raise CalibrationError(
            "assistant_only_loss: true is for conversations, lists of messages with a role, and the data are texts: "
            "leave it out"
        )
    texts = chain([first], texts)
    if not chats or assistant_only is False:
        one_form = texts if assistant_only is False else _one_form(texts, chats)
        rows = windows(data, encode(one_form, tokenizer, frame), frame)
        found = [{"input_ids": row} for row in rows]
    else:
        documents = marked(_one_form(texts, chats), tokenizer, frame)
        if data.packing:
            documents, frame = _separated(documents, frame), replace(frame, between=())
        rows = windows(data, documents, frame)
        found = [{"input_ids": row % _SAID, MASK: row // _SAID} for row in rows]
    check_vocabulary(torch.cat([row["input_ids"] for row in found]), "the tokenizer's output", config.get_text_config())
    return found


def _one_form(texts: Iterable[Text], chats: bool) -> Iterator[Text]:
    """The same texts. Raises CalibrationError where texts and conversations are mixed: they are learned differently."""
    for number, text in enumerate(texts):
        if is_chat(text) != chats:
            kinds = ("a conversation", "a text") if chats else ("a text", "a conversation")
            raise CalibrationError(
                f"row 0 of the data is {kinds[0]}, row {number} is {kinds[1]}: train on one of them, {_ALL}"
            )
        yield text


def _separated(documents: Iterable[Sequence[int]], frame: Frame) -> Iterator[list[int]]:
    """Documents with the token between two of them at the beginning of the second, unless the first ends with it."""
    last: list[int] | None = None
    for ids in documents:
        yield [*(() if last is None or last == list(frame.between) else frame.between), *ids]
        last = [number % _SAID for number in ids[-1:]]


def marked(chats: Iterable[Any], tokenizer: Any, frame: Frame) -> Iterator[list[int]]:
    """Token ids of each conversation as `encode` gives them, `_SAID` added to those that the assistant says."""
    for number, chat in enumerate(chats):
        try:
            ids, mask = assistant_tokens(chat, tokenizer)
        except CalibrationError as error:
            raise CalibrationError(f"conversation {number}: {error}") from error
        # A chat template writes the first token itself.
        skip = len(frame.prefix) if tuple(ids[: len(frame.prefix)]) == frame.prefix else 0
        if len(ids) > skip:
            yield [n + _SAID * said for n, said in zip(ids[skip:], mask[skip:], strict=True)]


def assistant_tokens(chat: Sequence[Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and 1 for each one that the assistant says at least a character of, 0 for others.

    What it says is what the chat template marks with `{% generation %}`. With a template that marks nothing, it is what
    is written behind the messages before, and behind the beginning of an answer that the template writes where one is
    to be generated: the content, and what ends the turn. Raises CalibrationError for a template that writes messages
    differently when more follow, and for a tokenizer that does not tell where its tokens lie.
    """
    if not tokenizer.is_fast:
        raise CalibrationError(
            f"{type(tokenizer).__name__} does not tell which characters its tokens are, and so not which ones the "
            f"assistant says: use a fast tokenizer, {_ALL}"
        )
    said = [n for n, message in enumerate(chat) if message["role"] == "assistant"]
    if _GENERATION.search(tokenizer.get_chat_template()):
        text, spans = _marked_text(chat, tokenizer)
        if not spans and any(chat[n].get("content") for n in said):
            raise CalibrationError(
                f"the chat template marks none of what the assistant says with {{% generation %}}: repair it, {_ALL}"
            )
    else:
        text = _written(tokenizer, chat)
        spans = [_span(chat, n, text, tokenizer) for n in said]
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(tokens["input_ids"]), _overlapping(tokens["offset_mapping"], spans)


def _overlapping(tokens: Iterable[Span], spans: Sequence[Span]) -> list[int]:
    """1 for each token that has a character in one of the spans, both from one character to before another one."""
    found, reached = [], 0
    for low, high in tokens:
        low = min(low, reached)  # some tokenizers leave the spaces of a token out
        found.append(int(any(low < end and start < high for start, end in spans)))
        reached = high
    return found


def _marked_text(chat: Sequence[Any], tokenizer: Any) -> tuple[str, list[Span]]:
    """What the template writes, and the spans that it marks.

    Not `apply_chat_template`: where a span ends with a space that its token leaves out, it marks all that follows.
    """
    given = [{name: value for name, value in message.items() if value is not None} for message in chat]
    template = tokenizer.get_chat_template()
    with _refusals():
        texts, spans = render_jinja_template(
            [given], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
        )
    return texts[0], [(start, end) for start, end in spans[0] if end > start]


def _span(chat: Sequence[Any], number: int, text: str, tokenizer: Any) -> Span:
    """Where in `text` the message `number` lies, from the end of its header to that of its turn.

    A conversation that begins with the assistant has nothing to tell the header of the first message by: it counts.
    """
    before = _written(tokenizer, chat[:number], add_generation_prompt=True) if number else ""
    behind = _written(tokenizer, chat[: number + 1])
    if not (text.startswith(behind) and behind.startswith(before)):
        raise CalibrationError(
            f"the chat template writes the messages up to number {number} differently where more follow, so that it "
            "cannot be told which tokens the assistant says: mark them in the template with {% generation %} and "
            f"{{% endgeneration %}}, {_ALL}"
        )
    return len(before), len(behind)


def _written(tokenizer: Any, chat: Sequence[Any], **options: Any) -> str:
    """What the chat template makes of messages."""
    with _refusals():
        text: str = tokenizer.apply_chat_template(list(chat), tokenize=False, **options)
    return text


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the template is a program of the model's author, and says what it dislikes
        raise CalibrationError(f"it does not suit the chat template: {error}") from error
