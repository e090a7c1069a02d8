"""Which matrices of a block read the same input, and which tokens of it are counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfquant.chain import find_chain, first_call
from hfquant.errors import CalibrationError
from hfquant.matrices import Enough, Group, find_matrices, tokens, trace, watch
from hfquant.stats import HESSIAN, InputStats
from hfquant.testing.tiny import EXPERTS, HIDDEN, KINDS, RAGGED, tiny_inputs, tiny_model

ATTENTION = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
GATED = [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
ROUTED = [
    ["mlp.gate"],
    *([f"mlp.experts.gate_up_proj[{expert}]"] for expert in range(EXPERTS)),
    *([f"mlp.experts.down_proj[{expert}]"] for expert in range(EXPERTS)),
]
BERT = [[f"attention.self.{name}" for name in ("query", "key", "value")], ["attention.output.dense"]]
# Which inputs there are follows from the papers of the architectures, in the order of computation.
EXPECTED = {
    "llama": [*ATTENTION, *GATED],
    "qwen3": [*ATTENTION, *GATED],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "bert": [*BERT, ["intermediate.dense"], ["output.dense"]],
    "vit": [
        [f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj")],
        ["attention.o_proj"],
        ["mlp.fc1"],
        ["mlp.fc2"],
    ],
    "mixtral": [*ATTENTION, *ROUTED],
    "qwen3_moe": [*ATTENTION, *ROUTED],
}


def exact_model(kind: str) -> PreTrainedModel:
    """In float64 and with plain attention and experts, so that every way to compute something gives the same."""
    model = tiny_model(kind, dtype=torch.float64)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def traced(model: PreTrainedModel, targets: frozenset[str] = frozenset()) -> list[Group]:
    chain = find_chain(model)
    call, hidden = first_call(model, chain, tiny_inputs(model))
    name = chain.names()[0]
    return trace(name, chain.holder[0], targets, lambda: call.run(chain.holder[0], hidden))


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_of_one_input_are_one_group(kind: str) -> None:
    model = tiny_model(kind)
    prefix = f"{find_chain(model).names()[0]}."
    found = [[matrix.name.removeprefix(prefix) for matrix in group.matrices] for group in traced(model)]
    assert found == EXPECTED[kind]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_read_what_the_router_reads(kind: str) -> None:
    groups = {group.name.partition(".mlp.")[2]: group for group in traced(tiny_model(kind))}
    first = {groups[f"experts.gate_up_proj[{expert}]"].source for expert in range(EXPERTS)}
    assert first == {groups["gate"].source}
    second = {groups[f"experts.down_proj[{expert}]"].source for expert in range(EXPERTS)}
    assert len(second) == EXPERTS and not second & first


def test_only_what_is_asked_for_is_a_target() -> None:
    model = tiny_model("mixtral")
    name = "model.layers.0.mlp.experts"
    found = [matrix.name for group in traced(model, frozenset({name})) for matrix in group.targets]
    assert found == [f"{name}.{part}[{e}]" for part in ("gate_up_proj", "down_proj") for e in range(EXPERTS)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mixtral"])
@torch.no_grad()
def test_a_matrix_computes_what_its_module_does(kind: str) -> None:
    """y = x W^T + b for what the group's input was, GPT-2's transposed weights included."""
    model = exact_model(kind)
    chain = find_chain(model)
    call, hidden = first_call(model, chain, tiny_inputs(model))
    groups = [group for group in traced(model) if group.matrices[0].expert is None]
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    hooks = [
        matrix.module.register_forward_hook(lambda m, args, out, name=matrix.name: outputs.update({name: out}))
        for group in groups
        for matrix in group.matrices
    ]
    with watch(groups, lambda group, x: inputs.update({group.name: x}), lambda: None, stop=False):
        call.run(chain.holder[0], hidden)
    for hook in hooks:
        hook.remove()
    for group in groups:
        assert inputs[group.name].shape[1] == group.features
        for matrix in group.matrices:
            bias = matrix.bias()
            y = inputs[group.name] @ matrix.values().T + (0 if bias is None else bias)
            out = outputs[matrix.name]
            if isinstance(out, tuple):  # a router
                continue
            torch.testing.assert_close(y, out.reshape(y.shape))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@torch.no_grad()
def test_experts_see_their_tokens_and_compute_the_same(kind: str) -> None:
    """Each expert's tokens are those that the router sends to it; running them one by one changes nothing."""
    model = exact_model(kind)
    chain = find_chain(model)
    call, hidden = first_call(model, chain, tiny_inputs(model))
    bank = chain.holder[0].mlp.experts
    arguments: list[tuple[Tensor, ...]] = []
    results: list[Tensor] = []
    hooks = [
        bank.register_forward_pre_hook(lambda module, args: arguments.append(args)),
        bank.register_forward_hook(lambda module, args, out: results.append(out)),
    ]
    groups = [group for group in traced(model) if group.matrices[0].expert is not None]
    arguments.clear(), results.clear()
    original = type(bank)
    call.run(chain.holder[0], hidden)
    found: dict[str, Tensor] = {}
    with watch(groups, lambda group, x: found.update({group.name.rpartition(".")[2]: x}), lambda: None, stop=False):
        call.run(chain.holder[0], hidden)
    for hook in hooks:
        hook.remove()
    assert type(bank) is original and "seen" not in vars(bank)
    torch.testing.assert_close(results[0], results[1])
    x, chosen, _ = arguments[0]
    for expert in range(EXPERTS):
        sent = (chosen == expert).any(1)
        assert torch.equal(found[f"gate_up_proj[{expert}]"], x[sent])
        gate, up = (x[sent] @ bank.gate_up_proj[expert].T).chunk(2, dim=-1)
        torch.testing.assert_close(found[f"down_proj[{expert}]"], nn.functional.silu(gate) * up)
    assert sum(len(found[f"down_proj[{expert}]"]) for expert in range(EXPERTS)) == chosen.numel()


