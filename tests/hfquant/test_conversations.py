"""Which tokens of a conversation the assistant says."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import ByteLevel, TemplateProcessing

from hfquant.conversations import MASK, assistant_tokens, training_rows
from hfquant.data import CalibrationData, batches
from hfquant.errors import CalibrationError
from hfquant.testing.tiny import tiny_model
from hfquant.tokens import load_tokenizer
from tests.models import MODEL_DIR

CONFIG = tiny_model("llama").config.__class__(vocab_size=1024, max_position_embeddings=512)
END = "<|endoftext|>"  # a token of its own: what stands on both sides of it is tokenized apart

HEADER = END + "A" + END
MARKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}" + HEADER
    + "{% generation %}{{ m.content }}{% endgeneration %}{% else %}" + END + "U" + END + "{{ m.content }}{% endif %}"
    + END + "{% endfor %}"
)  # fmt: skip
PLAIN = (
    "{% for m in messages %}" + END + "{{ 'A' if m.role == 'assistant' else 'U' }}" + END + "{{ m.content }}" + END
    + "{% endfor %}{% if add_generation_prompt %}" + HEADER + "{% endif %}"
)  # fmt: skip

contents = st.text(st.characters(codec="utf-8", exclude_characters="<", exclude_categories=["Cs"]), max_size=12)
plain_contents = st.text("ab c.\n", max_size=12).map(str.rstrip)
roles = st.sampled_from(["system", "user", "assistant"])


def chats_of(contents: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, str]]]:
    return st.lists(st.fixed_dictionaries({"role": roles, "content": contents}), min_size=1, max_size=6)


conversations = chats_of(contents)


def tokenizer(template: str | None, trims: bool = False, begins: bool = False) -> Any:
    """The bundled tokenizer. `trims`: it says that its tokens begin behind their spaces, as that of GPT-2 does."""
    found: Any = load_tokenizer(MODEL_DIR)
    found.chat_template = template
    if trims:
        found.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    if begins:
        word = found.convert_ids_to_tokens(1)
        found.backend_tokenizer.post_processor = TemplateProcessing(single=f"{word} $A", special_tokens=[(word, 1)])
    return found


TOKENIZERS = {(marks, trims): tokenizer(MARKS if marks else PLAIN, trims) for marks in (0, 1) for trims in (0, 1)}


def written(chat: list[dict[str, str]], found: Any, ends: bool) -> tuple[list[int], list[int]]:
    """Tokens and mask by hand. `ends`: what ends a turn of the assistant is said by it."""
    ids: list[int] = []
    mask: list[int] = []
    for message in chat:
        own = message["role"] == "assistant"
        end = found.eos_token_id
        head = [end, *found.encode("A" if own else "U"), end]
        body = found(message["content"], add_special_tokens=False)["input_ids"]
        ids += [*head, *body, end]
        mask += [0] * len(head) + [int(own)] * len(body) + [int(own and ends)]
    return ids, mask


@pytest.mark.parametrize("trims", [0, 1])
@given(chat=conversations)
def test_a_template_that_marks_is_taken_at_its_word(trims: int, chat: list[dict[str, str]]) -> None:
    """Also where a marked text ends with a space: transformers' own mask then runs on into what the user says."""
    found = TOKENIZERS[1, trims]
    assert assistant_tokens(chat, found) == written(chat, found, ends=False)


@pytest.mark.parametrize("trims", [0, 1])
@given(chat=conversations)
def test_without_marks_it_is_what_comes_behind_the_beginning_of_an_answer(
    trims: int, chat: list[dict[str, str]]
) -> None:
    found = TOKENIZERS[0, trims]
    if chat[0]["role"] == "assistant":  # there is nothing before it to tell the beginning by
        chat = [{"role": "user", "content": "?"}, *chat]
    assert assistant_tokens(chat, found) == written(chat, found, ends=True)


@given(chat=chats_of(plain_contents))
def test_transformers_marks_the_same(chat: list[dict[str, str]]) -> None:
    """Of characters that are one token, and no space at the end: of others it leaves tokens out."""
    found = TOKENIZERS[1, 0]
    theirs = found.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert assistant_tokens(chat, found) == (theirs["input_ids"], theirs[MASK])


