"""transformers' Trainer: adapters on a quantized model train; a quantized model alone is refused."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hfquant import HfQuantConfig
from hfquant.swap import packed_modules

MODELS = Path(__file__).parents[1] / "models"
TRAINED = MODELS / "tiny-llama"


@pytest.fixture
def model():
    config = HfQuantConfig("nf4", double_quant=True)
    return AutoModelForCausalLM.from_pretrained(TRAINED, quantization_config=config, dtype=torch.float32)


def arguments(folder: Path, **options) -> TrainingArguments:
    return TrainingArguments(
        folder, use_cpu=True, per_device_train_batch_size=4, max_steps=8, learning_rate=2e-3, logging_steps=1,
        lr_scheduler_type="constant", report_to=[], save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip


def test_adapters_train_with_gradient_checkpointing(model, tmp_path):
    ids = AutoTokenizer.from_pretrained(TRAINED)((MODELS / "heldout.txt").read_text()[:3000])["input_ids"]
    rows = [{"input_ids": row, "labels": row} for row in torch.tensor(ids[: 4 * 64]).view(4, 64)]
    codes = {name: module.codes.clone() for name, module in packed_modules(model)}
    adapted = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(target_modules="all-linear"))
    trainer = Trainer(adapted, arguments(tmp_path, gradient_checkpointing=True), train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < 0.9 * losses[0]
    assert model.is_gradient_checkpointing
    after = {name: module.codes for name, module in packed_modules(adapted)}
    assert codes and [torch.equal(*pair) for pair in zip(codes.values(), after.values(), strict=True)] == [True] * len(
        codes
    )


def test_a_quantized_model_without_adapters_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments(tmp_path), train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}])
