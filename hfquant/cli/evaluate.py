"""`hfquant eval`: how far a quantized model is from its original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ..errors import SpecError
from ..eval import Fidelity, Reference, token_batches
from ..eval.perplexity import Forward, causal_logits
from ..source import load_model, read_config
from .output import Tick, print_json, progress, stderr, stdout, table


def eval_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub repository of the quantized model.")],
    reference: Annotated[str, typer.Option(help="The original model.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Text file that neither model was trained on.", show_default=False)],
    sequences: Annotated[int, typer.Option(help="How many sequences to compare.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 8,
    dtype: Annotated[
        str, typer.Option(help="Arithmetic of both; float32 adds no rounding of its own, auto is as stored.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Where both run: cpu, cuda, auto.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare a quantized model with its original on held-out text: KL divergence, top-1 agreement, perplexity."""
    if not data.is_file():
        raise SpecError(f"--data {data} is not a file: give a text file")
    batches = read_batches(reference, data, sequences, length, batch_size)
    read_config(model)
    options = {"dtype": dtype, "device_map": device}
    original = _language_model(reference, **options)
    with progress("measuring the original", len(batches)) as tick:
        measured = Reference(original, batches, forward=ticking(tick))
    del original  # kept by `measured` if it has to run again
    candidate = _language_model(model, **options)
    with progress("measuring the quantized model", len(batches)) as tick:
        result = measured.compare(candidate, forward=ticking(tick))
    if json:
        print_json({"model": model, "reference": reference, "data": str(data), "length": length, **asdict(result)})
    else:
        _show(result, model, reference)


def read_batches(tokenizer_of: str, data: Path, sequences: int, length: int, batch_size: int = 8) -> list[Tensor]:
    """Token batches of a text file, cut by the tokenizer of a model.

    Raises SpecError if the model has no tokenizer or a window shorter than `length`.
    """
    from transformers import AutoTokenizer

    window = getattr(read_config(tokenizer_of).get_text_config(), "max_position_embeddings", None)
    if window is not None and length > window:
        raise SpecError(f"--length {length} is more than the {window} tokens that {tokenizer_of} can read at once")
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    except (OSError, ValueError) as problem:
        raise SpecError(f"{tokenizer_of} has no tokenizer to read text with: {problem}") from problem
    return token_batches(tokenizer, data, sequences, length, batch_size)


def _language_model(src: str, **options: Any) -> Any:
    """Load a model that predicts next tokens. Raises SpecError for any other."""
    model = load_model(src, **options)
    if not model.can_generate():
        found = type(model).__name__
        raise SpecError(f"{src} is a {found}, which predicts no next tokens: give a causal language model")
    return model


def ticking(tick: Tick, now: str = "") -> Forward:
    """The usual forward pass, reporting each batch that is done."""
    run: Callable[[nn.Module, Tensor], Tensor] = causal_logits

    def forward(model: nn.Module, ids: Tensor) -> Tensor:
        logits = run(model, ids)
        tick(now)
        return logits

    return forward


def interval(bounds: tuple[float, float], digits: int = 3, sign: bool = False) -> str:
    """A 95 % interval for people; one sequence alone gives none."""
    if not torch.tensor(bounds).isfinite().all():
        return "no interval from one sequence"
    low, high = bounds
    return f"[{low:{'+' if sign else ''}.{digits}f}, {high:{'+' if sign else ''}.{digits}f}]"


def _show(result: Fidelity, model: Any, reference: Any) -> None:
    out = stdout()
    made = table("measure", "value", "95 % interval", right=("value",))
    made.add_row("KL(original || quantized), nats", f"{result.kl:.5f}", interval(result.kl_ci, 5))
    made.add_row("top-1 agreement", f"{result.top1:.2%}", "")
    made.add_row("perplexity, original", f"{result.ppl_ref:.3f}", "")
    made.add_row("perplexity, quantized", f"{result.ppl:.3f}", "")
    difference = interval(result.dppl_ci, sign=True)
    made.add_row("  difference, paired", f"{result.ppl - result.ppl_ref:+.3f}", difference)
    out.print(made)
    sequences = "1 sequence" if result.sequences == 1 else f"{result.sequences} sequences"
    out.print(f"\n{result.tokens} predictions in {sequences}.", style="dim")
    if result.ppl > 2 * result.ppl_ref:
        stderr().print("[yellow]Far worse than the original: try more bits or smaller blocks.[/]")
