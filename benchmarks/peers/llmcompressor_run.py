"""Quantize a model with llm-compressor: round to nearest, GPTQ or AWQ."""

from __future__ import annotations

from typing import Any

from exchange import Job, finish, read_job, timed  # first: it limits the threads

# isort: split
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

METHODS = ("nearest", "gptq", "awq")
BATCH = 8


def recipe(job: Job) -> tuple[list[Any], dict[str, Any]]:
    """The modifiers of a method, and the settings of them that matter."""
    weights = {
        "num_bits": job.bits,
        "type": "int",
        "symmetric": job.symmetric,
        "strategy": "group",
        "group_size": job.group_size,
    }
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if job.method == "gptq":
        options = {"actorder": "weight", "dampening_frac": 0.01, "block_size": 128}
        return [GPTQModifier(**groups, **options)], options
    if job.method == "awq":
        return [AWQModifier(duo_scaling="both"), QuantizationModifier(**groups)], {"duo_scaling": "both", "n_grid": 20}
    return [QuantizationModifier(**groups)], {"observer": "memoryless_minmax (default)"}


def quantize(job: Job, model: nn.Module, modifiers: list[Any]) -> None:
    """Run llm-compressor on exactly the job's tokens, in their order; rounding to nearest gets none."""
    tokens = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in job.tokens]
    data = None if job.method == "nearest" else DataLoader(tokens, batch_size=BATCH, shuffle=False)
    # A dataloader is used as it is; the tokenizer only has to be there.
    oneshot(model=model, tokenizer=AutoTokenizer.from_pretrained(job.model), dataset=data, recipe=modifiers)


def dequantized(model: nn.Module) -> dict[str, Tensor]:
    """The weights of quantized layers as they are used: on the grid of their scales and zero points."""
    found = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            zero = getattr(module, "weight_zero_point", None)
            weight = fake_quantize(module.weight.float(), module.weight_scale.float(), zero, scheme.weights)
            found[f"{name}.weight"] = weight.detach()
    return found


def main() -> None:
    """Quantize, time, write."""
    job = read_job(METHODS, __doc__)
    if not torch.accelerator.is_available():
        # AWQ pins its cached activations whether or not there is a device to copy them to.
        IntermediatesCache.pin_memory = lambda *args, **kwargs: None
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype).eval()
    modifiers, settings = recipe(job)
    _, times = timed(lambda: quantize(job, model, modifiers))
    settings = {"method": job.method, "batch": BATCH, **settings}
    finish(job, model, dequantized(model), times, ("llmcompressor", "compressed-tensors"), settings)


if __name__ == "__main__":
    main()