def test_a_matrix_of_an_expert_is_a_view_of_the_bank() -> None:
    model = tiny_model("mixtral")
    bank = model.model.layers[0].mlp.experts
    matrices = find_matrices("experts", bank, frozenset({"experts"}))
    matrices[1].values().data.zero_()
    assert not bank.gate_up_proj[1].any() and bank.gate_up_proj[0].any()


def test_embeddings_norms_and_convolutions_are_no_matrices() -> None:
    for module in (nn.Embedding(4, 3), nn.LayerNorm(3), nn.Conv2d(3, 3, 2)):
        assert find_matrices("m", module, frozenset({"m"})) == []


def test_a_layer_that_is_called_twice_belongs_to_its_first_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x)))

    block = Twice()
    groups = trace("", block, frozenset({"a", "b"}), lambda: block(torch.ones(2, 3)))
    assert [[matrix.name for matrix in group.matrices] for group in groups] == [["a"], ["b"]]
    counted: list[int] = []
    with watch(groups[:1], lambda group, x: counted.append(len(x)), lambda: None, stop=False):
        block(torch.ones(2, 3))
    assert counted == [2, 2]


def test_equal_values_in_another_tensor_are_another_input() -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.clone()) + self.c(x.reshape(1, 2, 3))  # the last one is a view

    block = Copies()
    groups = trace("block", block, frozenset(), lambda: block(torch.ones(2, 3)))
    assert [[m.name for m in group.matrices] for group in groups] == [["block.a", "block.c"], ["block.b"]]


def test_the_run_ends_when_every_group_has_been_reached() -> None:
    block = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    groups = trace("", block, frozenset(), lambda: block(torch.ones(2, 3)))
    reached: list[str] = []
    last = block[2].register_forward_pre_hook(lambda module, args: reached.append("the end"))
    with pytest.raises(Enough), watch(groups[:2], lambda group, x: reached.append(group.name), lambda: None, stop=True):
        block(torch.ones(2, 3))
    assert reached == ["0", "1"]
    last.remove()
    assert not any(module._forward_pre_hooks for module in block)


# Padding.


def test_padding_is_no_token() -> None:
    x, mask = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert tokens(x, mask, "layer").tolist() == [[0, 1], [2, 3], [6, 7]]
    assert tokens(x.reshape(6, 2), mask, "layer").tolist() == [[0, 1], [2, 3], [6, 7]]
    assert len(tokens(x, None, "layer")) == 6


def test_one_vector_a_sample_has_no_padding() -> None:
    assert len(tokens(torch.ones(2, 5), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), "pooler")) == 2


def test_positions_that_cannot_be_told_raise_with_the_name_of_the_layer() -> None:
    with pytest.raises(CalibrationError, match=r"layers\.0\.conv sees \(2, 7, 4\).*\(2, 3\).*packing=True"):
        tokens(torch.ones(2, 7, 4), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), "layers.0.conv")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mixtral"])
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_a_padded_batch_counts_as_its_samples_do(kind: str, side: str) -> None:
    """In float64, so that what is left of padding would stand out."""
    if kind == "bert" and side == "left":
        side = "both"  # its positions are learned: they are given below as well
    model = exact_model(kind)
    lengths, width = (9, 13, 4), 13
    generator = torch.Generator().manual_seed(5)
    samples = [torch.randint(3, 256, (length,), generator=generator) for length in lengths]
    padded, mask = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
    positions = torch.zeros(3, width, dtype=torch.int64)
    for row, sample in enumerate(samples):
        free = width - len(sample)
        start = {"right": 0, "left": free, "both": free // 2}[side]
        place = slice(start, start + len(sample))
        padded[row, place], mask[row, place], positions[row, place] = sample, 1, torch.arange(len(sample))
    together = counted(model, [{"input_ids": padded, "attention_mask": mask, "position_ids": positions}])
    alone = counted(model, [{"input_ids": sample[None]} for sample in samples])
    assert together.keys() == alone.keys()
    if kind == "mixtral":
        assert sum(alone[f"model.layers.0.mlp.experts.gate_up_proj[{e}]"].tokens for e in range(EXPERTS)) == 2 * sum(
            lengths
        )
    for name, stats in alone.items():
        other = together[name]
        assert stats.gram is not None and other.gram is not None
        assert stats.tokens == other.tokens, name
        size = stats.square_sum.sqrt()
        assert bool(((stats.gram - other.gram).abs() <= 1e-5 * size[:, None] * size).all()), name
        torch.testing.assert_close(stats.absmax, other.absmax, rtol=1e-5, atol=1e-7)


def counted(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> dict[str, InputStats]:
    """Statistics of every group of the first block over some batches, by its name."""
    chain = find_chain(model)
    groups = traced(model)
    found = {group.name: InputStats(group.features, frozenset({HESSIAN}), group.name) for group in groups}
    for batch in batches:
        call, hidden = first_call(model, chain, batch)
        mask = batch.get("attention_mask")
        keep = None if mask is None else mask.bool()
        with watch(groups, lambda group, x: found[group.name].add(x), lambda keep=keep: keep, stop=False):
            call.run(chain.holder[0], hidden)
    return found


def test_widths_are_those_of_the_weights() -> None:
    widths = {group.name.rpartition(".")[2]: group.features for group in traced(tiny_model("llama"))}
    assert widths == {"q_proj": HIDDEN, "o_proj": HIDDEN, "gate_proj": HIDDEN, "down_proj": RAGGED}
