"""Weights whose codes are in the Hadamard basis of their input: matrix, products and files mean the same as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GemmaConfig

from hfquant import FormatError, HfQuantConfig, ops, quantize
from hfquant.blocks import Blocks
from hfquant.hadamard import hadamard, inverse_hadamard
from hfquant.inspection import inspect_checkpoint
from hfquant.kernel import KERNELS, Kernel, choose, use_kernel
from hfquant.layouts import unpack
from hfquant.nn import QEmbedding, QLinear
from hfquant.parallel import why_not_split
from hfquant.quantize import pack, pack_empty, quantize_linear
from hfquant.recipe import Recipe
from hfquant.reference import linear, round_trip
from hfquant.requantize import requantize
from hfquant.spec import InputSpec, PackedSpec, Scheme, TensorSpec
from hfquant.swap import packed_modules
from hfquant.testing.tiny import tiny_inputs, tiny_model

WEIGHT_ONLY = Recipe(Scheme(TensorSpec("uint4", Blocks(1, 16), zero=True)))
INPUTS = Recipe(Scheme(TensorSpec("int8", Blocks(1, -1)), InputSpec(TensorSpec("int8", Blocks(1, -1)))))
ROWS, COLS = 24, 40  # 40 = 8 * 5: butterflies and cosines
COLUMNS = torch.tensor([3, 17])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(recipe: Recipe, rotated: bool = True, columns: Tensor | None = None) -> QLinear:
    made = QLinear(COLS, ROWS, torch.nn.Parameter(drawn(ROWS, seed=9)), torch.float32)
    made.hold(*pack(quantize_linear(drawn(ROWS, COLS), recipe, columns=columns, rotated=rotated), recipe))
    return made


@given(
    st.integers(1, 30),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_codes_are_those_of_the_rotated_matrix(rows: int, cols: int, dtype: torch.dtype, kept: bool) -> None:
    w = drawn(rows, cols).to(dtype)
    columns = torch.tensor([cols // 2]) if kept else None
    q = quantize_linear(w, WEIGHT_ONLY, columns=columns, rotated=True)
    there = quantize_linear(hadamard(w), WEIGHT_ONLY, columns=columns)
    assert q.rotated and not there.rotated and torch.equal(q.codes, there.codes)
    if not kept:
        torch.testing.assert_close(q.dequantize(), inverse_hadamard(there.dequantize()), rtol=0, atol=0)
        # A rotation keeps the size of errors, so what the codes miss of W H is what they miss of W.
        error, same = (q.dequantize() - w.float()).norm(), (there.dequantize() - hadamard(w)).norm()
        torch.testing.assert_close(error, same, rtol=1e-4, atol=1e-5)
    assert q.dequantize(dtype).dtype == dtype
    packed, spec = pack(q, WEIGHT_ONLY)
    empty, expected = pack_empty((rows, cols), WEIGHT_ONLY, dtype, int(kept), rotated=True)
    assert spec == expected == PackedSpec.parse(spec.key()) and spec.rotated
    assert {name: value.dtype for name, value in packed.items()} == {name: v.dtype for name, v in empty.items()}
    again = unpack([packed[name] for name in spec.names], spec)
    assert torch.equal(again.dequantize(), q.dequantize())


def test_descriptions_from_before_rotations_are_still_read() -> None:
    spec = pack(quantize_linear(drawn(ROWS, COLS), WEIGHT_ONLY), WEIGHT_ONLY)[1]
    old = json.loads(spec.key())
    del old["rotated"]
    assert PackedSpec.parse(json.dumps(old)) == spec


@pytest.mark.parametrize("columns", [None, COLUMNS])
def test_weight_only_layer_is_the_matrix(columns: Tensor | None) -> None:
    module, x = layer(WEIGHT_ONLY, columns=columns), drawn(2, 7, COLS, seed=1).requires_grad_()
    w = module.qtensor().dequantize()
    assert torch.equal(module.weight, w)
    torch.testing.assert_close(module(x), F.linear(x, w, module.bias))
    with use_kernel("reference"):
        y = module(x)
    torch.testing.assert_close(y, F.linear(x, w, module.bias), rtol=0, atol=0)
    y.sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [None, COLUMNS])
def test_quantized_input_is_the_rotated_one(columns: Tensor | None) -> None:
    module, x = layer(INPUTS, columns=columns), drawn(7, COLS, seed=1)
    x[:, 5] *= 100
    there = quantize_linear(hadamard(drawn(ROWS, COLS)), INPUTS, columns=columns)
    rotated = hadamard(x)
    if columns is None:
        seen = round_trip(rotated, INPUTS.scheme.input.tensor)
    else:
        seen = round_trip(rotated.index_fill(1, columns, 0), INPUTS.scheme.input.tensor)
        seen[:, columns] = rotated[:, columns]
    expected = F.linear(seen, there.dequantize(), module.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-4)
    with use_kernel("reference"):
        torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_rotated_and_quantized_is_rounded_once(dtype: torch.dtype) -> None:
    """Rounding the rotated input to 16 bits first would move values to other integers."""
    module, x = layer(INPUTS), drawn(7, COLS, seed=1).to(dtype)
    with use_kernel("reference"), torch.no_grad():
        expected = module(x)
    with torch.no_grad():
        for y in (module(x), ops.linear(x, module.packed(), module.bias, module.key)):
            assert y.dtype == dtype
            assert (y - expected).float().norm() <= 1.5 * torch.finfo(dtype).eps * expected.float().norm()


def test_one_large_channel_costs_a_rotated_layer_less() -> None:
    """Errors of the rounded inputs go down by up to sqrt(K / 2); those of the weights are left out."""
    given, bias = INPUTS.scheme.input, layer(INPUTS).bias
    x = drawn(50, COLS, seed=1)
    x[:, 5] = 100
    w = drawn(ROWS, COLS)
    plain = (round_trip(x, given.tensor) - x) @ w.T
    rotated = layer(INPUTS)(x) - F.linear(x, layer(INPUTS).qtensor().dequantize(), bias)
    assert float(rotated.norm()) < 0.5 * float(plain.norm())


@pytest.mark.parametrize("recipe", [WEIGHT_ONLY, INPUTS])
def test_any_kernel_gets_rotated_inputs(recipe: Recipe) -> None:
    """A kernel that has never heard of rotations computes the same as the reference."""
    seen: list[PackedSpec] = []

    def run(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: PackedSpec) -> Tensor:
        seen.append(spec)
        return linear(x, packed, bias, spec)

    module, x = layer(recipe), drawn(7, COLS, seed=1)
    expected = module(x)
    KERNELS.add("naive", Kernel("naive", "*", "*", run), "test")
    choose.cache_clear()
    try:
        with use_kernel("naive"):
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    finally:
        KERNELS._entries.pop("naive")
        choose.cache_clear()
    assert [spec.rotated for spec in seen] == [False]


def test_table_gives_rows_of_the_matrix() -> None:
    table = QEmbedding(ROWS, COLS, None, torch.float32)
    q = quantize_linear(drawn(ROWS, COLS), WEIGHT_ONLY, rotated=True)
    table.hold(*pack(q, WEIGHT_ONLY))
    ids = torch.tensor([[3, 0], [23, 3]])
    torch.testing.assert_close(table(ids), q.dequantize()[ids], rtol=0, atol=0)


def test_state_dict_of_another_basis_is_refused() -> None:
    with pytest.raises(FormatError, match=r"the state dict holds .*'not rotated'.*, this layer .*'rotated'"):
        layer(WEIGHT_ONLY).load_state_dict(layer(WEIGHT_ONLY, rotated=False).state_dict())
    layer(WEIGHT_ONLY).load_state_dict(layer(WEIGHT_ONLY).state_dict())


def test_inputs_are_not_cut_among_ranks() -> None:
    module = layer(Recipe(Scheme(TensorSpec("int8", Blocks(1, -1)))))
    assert "rotated basis" in (why_not_split(module, "rowwise", 2) or "")
    assert why_not_split(module, "colwise", 2) is None


def test_module_says_that_it_is_rotated() -> None:
    assert repr(layer(WEIGHT_ONLY)).endswith(", rotated)") and "rotated" not in repr(layer(WEIGHT_ONLY, rotated=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [None, COLUMNS])
def test_same_values_keep_their_codes(columns: Tensor | None, dtype: torch.dtype) -> None:
    q = quantize_linear(drawn(ROWS, COLS), WEIGHT_ONLY, columns=columns, rotated=True)
    again = requantize(q.dequantize(dtype), q)
    assert again.rotated and torch.equal(again.codes, q.codes)
    torch.testing.assert_close(again.dequantize(), q.dequantize(), rtol=0, atol=0)


def test_a_small_low_rank_change_is_kept() -> None:
    """As when an adapter is merged: far less than a step of the codes, and still there afterwards."""
    w = drawn(64, 160)
    q = quantize_linear(w, WEIGHT_ONLY, rotated=True)
    change = 0.01 * drawn(64, 2, seed=1) @ drawn(2, 160, seed=2)
    made = requantize(q.dequantize() + change, q).dequantize() - q.dequantize()
    x = drawn(50, 2, seed=3) @ torch.linalg.pinv(drawn(2, 160, seed=2)).T  # inputs that the change is about
    wanted = x @ change.T
    assert float((x @ made.T - wanted).norm()) < 0.3 * float(wanted.norm())


# Whole models.


def rotated_model(kind: str, source: Path, **options: Any) -> tuple[Any, HfQuantConfig]:
    if kind == "gemma":
        model = AutoModelForCausalLM.from_config(
            GemmaConfig(
                vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16,
            ),
        )  # fmt: skip
    else:
        model = tiny_model(kind)
    model.save_pretrained(source)
    return model, HfQuantConfig("w8a8", transform={"name": "rotate", **options})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**tiny_inputs(model)).logits


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gemma"])
def test_model_reloads_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """However it was quantized: while it was loaded, or block by block from its files."""
    original, config = rotated_model(kind, tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config)
    before = logits(model)
    # Int8 everywhere is near lossless.
    assert float((before - logits(original)).norm() / logits(original).norm()) < 0.03
    model.save_pretrained(tmp_path / "saved")
    quantize(tmp_path / "source", config, tmp_path / "streamed")
    leaves = {"down_proj"} if kind != "mixtral" else {f"experts.{leaf}" for leaf in ("down_proj",)}
    for folder in ("saved", "streamed"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(again), before), folder
        named = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]["rotated"]
        assert {name.partition(".mlp.")[2] for name in named} == leaves and len(named) == 2
        shown = {layer.name for layer in inspect_checkpoint(tmp_path / folder).layers if layer.rotated}
        assert shown == set(named)
    assert any("rotated" in module.extra_repr() for _, module in packed_modules(again)) or kind == "mixtral"


def test_merging_an_adapter_keeps_it(tmp_path: Path) -> None:
    _, config = rotated_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    before = logits(model)
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)).eval()
    adapted = logits(tuned)
    change = adapted - before
    merged = tuned.merge_and_unload()
    assert merged.model.layers[0].mlp.down_proj.spec.rotated
    assert float((logits(merged) - adapted).norm()) < 0.2 * float(change.norm())


def test_op_dequantizes_what_the_tensor_means() -> None:
    module = layer(WEIGHT_ONLY)
    assert torch.equal(ops.dequantize(module.packed(), module.key, torch.float32), module.qtensor().dequantize())
