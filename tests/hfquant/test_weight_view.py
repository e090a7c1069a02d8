"""The weight of a packed layer costs nothing until its numbers are needed, and is then a tensor like any other."""

from __future__ import annotations

import copy
import io
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, T5Config
from transformers.models.t5.modeling_t5 import T5DenseActDense

from hfquant import HfQuantConfig, ops
from hfquant.nn import QLinear
from hfquant.quantize import pack, quantize_linear
from hfquant.testing.tiny import tiny_inputs, tiny_model
from hfquant.weight_view import WeightView


@pytest.fixture
def dequantized(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was dequantized, in a list that grows."""
    seen: list[Any] = []
    original = ops.dequantize
    monkeypatch.setattr(ops, "dequantize", lambda *args: seen.append(args) or original(*args))
    return seen


def packed(rows: int = 40, columns: int = 48, dtype: torch.dtype = torch.float32) -> QLinear:
    recipe = HfQuantConfig("nf4").recipe
    layer = QLinear(columns, rows, None, dtype)
    layer.kind = "linear"
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    layer.hold(*pack(quantize_linear(w, recipe), recipe))
    return layer


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_look_of_a_weight_costs_nothing(dtype: torch.dtype, inference: bool, dequantized: list[Any]) -> None:
    with torch.inference_mode(inference):
        layer = packed(dtype=dtype)
        weight = layer.weight
        assert isinstance(weight, Tensor) and type(weight) is WeightView and not isinstance(weight, nn.Parameter)
        assert (weight.dtype, weight.device, weight.shape, weight.ndim) == (dtype, layer.codes.device, (40, 48), 2)
        assert (weight.size(1), weight.numel(), weight.stride(), len(weight)) == (48, 40 * 48, (48, 1), 40)
        assert weight.is_contiguous() and weight.is_floating_point() and weight.element_size() == dtype.itemsize
        assert not (weight.requires_grad or weight.is_cuda or weight.is_meta or weight.is_sparse)
        assert weight.data is weight and weight.grad is None and (inference or weight.to(dtype) is weight)
        assert not dequantized
        plain = layer.qtensor().dequantize(dtype)
        assert torch.equal(weight, plain) and torch.equal(weight * 2, plain * 2) and torch.equal(weight, plain)
        assert len(dequantized) == 1


def _saved(weight: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    loaded: Tensor = torch.load(file, weights_only=True)
    return loaded


READ: dict[str, Callable[[Tensor], Tensor]] = {
    "numpy": lambda weight: torch.from_numpy(weight.numpy().copy()),
    "array": lambda weight: torch.from_numpy(np.asarray(weight).copy()),
    "list": lambda weight: torch.tensor(weight.tolist()),
    "dlpack": torch.from_dlpack,
    "storage": lambda weight: torch.empty(0).set_(weight.untyped_storage()).view(weight.shape),  # type: ignore[call-overload]
    "save": _saved,
    "safetensors": lambda weight: load(save({"weight": weight}))["weight"],
    "deepcopy": copy.deepcopy,
    "tensor": lambda weight: weight.clone().detach(),
    "rows": lambda weight: torch.stack(list(weight)),
    "out": lambda weight: torch.add(weight, 0, out=torch.empty(40, 48)),
    "copied": lambda weight: torch.empty(40, 48).copy_(weight),
    "foreach": lambda weight: torch._foreach_add([weight], 0.0)[0],
    "decomposed": lambda weight: (lambda u, s, v: u * s @ v)(*torch.linalg.svd(weight, full_matrices=False)),
    "vmap": lambda weight: torch.func.vmap(lambda row: row + 0)(weight),
}


@pytest.mark.parametrize("how", READ)
def test_every_way_to_read_gives_a_plain_tensor_of_the_values(how: str) -> None:
    layer = packed()
    expected = layer.qtensor().dequantize()
    found = READ[how](layer.weight)
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if how == "decomposed" else 0)
    assert repr(layer.weight) == repr(expected) and layer.weight.data_ptr() != 0


def test_a_gradient_goes_through_a_weight_that_is_not_read_yet() -> None:
    layer, x = packed(), torch.randn(3, 48, requires_grad=True)
    nn.functional.linear(x, layer.weight).sum().backward()
    torch.testing.assert_close(x.grad, layer.qtensor().dequantize().sum(0).expand(3, 48))


def test_a_weight_keeps_what_it_was_when_it_was_asked_for() -> None:
    """As it did when it was dequantized at once; read or not."""
    layer = packed()
    unread, before = layer.weight, layer.weight.clone()
    layer.weight = before + 1
    assert torch.equal(unread, before) and not torch.equal(layer.weight, before)
    unread = layer.weight
    layer.to(torch.bfloat16)
    assert unread.dtype == unread.clone().dtype == torch.float32 and layer.weight.dtype == torch.bfloat16


def test_a_weight_is_freed_with_its_last_name() -> None:
    layer = packed()
    weight = layer.weight
    weight.data += 0
    gone = weakref.ref(weight.dense())
    assert gone() is not None
    del weight
    assert gone() is None


def quantized(folder: Any) -> Any:
    tiny_model("llama").save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=HfQuantConfig("nf4"))


def test_attaching_and_training_adapters_dequantizes_nothing(tmp_path: Any, dequantized: list[Any]) -> None:
    model = quantized(tmp_path / "model")
    inputs = tiny_inputs(model)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config)
    model.add_adapter("other", config)
    model.set_adapter("other")
    model.save_pretrained(tmp_path / "adapter")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    model = PeftModel.from_pretrained(model.unload(), tmp_path / "adapter" / "other")
    assert not dequantized
    model = model.merge_and_unload()
    layers = sum(isinstance(module, QLinear) for module in model.modules())
    assert len(dequantized) == layers > 4
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], use_dora=True))
    assert len(dequantized) > layers  # DoRA starts with the norms of the weights


@pytest.mark.parametrize("fullgraph", [True, False])
def test_questions_about_a_weight_do_not_break_graphs(fullgraph: bool, dequantized: list[Any]) -> None:
    """T5 asks its layer for the dtype of its weight in every call."""
    torch.compiler.reset()
    block = T5DenseActDense(T5Config(d_model=40, d_ff=48, dropout_rate=0)).eval()
    block.wo = packed()
    x = torch.randn(3, 40)
    with torch.no_grad():
        expected = block(x)
        assert not dequantized
        compiled = torch.compile(block, fullgraph=fullgraph, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        program = torch.export.export(block, (x,), strict=True)
        assert torch.equal(program.module()(x), expected)


def test_dora_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    config = LoraConfig(r=4, target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(packed()), config)  # type: ignore[arg-type]
    x = torch.randn(3, 48)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
