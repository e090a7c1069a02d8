"""The parts of the training run whose mistakes a finished model would not show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from .corpus import MIN_BYTES, read_corpus
from .muon import orthogonalise
from .tokenizer import END_OF_TEXT, encode_documents, train_tokenizer
from .train import (
    BATCH,
    SEQUENCE,
    Batches,
    Budget,
    Progress,
    batch_loss,
    build_model,
    build_optimizers,
    load_checkpoint,
    save_checkpoint,
    train_step,
)
from .training import set_learning_rates


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return build_model(train_tokenizer(["x = 1\n"], 300, 512))


def batch(seed: int) -> Tensor:
    return torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 24, 60), (2, 60, 24)])
def test_orthogonalise_levels_the_singular_values(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
    singular = torch.linalg.svdvals(orthogonalise(matrices))
    assert singular.max() < 1.3
    assert singular.median() > 0.6


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, model: LlamaForCausalLM) -> None:
    optimizers = build_optimizers(model)
    for step in range(2):
        set_learning_rates(optimizers, step, 0.1)
        train_step(model, optimizers, batch(step), batch_loss)
    save_checkpoint(tmp_path, model, optimizers, Progress(step=2, seconds=5.0, history=[{"tokens": 1.0}]))
    expected = train_step(model, optimizers, batch(2), batch_loss)

    resumed = LlamaForCausalLM._from_config(model.config, attn_implementation="eager")
    optimizers = build_optimizers(resumed)
    progress = load_checkpoint(tmp_path, resumed, optimizers)
    assert progress == Progress(step=2, seconds=5.0, history=[{"tokens": 1.0}])
    assert train_step(resumed, optimizers, batch(2), batch_loss) == expected
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_without_a_checkpoint_a_run_starts_at_zero(tmp_path: Path, model: LlamaForCausalLM) -> None:
    assert load_checkpoint(tmp_path, model, build_optimizers(model)) == Progress()


def test_training_learns(model: LlamaForCausalLM) -> None:
    optimizers = build_optimizers(model)
    losses = []
    for step in range(20):
        set_learning_rates(optimizers, step, 0.0)
        losses.append(train_step(model, optimizers, batch(0), batch_loss))
    assert losses[-1] < losses[0] - 1


def test_batches_depend_on_the_step_alone() -> None:
    tokens = torch.arange(SEQUENCE * BATCH * 3 + 10)
    in_order = Batches(tokens, seed=1)
    steps = [in_order(step) for step in range(3 * in_order.steps_per_epoch)]
    again = Batches(tokens, seed=1)
    for step in reversed(range(len(steps))):
        assert torch.equal(again(step), steps[step])
    assert not torch.equal(Batches(tokens, seed=2)(0), steps[0])


def test_an_epoch_visits_no_token_twice() -> None:
    tokens = torch.arange(SEQUENCE * BATCH * 3 + 10)
    batches = Batches(tokens, seed=0)
    inputs = torch.cat([batches(step)[:, :-1] for step in range(batches.steps_per_epoch)]).flatten()
    assert inputs.unique().numel() == inputs.numel() == 2 * BATCH * SEQUENCE


def test_the_budget_is_spent_by_tokens_or_by_time() -> None:
    step = BATCH * SEQUENCE
    half = Progress(step=50, seconds=60.0)
    assert Budget(100 * step, step, minutes=None).fraction(half) == 0.5
    assert Budget(100 * step, step, minutes=10).fraction(half) == 0.5
    assert Budget(100 * step, step, minutes=1.25).fraction(half) == 0.8
    # Time alone never ends a run below the least number of tokens.
    assert Budget(100 * step, 60 * step, minutes=0.5).fraction(half) == 50 / 60


def test_learning_rate_warms_up_and_ends_at_zero(model: LlamaForCausalLM) -> None:
    optimizers = build_optimizers(model)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]

    def scales(step: int, fraction: float) -> set[float]:
        set_learning_rates(optimizers, step, fraction)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        return {round(rate / peak, 6) for rate, peak in zip(rates, peaks, strict=True)}

    assert scales(0, 0.0) == {0.01}
    assert scales(5000, 0.25) == {0.75}
    assert scales(5000, 1.0) == {0.0}


def test_every_parameter_has_one_optimizer(model: LlamaForCausalLM) -> None:
    optimizers = build_optimizers(model)
    owned = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in owned}) == len(owned) == len(list(model.parameters()))
    muon = sum(len(group["params"]) for group in optimizers[0].param_groups)
    assert muon == 7 * model.config.num_hidden_layers


def test_documents_are_joined_by_the_end_token() -> None:
    tokenizer = train_tokenizer(["a = 1\n"] * 10, 300, 512)
    ids = encode_documents(tokenizer, ["a = 1\n", "b\n"])
    assert tokenizer.decode(ids) == f"a = 1\n{END_OF_TEXT}b\n{END_OF_TEXT}"


def test_corpus_leaves_out_what_is_not_text(tmp_path: Path) -> None:
    text = "x = 1\n" * MIN_BYTES
    (tmp_path / "lib").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "lib" / "kept.py").write_text(text)
    (tmp_path / "lib" / "same.py").write_text(text)
    (tmp_path / "lib" / "tiny.py").write_text("x = 1\n")
    (tmp_path / "lib" / "latin.py").write_bytes(b"# \xe9\n" + text.encode())
    (tmp_path / "test" / "suite.py").write_text(text + "y = 1\n")
    (tmp_path / "_sysconfigdata_x.py").write_text(text + "z = 1\n")
    assert [file.path for file in read_corpus(tmp_path)] == ["lib/kept.py"]
