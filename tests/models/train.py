"""Train the small Llama model that the tests quantize, from scratch, on the CPU.

    python -m tests.models.train

writes ``tiny-llama/`` (a Hugging Face model directory), ``heldout.txt`` and ``LICENSE-heldout.txt``. A run
that was interrupted continues from its last checkpoint when it is started again with the same options.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .card import write_card, write_heldout
from .corpus import SPLITS, SourceFile, Split, heldout_documents, read_corpus, select, standard_library
from .evaluate import mean_loss, perplexity, sequences, token_loss
from .tokenizer import encode_documents, train_tokenizer
from .training import MUON_LR, WARMUP_STEPS, descend, export, muon_and_adamw, set_learning_rates

VOCAB_SIZE = 1024
CONTEXT = 512
"""Longest sequence, in tokens, that the model's configuration allows."""

WORK = Path(tempfile.gettempdir()) / "tiny-llama-training"
"""Default directory of checkpoints."""

SEQUENCE = 256
"""Tokens predicted per training sequence."""

BATCH = 16
"""Sequences per optimizer step."""

HELDOUT_BYTES = 330_000
HELDOUT_SEQUENCES = 120
LOG_STEPS = 200
"""Steps between two measurements of the valid loss."""

SAVE_SECONDS = 600
"""Time between two checkpoints."""

VALID_SEQUENCES = 128
"""Sequences of ``SEQUENCE`` tokens behind the losses logged during training."""

ADAM_LR = 0.004


@dataclass
class Progress:
    """What a run has done so far; everything a checkpoint holds besides tensors."""

    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens predicted so far."""
        return self.step * BATCH * SEQUENCE


@dataclass(frozen=True)
class Budget:
    """How long to train: ``tokens``, cut down towards ``min_tokens`` when ``minutes`` run out first."""

    tokens: int
    min_tokens: int
    minutes: float | None

    def fraction(self, progress: Progress) -> float:
        """Return how much of the run is done, from 0 to 1 and beyond, without a jump when time takes over."""
        done = progress.tokens / self.tokens
        if self.minutes is None:
            return done
        return max(done, min(progress.seconds / (60 * self.minutes), progress.tokens / self.min_tokens))


@dataclass(frozen=True)
class Run:
    """The choices of one training run: how long, from which seed, compiled or not, where checkpoints go."""

    budget: Budget
    seed: int
    compiled: bool
    directory: Path


class Batches:
    """Training batches as a pure function of the step, so that a resumed run sees the same data.

    Every epoch cuts the token stream at another offset into consecutive sequences and visits them in another
    random order.
    """

    def __init__(self, tokens: Tensor, seed: int) -> None:
        """Serve the stream ``tokens``, of which an epoch sees all but at most ``BATCH + 2`` sequences."""
        self.tokens = tokens
        self.seed = seed
        # One sequence less than fits leaves room for the offset and for the target of the last position.
        self.sequences = (tokens.numel() - 1) // SEQUENCE - 1
        self.steps_per_epoch = self.sequences // BATCH
        self._epoch = -1
        self._starts = torch.empty(0, dtype=torch.int64)

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        offset = torch.randint(SEQUENCE, (), generator=generator)
        self._starts = torch.randperm(self.sequences, generator=generator) * SEQUENCE + offset
        self._epoch = epoch

    def __call__(self, step: int) -> Tensor:
        """Return the ``(BATCH, SEQUENCE + 1)`` token ids of ``step``, inputs and targets one to the right."""
        epoch, index = divmod(step, self.steps_per_epoch)
        self._enter(epoch)
        starts = self._starts[index * BATCH : (index + 1) * BATCH]
        return self.tokens[starts[:, None] + torch.arange(SEQUENCE + 1)]


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a freshly initialised model: grouped-query attention, untied output head, 3.1 M parameters."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Without the fused attention kernel: its backward pass is the slowest part of a step on a CPU.
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the 2-D weights of the blocks and AdamW for embeddings, head and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    return muon_and_adamw(model, matrices, ADAM_LR, betas=(0.9, 0.95))


def batch_loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Mean next-token loss of ``(BATCH, SEQUENCE + 1)`` token ids, in nats, with bfloat16 matrix products."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return token_loss(logits, batch[:, 1:])


def train_step(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    batch: Tensor,
    loss_function: Callable[[LlamaForCausalLM, Tensor], Tensor],
) -> float:
    """Do one optimizer step and return the training loss in nats per token."""
    return descend(model, optimizers, loss_function(model, batch))


def save_checkpoint(
    directory: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], progress: Progress
) -> None:
    """Write everything a run needs to continue, replacing the previous checkpoint at once."""
    partial = directory / "checkpoint.partial"
    partial.mkdir(parents=True, exist_ok=True)
    save_model(model, str(partial / "model.safetensors"))
    torch.save([optimizer.state_dict() for optimizer in optimizers], partial / "optimizers.pt")
    (partial / "progress.json").write_text(json.dumps(asdict(progress)))
    final = directory / "checkpoint"
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def load_checkpoint(directory: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> Progress:
    """Restore the checkpoint in ``directory``, or return the start of a run when there is none."""
    source = directory / "checkpoint"
    if not source.exists():
        return Progress()
    load_model(model, str(source / "model.safetensors"))
    states = torch.load(source / "optimizers.pt", weights_only=True)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    return Progress(**json.loads((source / "progress.json").read_text()))


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tokens: dict[Split, Tensor],
    run: Run,
) -> Progress:
    """Train until the budget is spent; save checkpoints and log the valid loss on the way."""
    optimizers = build_optimizers(model)
    loss_function = torch.compile(batch_loss, dynamic=False) if run.compiled else batch_loss
    progress = load_checkpoint(run.directory, model, optimizers)
    batches = Batches(tokens["train"], run.seed)
    valid = sequences(tokens["valid"], SEQUENCE + 1, VALID_SEQUENCES)
    before = progress.seconds
    started = time.monotonic()
    last_save = started
    while (fraction := run.budget.fraction(progress)) < 1:
        set_learning_rates(optimizers, progress.step, fraction)
        loss = train_step(model, optimizers, batches(progress.step), loss_function)
        progress.step += 1
        now = time.monotonic()
        progress.seconds = before + now - started
        if progress.step % LOG_STEPS == 0:
            valid_loss = mean_loss(model, valid)
            progress.history.append(
                {"tokens": progress.tokens, "train_loss": round(loss, 4), "valid_loss": round(valid_loss, 4)}
            )
            print(describe(progress, loss, valid_loss, run.budget), flush=True)
        if now - last_save >= SAVE_SECONDS:
            last_save = now
            save_checkpoint(run.directory, model, optimizers, progress)
            export(run.directory / "latest", model, tokenizer)
    save_checkpoint(run.directory, model, optimizers, progress)
    return progress


def describe(progress: Progress, loss: float, valid_loss: float, budget: Budget) -> str:
    """Return one line of progress with the expected time left."""
    fraction = budget.fraction(progress)
    left = progress.seconds * (1 / fraction - 1)
    rate = progress.tokens / progress.seconds
    return (
        f"{fraction:6.1%}  step {progress.step}  {progress.tokens / 1e6:.2f} M tokens  {rate:.0f} tokens/s  "
        f"train loss {loss:.3f}  valid loss {valid_loss:.3f} (ppl {math.exp(valid_loss):.2f})  "
        f"{progress.seconds / 60:.1f} min, {left / 60:.1f} min left"
    )


def corpus_record(files: list[SourceFile], tokens: dict[Split, Tensor]) -> dict[str, Any]:
    """Return the number of files, bytes and tokens in each split."""
    return {
        split: {
            "files": len(select(files, split)),
            "bytes": sum(len(file.text.encode()) for file in select(files, split)),
            "tokens": tokens[split].numel(),
        }
        for split in SPLITS
    }


def final_metrics(
    directory: Path, tokenizer: PreTrainedTokenizerFast, tokens: dict[Split, Tensor], heldout: str
) -> dict[str, float]:
    """Return the perplexities of the exported bfloat16 weights, computed in float32."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    heldout_tokens = encode_documents(tokenizer, (file.text for file in heldout_documents(heldout)))
    return {
        "valid_perplexity": perplexity(model, sequences(tokens["valid"], SEQUENCE)),
        "test_perplexity": perplexity(model, sequences(tokens["test"], SEQUENCE)),
        "heldout_perplexity": perplexity(model, sequences(heldout_tokens, SEQUENCE, HELDOUT_SEQUENCES)),
    }


