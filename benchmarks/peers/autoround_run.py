"""Quantize a model with AutoRound (signed gradient descent on the rounding)."""

from __future__ import annotations

from exchange import finish, read_job, timed  # first: it limits the threads

# isort: split
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

ITERATIONS = 50
BATCH = 8


def main() -> None:
    """Quantize, time, write."""
    job = read_job(("signround",), __doc__)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    tokenizer.pad_token = None  # it is the end of text here, which AutoRound would leave out of its loss
    rounder = AutoRound(
        model,
        tokenizer,
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        iters=ITERATIONS,
        batch_size=BATCH,
        nsamples=len(job.tokens),
        seqlen=job.tokens.shape[1],
        dataset=list(job.tokens.split(BATCH)),
        device_map="cpu",
        enable_torch_compile=False,
        amp=job.dtype == torch.bfloat16,
        seed=42,
    )
    (model, _), times = timed(rounder.quantize)
    settings = {"method": job.method, "iters": ITERATIONS, "batch": BATCH, "seed": 42}
    # The weights that `quantize` leaves behind are the dequantized ones; packing would come later.
    finish(job, model, {}, times, ("auto-round",), settings)


if __name__ == "__main__":
    main()
