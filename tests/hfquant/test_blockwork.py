"""Running a block without values finds what running it with values does: the same inputs, the same operations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hfquant.blockwork import block_works
from hfquant.chain import calls, find_chain
from hfquant.coverage import survey
from hfquant.data import stand_in
from hfquant.matrices import is_experts, trace
from hfquant.source import empty_model
from hfquant.testing.tiny import KINDS, tiny_model

EXPERTS = ("mixtral", "qwen3_moe")


def works(kind, targets=None):
    """The work of a tiny model's blocks, the model with values, its chain, targets and batch."""
    model = tiny_model(kind)
    model.config.architectures = [type(model).__name__]
    chosen = [target.name for target in survey(model, None, False)[0]] if targets is None else targets
    batch = dict(stand_in(model.config)[0])
    if "input_ids" in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    empty = empty_model(model.config, torch.float32)
    nowhere = {name: value.to("meta") for name, value in batch.items()}
    return block_works(empty, find_chain(empty), chosen, nowhere), model, chosen, batch


@torch.no_grad()
def with_values(model, chosen, batch):
    """Inputs and outputs of the groups of the first block, and its operations, from a run with values."""
    model.set_attn_implementation("eager")  # the operations of fused attention on a CPU are not counted
    chain = find_chain(model)
    tupled = model.config.model_type in ("gpt2", "bert")
    every, hidden = calls(model, chain, batch, tupled)
    groups = trace(chain.names()[0], chain.holder[0], chosen, lambda: every[0].run(chain.holder[0], hidden))
    with FlopCounterMode(display=False) as counter:
        every[0].run(chain.holder[0], hidden)
    return groups, counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_matrices_are_those_of_a_run_with_values(kind):
    found, model, chosen, batch = works(kind)
    groups, _ = with_values(model, chosen, batch)
    shapes = [(group.features, [matrix.values().shape[0] for matrix in group.targets]) for group in groups]
    seen = [(r.features, r.rows) for r in found[0].readings for _ in range(r.copies)]
    assert seen == [shape for shape in shapes if shape[1]]
    assert len(found) == len(find_chain(model).holder)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in EXPERTS])
def test_operations_are_those_of_a_run_with_values(kind):
    found, model, chosen, batch = works(kind)
    assert found[0].flops == with_values(model, chosen, batch)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_operations_before_an_input_only_grow(kind):
    readings = works(kind)[0][0].readings
    before = [reading.before for reading in readings]
    assert before == sorted(before) and before[0] == 0 and before[-1] < works(kind)[0][0].flops


def test_operations_of_a_llama_block_in_closed_form():
    found, model, _, batch = works("llama")
    config, (samples, length) = model.config, batch["input_ids"].shape
    size = sum(p.numel() for name, p in model.model.layers[0].named_parameters() if p.dim() == 2)
    scores = 2 * 2 * samples * length**2 * config.num_attention_heads * config.head_dim
    assert found[0].flops == 2 * samples * length * size + scores
    assert found[0].bytes == 4 * sum(p.numel() for p in model.model.layers[0].parameters())


def test_a_llama_block_runs_its_attention_once_and_half_of_its_mlp_again():
    found, model, _, batch = works("llama")
    tokens, attention = batch["input_ids"].numel(), model.model.layers[0].self_attn
    mlp = 2 * tokens * sum(p.numel() for p in model.model.layers[0].mlp.parameters())
    assert found[0].settled() == found[0].flops - mlp
    last = 2 * tokens * attention.o_proj.weight.numel()
    assert found[0].gathering() == (found[0].settled() - last) + last + mlp * 2 / 3
    assert [reading.ends for reading in found[0].readings] == [False, True, False, True]


def test_a_bert_block_runs_its_attention_twice():
    found, model, _, batch = works("bert")
    layer, tokens = model.bert.encoder.layer[0], batch["input_ids"].numel()
    first, second = (2 * tokens * matrix.weight.numel() for matrix in (layer.intermediate.dense, layer.output.dense))
    assert found[0].settled() == found[0].flops - first - second
    end = 2 * tokens * layer.attention.output.dense.weight.numel()
    assert found[0].gathering() == (found[0].settled() - end) + found[0].settled() + first


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_share_the_tokens_that_the_router_sends_out(kind):
    found, model, _, batch = works(kind)
    chosen, tokens = model.config.num_experts_per_tok, batch["input_ids"].numel()
    banks = [reading for reading in found[0].readings if reading.copies > 1]
    assert len(banks) == 2 and all(r.copies * r.tokens == chosen * tokens for r in banks)
    up, down = banks
    assert down.before - up.before == 2 * chosen * tokens * up.rows[0] * up.features
    bank = next(module for module in find_chain(model).holder[0].modules() if is_experts(module))
    assert "forward" not in vars(bank)


def test_only_targets_are_noted():
    found, model, *_ = works("llama", ["model.layers.1.mlp.down_proj"])
    assert found[0].readings == [] and [r.features for r in found[1].readings] == [model.config.intermediate_size]
