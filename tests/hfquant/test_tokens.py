"""Samples of token ids: what packing, padding and a tokenizer's special tokens do to texts."""

from __future__ import annotations

from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from hfquant.errors import CalibrationError
from hfquant.testing.tiny import tiny_model
from hfquant.tokens import Frame, encode, frame_of, load_tokenizer, packed, padded, unpacked
from tests.models import HELDOUT, MODEL_DIR

BEGIN, END = 5, 6
documents = st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=30), min_size=1, max_size=8)
frames = st.builds(
    Frame,
    st.sampled_from([(), (BEGIN,)]),
    st.sampled_from([(), (END,)]),
    st.sampled_from([(), (END,)]),
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokenizer(begin: bool = False, end: bool = False) -> PreTrainedTokenizerBase:
    """The bundled tokenizer, made to put ids 1 and 2 around a text as [CLS] and [SEP] are."""
    found: Any = load_tokenizer(MODEL_DIR)
    words = [found.convert_ids_to_tokens(n) for n in (1, 2)]
    template = " ".join([*(words[:1] if begin else []), "$A", *(words[1:] if end else [])])
    names = [(word, n) for n, word in enumerate(words, 1)]
    found.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=names)
    return found


@given(documents, frames, st.integers(3, 12), st.integers(0, 5))
def test_packing_cuts_the_whole_text_into_full_windows_that_do_not_overlap(
    texts: list[list[int]], frame: Frame, length: int, seed: int
) -> None:
    stream: list[int] = []
    for text in texts:
        stream += [*frame.between, *text] if stream else text
    room = length - len(frame.prefix) - len(frame.suffix)
    whole = len(stream) // room
    if not whole:
        with pytest.raises(CalibrationError, match=f"holds {len(stream)} tokens, and one sample of length={length}"):
            packed(texts, frame, length, 1000, seeded(seed))
        return
    rows = packed(texts, frame, length, 1000, seeded(seed))
    assert rows.shape == (whole, length) and rows.dtype == torch.int64
    assert all(tuple(row[: len(frame.prefix)]) == frame.prefix for row in rows.tolist())
    assert all(tuple(row[len(frame.prefix) + room :]) == frame.suffix for row in rows.tolist())
    found = Counter(tuple(row[len(frame.prefix) :][:room]) for row in rows.tolist())
    cuts = [
        Counter(tuple(stream[start + n * room :][:room]) for n in range(whole))
        for start in range(len(stream) - whole * room + 1)
    ]
    assert found in cuts


def test_a_seed_decides_which_windows_are_used() -> None:
    stream = [list(range(100, 1000))]
    rows = {seed: packed(stream, Frame(), 10, 20, seeded(seed)) for seed in range(3)}
    assert all(len(found) == 20 == len(found.unique(dim=0)) for found in rows.values())
    assert torch.equal(rows[0], packed(stream, Frame(), 10, 20, seeded(0)))
    assert len({tuple(sorted(found[:, 0].tolist())) for found in rows.values()}) == 3


def test_an_end_of_text_is_not_doubled() -> None:
    rows = packed([[10, END], [11], [12, END]], Frame(between=(END,)), 6, 9, seeded(0))
    assert rows.tolist() == [[10, END, 11, END, 12, END]]


@pytest.mark.parametrize("cut", [packed, unpacked])
def test_an_endless_source_is_read_only_as_far_as_asked(cut: Any) -> None:
    taken = []

    def endless() -> Any:
        for n in count():
            taken.append(n)
            yield [n] * 8

    rows = cut(endless(), Frame(), 8, 5, seeded(0), enough=4)
    assert len(rows) == 5 and len(taken) == 20


@given(documents, frames, st.integers(3, 40), st.integers(1, 5), st.integers(0, 5))
def test_unpacked_samples_hold_their_text_and_the_mask_is_zero_exactly_on_padding(
    texts: list[list[int]], frame: Frame, length: int, batch_size: int, seed: int
) -> None:
    room = length - len(frame.prefix) - len(frame.suffix)
    expected = Counter((*frame.prefix, *text[:room], *frame.suffix) for text in texts)
    batches = padded(unpacked(texts, frame, length, 1000, seeded(seed)), batch_size, pad=0)
    found: Counter = Counter()
    for batch in batches:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        assert ids.dtype == mask.dtype == torch.int64 and ids.shape == mask.shape
        assert (ids.eq(0) == mask.eq(0)).all()  # no text holds a 0
        assert mask.bool().all(1).any(), "no wider than its longest row"
        assert ("attention_mask" in batch) == bool(mask.eq(0).any())
        assert mask.diff(dim=1).le(0).all(), "padding is at the end"
        found.update(tuple(row[keep].tolist()) for row, keep in zip(ids, mask.bool(), strict=True))
    assert found == expected
    assert [len(b["input_ids"]) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)


def test_a_sample_without_room_for_text_is_refused() -> None:
    with pytest.raises(CalibrationError, match="length=2 has no room beside"):
        packed([[1, 2, 3]], Frame((BEGIN,), (END,)), 2, 1, seeded(0))


@pytest.mark.parametrize(("begin", "end"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_frame_is_what_the_tokenizer_adds(begin: bool, end: bool) -> None:
    found = tokenizer(begin, end)
    frame = frame_of(found)
    assert frame == Frame((1,) if begin else (), (2,) if end else (), (found.eos_token_id,))
    text = "def quick(brown): pass"
    (ids,) = encode([text], found, frame)
    assert frame.around(torch.tensor(ids)).tolist() == found(text)["input_ids"]


def test_texts_are_encoded_one_by_one_and_empty_ones_left_out() -> None:
    found: Any = tokenizer()
    texts = [HELDOUT.read_text()[n * 50 :][:50] for n in range(200)]
    mixed = [part for text in texts for part in (text, "", " \n")]
    expected = [found.encode(text, add_special_tokens=False) for text in texts if text.strip()]
    assert list(encode(mixed, found, frame_of(found))) == expected


def test_a_conversation_is_what_the_chat_template_writes_with_one_beginning() -> None:
    found: Any = tokenizer(begin=True)
    word = found.convert_ids_to_tokens(1)
    found.chat_template = word + "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chat = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    (ids,) = encode([chat], found, frame_of(found))
    assert found.decode(ids) == "user: What is 2 + 2?\nassistant: 4\n"


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    found: Any = tokenizer()
    found.chat_template = (
        "{{ raise_exception('roles must alternate') if messages|length > 1 else messages[0].content }}"
    )
    good, bad = [{"role": "user", "content": "x"}], [{"role": "user", "content": "x"}] * 2
    with pytest.raises(CalibrationError, match=r"conversation 1 does not suit .*roles must alternate"):
        list(encode([good, bad], found, Frame()))


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_a_model_without_a_tokenizer_is_said_to_have_none(kind: str, tmp_path: Path) -> None:
    """transformers itself gives one without words for BERT and GPT-2."""
    tiny_model(kind).config.save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=f"tokenizer of {tmp_path}.* token tensors"):
        load_tokenizer(tmp_path)