def main(
    output: Annotated[Path, typer.Option(help="Directory to write into.")] = Path(__file__).parent,
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 36_000_000,
    min_tokens: Annotated[int, typer.Option(help="Least tokens, whatever the time.")] = 20_000_000,
    minutes: Annotated[float | None, typer.Option(help="Time to finish in.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the data.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    compiled: Annotated[bool, typer.Option(help="Compile the model: a third faster.")] = True,
    work: Annotated[Path, typer.Option(help="Directory for checkpoints.")] = WORK,
) -> None:
    """Build the corpus, train tokenizer and model, and write the model directory with its held-out text."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    files = read_corpus(standard_library())
    tokenizer = train_tokenizer((file.text for file in select(files, "train")), VOCAB_SIZE, CONTEXT)
    ids = {split: encode_documents(tokenizer, (f.text for f in select(files, split))) for split in SPLITS}
    model = build_model(tokenizer)
    print({split: ids[split].numel() for split in SPLITS}, f"{model.num_parameters():,} parameters", flush=True)

    run = Run(Budget(tokens, min_tokens, minutes), seed, compiled, work)
    progress = train(model, tokenizer, ids, run)

    directory = output / "tiny-llama"
    export(directory, model, tokenizer)
    heldout = write_heldout(output, files, HELDOUT_BYTES, platform.python_version())
    record = {
        "parameters": model.num_parameters(),
        "tokens": progress.tokens,
        "epochs": round(progress.tokens / ids["train"].numel(), 2),
        "steps": progress.step,
        "seconds": round(progress.seconds),
        "budget": asdict(run.budget),
        "cut_by_time": progress.tokens < tokens,
        **final_metrics(directory, tokenizer, ids, heldout),
        "corpus": corpus_record(files, ids),
        "batch": {"sequences": BATCH, "tokens_per_sequence": SEQUENCE},
        "learning_rate": {"muon": MUON_LR, "adamw": ADAM_LR, "warmup_steps": WARMUP_STEPS},
        "seed": seed,
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "history": progress.history,
    }
    (directory / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    write_card(directory, record, HELDOUT_SEQUENCES)


if __name__ == "__main__":
    typer.run(main)
