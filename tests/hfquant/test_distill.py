"""Self-distillation: the loss is the KL to the original, counted per token, and training lowers it on unseen text."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hfquant import HfQuantConfig, SpecError, UnsupportedError, distill
from hfquant.distill import DistillationTrainer, divergence, self_dataset
from hfquant.errors import CalibrationError
from hfquant.eval import Reference, token_batches
from hfquant.qat import finish_qat, prepare_qat
from hfquant.selftext import self_text
from hfquant.testing.tiny import VOCABULARY, tiny_inputs, tiny_model
from tests.models import HELDOUT, MODEL_DIR

CERTAIN = 1e4  # a logit beside which others have no share


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    plain = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": True}
    return TrainingArguments(folder, **{**plain, "lr_scheduler_type": "constant", **options})


def rows_of(*lengths: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Texts of other lengths, padded to the longest; the first label of each never counts, nor does padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    seen = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~seen, -100)
    return [
        {"input_ids": i, "attention_mask": m.long(), "labels": n} for i, m, n in zip(ids, seen, labels, strict=True)
    ]


# ---- the loss


@given(st.integers(0, 9), st.integers(2, 30), st.integers(0, 99), st.integers(1, 200))
def test_divergence_and_its_gradient_are_those_in_float64(tokens, vocabulary, seed, chunk):
    student, teacher = (3 * drawn(tokens, vocabulary, seed=seed + n) for n in range(2))
    logs = [x.double().requires_grad_().log_softmax(-1) for x in (student, teacher)]
    wide = student.double().requires_grad_()
    expected = F.kl_div(wide.log_softmax(-1), logs[1].detach(), log_target=True, reduction="sum")
    student.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "_CHUNK", chunk)
        found = divergence(student, teacher)
    (2 * found).backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), 2 * torch.autograd.grad(expected, wide)[0], rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_cross_entropy_with_soft_labels():
    student, teacher = drawn(5, 20).requires_grad_(), drawn(5, 20, seed=1)
    soft = F.cross_entropy(student, teacher.softmax(-1), reduction="sum")
    found, expected = (torch.autograd.grad(loss, student)[0] for loss in (divergence(student, teacher), soft))
    torch.testing.assert_close(found, expected)


def test_tokens_that_both_rule_out_count_nothing():
    logits = drawn(4, 9)
    logits[:, 2] = -torch.inf
    assert divergence(logits, logits.clone()) == 0
    assert divergence(logits, drawn(4, 9)) == torch.inf


def test_logits_of_two_vocabularies_are_refused():
    with pytest.raises(SpecError, match=r"\[3, 8\].*\[3, 9\].*same vocabulary"):
        divergence(drawn(3, 8), drawn(3, 9))


# ---- the Trainer


class Certain(nn.Module):
    """A teacher that knows the next token of each text: the KL to it is the cross entropy with the text itself."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        logits[:, :-1].scatter_(2, input_ids[:, 1:, None], CERTAIN)
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(("size", "micro"), [(4, 1), (2, 2), (1, 4)])
def test_steps_are_those_of_the_stock_trainer_where_the_teacher_is_certain(size, micro, tmp_path):
    """Losses of uneven micro-batches are added as the stock Trainer adds them, and its reports are the same."""
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro}
    options = {**sizes, "optim": "sgd", "learning_rate": 0.5, "max_steps": 2, "max_grad_norm": 0.0}
    rows = rows_of(13, 2, 5, 9, 3, 12, 7, 4)
    states, losses = [], []
    for stock in (True, False):
        model = tiny_model("llama")
        kind = Trainer if stock else DistillationTrainer
        teacher = {} if stock else {"teacher": Certain()}
        trainer = kind(model, arguments(tmp_path, **options), train_dataset=rows, eval_dataset=rows, **teacher)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1].append(trainer.evaluate()["eval_loss"])
        states.append(model.state_dict())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-6)


def test_evaluation_measures_what_the_evaluation_of_quantized_models_measures(tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    batches = token_batches(AutoTokenizer.from_pretrained(MODEL_DIR), HELDOUT, sequences=4, length=32)
    student = prepare_qat(copy.deepcopy(teacher), HfQuantConfig("int3"))
    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch]
    trainer = DistillationTrainer(student, arguments(tmp_path), eval_dataset=rows, teacher=teacher)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(Reference(teacher, batches).compare(student).kl, rel=1e-4)


def test_checkpoints_of_the_trainer_are_ordinary_models_and_resume_to_the_same_weights(tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "seed": 1}
    options |= {"activation_checkpointing": True, "bf16": True, "per_device_train_batch_size": 2, "weight_decay": 0.1}
    ends = []
    for again in (None, str(tmp_path / "checkpoint-2")):
        student = prepare_qat(tiny_model("llama"), HfQuantConfig("nf4"))
        trainer = DistillationTrainer(
            student, arguments(tmp_path, **options), train_dataset=rows_of(13, 9, 5, 11), teacher=tiny_model("llama")
        )
        trainer.train(resume_from_checkpoint=again)
        ends.append(finish_qat(student).state_dict())
    saved = type(student).from_pretrained(tmp_path / "checkpoint-3").state_dict()
    assert all(torch.equal(ends[0][name], ends[1][name]) and torch.equal(ends[0][name], saved[name]) for name in saved)


def test_the_teacher_is_another_model_in_full_precision(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(SpecError, match=r"shares parameters.*copy\.deepcopy"):
        DistillationTrainer(model, arguments(tmp_path), teacher=model)
    with pytest.raises(SpecError, match="before prepare_qat"):
        DistillationTrainer(model, arguments(tmp_path), teacher=prepare_qat(copy.deepcopy(model), HfQuantConfig()))


def test_what_cannot_be_distilled_is_refused(tmp_path):
    model = tiny_model("llama")
    trainer = DistillationTrainer(model, arguments(tmp_path), teacher=copy.deepcopy(model))
    with pytest.raises(SpecError, match=r'no "labels".*-100'):
        trainer.compute_loss(model, tiny_inputs(model))
    with pytest.raises(UnsupportedError, match="BertForSequenceClassification has no language-model head"):
        DistillationTrainer(tiny_model("bert"), arguments(tmp_path), teacher=tiny_model("bert"))


# ---- text of the model itself


def test_rows_are_what_the_model_writes():
    model = tiny_model("llama")
    rows = self_dataset(model, samples=5, length=9, seed=3, batch_size=2)
    assert torch.equal(torch.stack([row["input_ids"] for row in rows]), self_text(model, 5, 9, seed=3))
    assert all(torch.equal(row["input_ids"], row["labels"]) for row in rows)
    with pytest.raises(CalibrationError, match="no language-model head"):
        self_dataset(tiny_model("bert"), samples=5, length=9)


# ---- quality


def test_training_brings_low_bits_nearer_to_the_original_on_text_that_it_has_not_seen(tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    reference = Reference(teacher, token_batches(tokenizer, HELDOUT, sequences=8, length=128))
    data = self_dataset(teacher, samples=64, length=64, tokenizer=tokenizer, batch_size=64)
    options = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "lr_scheduler_type": "cosine"}
    ratios = []
    for method, block_size in (("int3", 64), ("int4", -1)):
        student = prepare_qat(copy.deepcopy(teacher), HfQuantConfig(method, block_size=block_size))
        before = reference.compare(student).kl
        trained = arguments(tmp_path, learning_rate=2e-4, **options)
        DistillationTrainer(student, trained, train_dataset=data, teacher=teacher).train()
        ratios.append(reference.compare(student).kl / before)
    assert ratios[0] < 0.65 and ratios[1] < 0.85, ratios
