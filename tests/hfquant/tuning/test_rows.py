"""Samples: nothing that is trained or calibrated on is measured on."""

import pytest
import torch

from hfquant.errors import CalibrationError
from hfquant.tuning.request import Request, plan
from hfquant.tuning.rows import IGNORED, collate, read_rows

from .conftest import MODEL


def rows_of(recipe, tmp_path, data, **options):
    return read_rows(plan(Request(recipe, MODEL, tmp_path / "out", data=data, **options)))


def test_what_is_measured_on_is_kept_back(recipe, tmp_path, text):
    rows = rows_of(recipe(train={"samples": 9999}), tmp_path, text)
    measured = {tuple(row.tolist()) for batch in rows.measure for row in batch}
    trained = {tuple(row["input_ids"].tolist()) for row in rows.train}
    assert len(measured) == 6 and len(rows.train) > 100 and not measured & trained
    for found in rows.calibration(8):
        assert tuple(found.tolist()) in trained


def test_other_text_to_measure_on_leaves_all_samples_to_train_on(recipe, tmp_path, text, other_text):
    kept = rows_of(recipe(train={"samples": 9999}), tmp_path, text)
    rows = rows_of(recipe(train={"samples": 9999}), tmp_path, text, eval_data=other_text)
    assert len(rows.train) == len(kept.train) + 6 and rows.measure[0].shape[1] == 256


def test_few_samples_keep_one_in_ten_back(recipe, tmp_path):
    ids = torch.arange(11 * 8).view(11, 8)
    rows = rows_of(recipe(), tmp_path, ids)
    assert (len(rows.train), sum(map(len, rows.measure))) == (10, 1)
    with pytest.raises(CalibrationError, match="gives 1 sample of 8 tokens, and one is kept back"):
        rows_of(recipe(), tmp_path, ids[:1])


def test_the_seed_decides_the_samples(recipe, tmp_path, text):
    one, again = (rows_of(recipe(), tmp_path, text) for _ in range(2))
    other = rows_of(recipe(), tmp_path, text, seed=1)
    assert one.sha256 == again.sha256 != other.sha256


def test_padding_is_not_learned(recipe, tmp_path):
    rows = rows_of(recipe(evaluate=None), tmp_path, [torch.arange(3, 8), torch.arange(3, 6)])
    batch = collate(rows.train)
    seen = batch["attention_mask"].bool()
    assert sorted(seen.sum(1).tolist()) == [3, 5]
    assert torch.equal(batch["labels"][seen], batch["input_ids"][seen])
    assert (batch["labels"][~seen] == IGNORED).all() and torch.nn.CrossEntropyLoss().ignore_index == IGNORED
    assert sorted(map(len, rows.calibration(9))) == [3, 5]
