"""Checks of a method on whole models: load, save, reload in a fresh process, train an adapter, undo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..config import HfQuantConfig
from ..experts import QExperts
from ..kernel import use_kernel
from ..nn import PackedModule
from ..swap import packed_modules
from .report import NotRun, Report, require
from .tiny import tiny_inputs, tiny_model

MODELS = ("llama", "mixtral", "gpt2")
_BY_CHOICE = ("tied weights", "output layer, kept by default")
_STEPS = 8

# Reads every checkpoint that is named on standard input and writes its tensors and logits beside it.
_RELOAD = """
import json, sys
import hfquant
from hfquant.testing.model_checks import reload
print(json.dumps({folder: reload(folder) for folder in json.load(sys.stdin)}))
"""


def check_models(report: Report, configs: dict[str, HfQuantConfig], kinds: Sequence[str], folder: Path) -> None:
    """Run all checks of methods, given by name, on tiny models of `kinds`; files go below `folder`."""
    saved: dict[str, Path] = {}
    for kind in kinds:
        tiny_model(kind, dtype=torch.bfloat16).save_pretrained(folder / kind)
        for method, config in configs.items():
            subject = f"{method} on {kind}"
            model = report.run(subject, "loads", partial(load, folder / kind, config))
            if model is None:
                continue
            report.run(subject, "every layer is packed", partial(every_layer_is_packed, model, kind))
            path = folder / f"{kind}-{method}"
            if report.run(subject, "saves", partial(save, model, path)):
                saved[subject] = path
            report.run(subject, "adapter trains", partial(adapter_trains, folder / kind, config))
            report.run(subject, "dequantizes to the same weights", partial(dequantizes, model, config))
    if saved:
        reloaded = report.run("all", "a fresh process runs", partial(run_fresh, saved.values()))
        for subject, path in saved.items() if reloaded else ():
            report.run(subject, "reload is bit-identical", partial(is_identical, path, reloaded[str(path)]))


def load(source: Path, config: HfQuantConfig) -> PreTrainedModel:
    """The model, quantized while it is loaded, with finite logits."""
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    require(bool(torch.isfinite(logits(model)).all()), "the logits hold NaN or infinite values")
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Logits [2, 13, V] of the same tokens for every model."""
    return model.eval()(**tiny_inputs(model)).logits


def every_layer_is_packed(model: PreTrainedModel, kind: str) -> None:
    """Nothing that has a quantized form was left out, except by the usual choice."""
    coverage = model.hf_quantizer.coverage
    left = [skip.name for skip in coverage.skipped if skip.eligible and skip.reason not in _BY_CHOICE]
    require(not left, f"left in full precision: {', '.join(left)}")
    kinds = {type(module).__name__ for _, module in packed_modules(model)}
    require(kinds, "no layer is quantized")
    experts = any(isinstance(module, QExperts) for _, module in packed_modules(model))
    require(experts or not hasattr(model.config, "num_local_experts"), f"the experts of {kind} are not quantized")


def save(model: PreTrainedModel, path: Path) -> bool:
    """Save the model, and beside it the logits and tensors that a reload must give."""
    expected = state(model)
    model.save_pretrained(path)
    save_file(expected, path / "expected.safetensors.tensors")
    return True


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    """All tensors of a model and its logits, each with memory of its own."""
    tensors = {f"tensor.{name}": value.detach().clone() for name, value in model.state_dict().items()}
    return {**tensors, "logits": logits(model).contiguous()}


def reload(folder: str) -> str:
    """Load a checkpoint in this process and write what it holds beside it; returns the error, or ""."""
    try:
        save_file(state(AutoModelForCausalLM.from_pretrained(folder)), Path(folder) / "found.safetensors.tensors")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run_fresh(paths: Any) -> dict[str, str]:
    """Reload all checkpoints in one fresh process; the error of each by path, or ""."""
    done = subprocess.run(
        [sys.executable, "-c", _RELOAD],
        input=json.dumps([str(path) for path in paths]),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    require(done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def is_identical(path: Path, error: str) -> None:
    """The reloaded model has the tensors and the logits of the saved one, bit for bit."""
    require(not error, f"the checkpoint does not load: {error}")
    expected, found = (load_file(path / f"{name}.safetensors.tensors") for name in ("expected", "found"))
    require(expected.keys() == found.keys(), f"other tensors: {sorted(expected.keys() ^ found.keys())[:4]}")
    changed = [name for name, value in expected.items() if not _equal(value, found[name])]
    require(not changed, f"{len(changed)} tensors changed: {', '.join(changed[:4])}")


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def adapter_trains(source: Path, config: HfQuantConfig) -> None:
    """The loss of a LoRA adapter falls, and the packed weights stay as they are."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise NotRun(f"peft is not installed: {error}") from error
    base = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    names = [name for name, module in packed_modules(base) if isinstance(module, PackedModule)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(target_modules=names, r=4, lora_dropout=0.0))
    frozen = {name: value.detach().clone() for name, value in model.named_parameters() if not value.requires_grad}
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    inputs = tiny_inputs(base)
    losses = []
    for _ in range(_STEPS):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        grads = [value.grad for value in trained]
        require(all(grad is not None and torch.isfinite(grad).all() for grad in grads), "a gradient is missing or NaN")
        optimizer.step()
    require(losses[-1] < losses[0], f"the loss of the adapter does not fall: {losses[0]:.4f} to {losses[-1]:.4f}")
    now = dict(model.named_parameters())
    changed = [name for name, value in frozen.items() if not _equal(value, now[name])]
    require(not changed, f"training changed frozen tensors: {', '.join(changed[:4])}")


def dequantizes(model: PreTrainedModel, config: HfQuantConfig) -> None:
    """`dequantize` leaves ordinary modules with the quantized values; a weight-only model keeps its logits."""
    held = {
        name: module.qtensor().dequantize(torch.bfloat16)
        for name, module in packed_modules(model)
        if isinstance(module, PackedModule)
    }
    with use_kernel("reference"):
        before = logits(model)
    plain = model.dequantize()
    left = [name for name, _ in packed_modules(plain)]
    require(not left, f"still packed: {', '.join(left[:4])}")
    for name, values in held.items():
        weight = plain.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        same = torch.equal(weight if weight.shape == values.shape and not _is_conv1d(plain, name) else weight.T, values)
        require(same, f"{name} holds other values after dequantize")
    after = logits(plain)
    require(bool(torch.isfinite(after).all()), "the logits hold NaN or infinite values after dequantize")
    if config.recipe.scheme.input is None:
        difference = float((after.float() - before.float()).norm() / before.float().norm())
        require(difference <= 4 * torch.finfo(torch.bfloat16).eps, f"the logits moved by {difference:.3g} (relative)")


def _is_conv1d(model: PreTrainedModel, name: str) -> bool:
    """Whether a module holds its weight transposed, as GPT-2 does."""
    return type(model.get_submodule(name)).__name__ == "Conv1D"
