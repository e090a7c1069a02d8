"""Tiny models build, differ by seed only, and exercise what they are meant to."""

import pytest
import torch
from torch import nn

from hfquant.errors import SpecError
from hfquant.testing.tiny import KINDS, RAGGED, tiny_inputs, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_finite_and_not_flat(kind, dtype):
    model = tiny_model(kind, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype} and not model.training
    with torch.no_grad():
        logits = model(**tiny_inputs(model)).logits
    assert logits.isfinite().all() and logits.float().std() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_model_and_inputs(kind):
    first, same, other = tiny_model(kind, 1), tiny_model(kind, 1), tiny_model(kind, 2)
    x, y, z = tiny_inputs(first, 1), tiny_inputs(first, 1), tiny_inputs(first, 2)
    name = first.main_input_name
    assert torch.equal(x[name], y[name]) and not torch.equal(x[name], z[name])
    with torch.no_grad():
        a, b, c = (model(**x).logits for model in (first, same, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("kind", KINDS)
def test_no_parameter_is_trivial(kind):
    for name, parameter in tiny_model(kind).named_parameters():
        assert (parameter != 0).all(), name
        assert parameter.unique().numel() > 1, name


@pytest.mark.parametrize("kind", KINDS)
def test_has_a_ragged_width(kind):
    assert any(RAGGED in p.shape for p in tiny_model(kind).parameters())
    assert RAGGED % 64 and RAGGED % 32


def test_grouped_query_attention():
    attention = tiny_model("llama").model.layers[0].self_attn
    assert attention.k_proj.out_features < attention.q_proj.out_features


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_fused_parameters(kind):
    experts = tiny_model(kind).model.layers[0].mlp.experts
    assert experts.down_proj.ndim == 3 and not any(isinstance(m, nn.Linear) for m in experts.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_training_mode_computes_the_same(kind):
    model = tiny_model(kind)
    with torch.no_grad():
        quiet = model(**tiny_inputs(model)).logits
        assert torch.equal(model.train()(**tiny_inputs(model)).logits, quiet)


@pytest.mark.parametrize("kind", KINDS)
def test_reloads_bit_identical(kind, tmp_path):
    model = tiny_model(kind, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs(again)).logits, model(**tiny_inputs(model)).logits)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_generates(kind):
    model = tiny_model(kind)
    out = model.generate(**tiny_inputs(model), max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= 17 and out.max() < 256


def test_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    tiny_model("gpt2")
    assert torch.equal(state, torch.random.get_rng_state())


def test_unknown_kind_lists_the_known_ones():
    with pytest.raises(SpecError, match=r"'opt'.*llama.*vit"):
        tiny_model("opt")
