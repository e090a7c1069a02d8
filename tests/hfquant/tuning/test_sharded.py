"""Weights spread over processes (FSDP2) compute and learn what whole ones do; what cannot work is refused."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hfquant
from hfquant import HfQuantConfig, UnsupportedError
from hfquant.errors import SpecError
from hfquant.lora.check import check_gradients
from hfquant.swap import packed_modules
from hfquant.testing.tiny import tiny_inputs, tiny_model
from hfquant.tuning import sharded
from tests.fresh import run_ranks

from .conftest import MODEL

SEEN = torch.randint(3, 256, (8, 16), generator=torch.Generator().manual_seed(1))  # what calibrated methods see
LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # by `accelerate launch --use_fsdp --fsdp_version 2`
ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# Every kind of packed tensor: codes of whole and of part bytes, zero points, scales of scales, levels, columns in 16
# bit or in another order, ranges of static inputs, tables of embeddings, a basis, stacks of experts.
CONFIGS = {
    "nf4": HfQuantConfig("nf4", double_quant=True),
    "int3": HfQuantConfig("int3", group_size=32, embeddings=True),
    "quantile4": HfQuantConfig("quantile4", group_size=32),
    "llm_int8": HfQuantConfig("llm_int8"),
    "fp8": HfQuantConfig("fp8"),
    "gptq": HfQuantConfig("gptq", bits=4, group_size=32, transform="rotate", data=SEEN),
    "w8a8": HfQuantConfig("w8a8", dynamic=False, data=SEEN),
    "experts": HfQuantConfig("int4", group_size=32),
    "gpt2": HfQuantConfig("int4", group_size=32, embeddings=True),
}


def adapted(folder: Path, name: str) -> PeftModel:
    """The quantized model with adapters that do something, one of them DoRA, which reads the packed weight."""
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16 if name == "fp8" else None)
    torch.manual_seed(0)
    named = {"target_modules": ["q_proj", "o_proj", "down_proj"]}
    if name == "gpt2":
        named = {"target_modules": ["c_attn"]}
    if name == "experts":
        named = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    return get_peft_model(model, LoraConfig(r=3, init_lora_weights=False, use_dora=name == "int3", **named))


def learned(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits without gradients, and the gradients of a batch."""
    inputs = tiny_inputs(model)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    check_gradients(model, 1)
    return logits, {name: sharded.whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}


def compare(folder: Path) -> dict[str, dict]:
    """In one of several processes: every model whole, then sharded as accelerate does it."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    PartialState(cpu=True)
    found = {}
    with sharded.settled():
        for name in CONFIGS:
            try:
                model = adapted(folder, name)
                logits, gradients = learned(model)
                model.zero_grad()
                sharded.begin(torch.device("cpu"))
                fsdp2_prepare_model(Accelerator(cpu=True), model)
                got, shares = learned(model)
                found[name] = {
                    "logits": torch.equal(got, logits),
                    "gradients": len(shares) == len(gradients) > 0
                    and all(torch.equal(shares[n], gradients[n]) for n in gradients),
                    "sharded": sharded.megabytes(model),
                }
            except Exception as e:
                import traceback
                found[name] = traceback.format_exc()[-1500:]
    return found


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]))))