@given(
    chats=st.lists(conversations, min_size=1, max_size=5),
    packing=st.booleans(), begins=st.booleans(), length=st.integers(4, 40), seed=st.integers(0, 3),
)  # fmt: skip
def test_samples_are_those_of_calibration_with_masks_that_stay_with_their_tokens(
    chats: list[Any], packing: bool, begins: bool, length: int, seed: int
) -> None:
    """What an assistant says is put in letters, all else in digits: what a token is tells whose it is."""
    for message in itertools.chain(*chats):
        message["content"] = "abc def" if message["role"] == "assistant" else "12 34"
    template = MARKS.replace("A", "8").replace("U", "9")
    found = tokenizer(template, begins=begins)
    data = CalibrationData(chats, 50, length, 1, seed, packing=packing)
    try:
        expected = [row for batch in batches(data, found, CONFIG, says_fewer=False) for row in batch["input_ids"]]
    except CalibrationError as error:
        with pytest.raises(CalibrationError, match=str(error)[:30]):
            training_rows(data, found, CONFIG, None)
        return
    rows = training_rows(data, found, CONFIG, None)
    assert [row["input_ids"].tolist() for row in rows] == [row.tolist() for row in expected]
    for row in rows:
        tokens = [found.decode([n]) for n in row["input_ids"]]
        assert row[MASK].tolist() == [int(any(c in "abcdef" for c in token) and token != END) for token in tokens]
    everything = training_rows(data, found, CONFIG, False)
    assert [row["input_ids"].tolist() for row in everything] == [row.tolist() for row in expected]
    assert not any(MASK in row for row in everything)


CHAT = [{"role": r, "content": c} for r, c in [("user", "1"), ("assistant", "a"), ("user", "2"), ("assistant", "b")]]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # Only the last answer is written, as templates do that leave earlier thoughts out.
        ("{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}",
         r"conversation 0: .*up to number 1 differently.*\{% generation %\}.*assistant_only_loss: false"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}" + END, "up to number 1 differently"),
        ("{{ messages[0].content }}{% if false %}{% generation %}{% endgeneration %}{% endif %}",
         "marks none of what the assistant says"),
        ("{{ raise_exception('no tools') }}", "conversation 0: it does not suit the chat template: no tools"),
        ("{% generation %}{{ raise_exception('no tools') }}{% endgeneration %}", "does not suit .*no tools"),
        (None, "has no chat template"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_tell_is_an_error(template: str | None, message: str) -> None:
    found = tokenizer(template)
    with pytest.raises(CalibrationError, match=message):
        training_rows(CalibrationData([CHAT], length=4), found, CONFIG, None)


def test_other_data_and_other_tokenizers_are_refused() -> None:
    found = tokenizer(PLAIN)
    with pytest.raises(CalibrationError, match="is for conversations"):
        training_rows(CalibrationData(["some text"] * 9, length=4), found, CONFIG, True)
    assert not any(
        MASK in row for row in training_rows(CalibrationData(["some text"] * 9, length=4), found, CONFIG, None)
    )

    class Slow:
        is_fast = False

    with pytest.raises(CalibrationError, match="Slow does not tell which characters"):
        assistant_tokens(CHAT, Slow())


@pytest.mark.parametrize("first", [0, 1])
def test_texts_among_conversations_are_refused(first: int, tmp_path) -> None:
    rows = [{"messages": CHAT}, {"messages": "a text"}]
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (rows if first else rows[::-1])))
    with pytest.raises(CalibrationError, match=r"row 0 of the data is a .*, row 1 is a .*: train on one of them"):
        training_rows(CalibrationData(file, length=2), tokenizer(PLAIN), CONFIG, None)
    assert training_rows(CalibrationData(file, length=2), tokenizer(PLAIN), CONFIG, False)
    assert torch.is_tensor(training_rows(CalibrationData([CHAT], length=2), tokenizer(PLAIN), CONFIG, None)[0][MASK])
