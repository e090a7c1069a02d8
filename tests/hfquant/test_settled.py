"""What is settled runs once, and nobody can tell from the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfquant import HfQuantConfig
from hfquant.blockquantizer import BlockQuantizer
from hfquant.calibrate import Calibration
from hfquant.calibration_state import FOLLOWED, Settings
from hfquant.coverage import survey
from hfquant.hidden import HiddenStates
from hfquant.matrices import trace
from hfquant.settled import Settled, find_ends
from hfquant.swap import packed_modules
from hfquant.testing.tiny import KINDS, tiny_inputs, tiny_model

METHODS = {
    "weights": {"method": "gptq", "bits": 3, "group_size": 16},
    "inputs too": {"method": "w8a8", "dynamic": False},
}


def calibrate(model: nn.Module, batches: int = 3, settings: Settings | None = None, **options: Any) -> tuple[Any, list]:
    """A calibrated model's packed tensors and findings."""
    config = HfQuantConfig(**options)
    targets, _ = survey(model, None, False)
    inputs = [tiny_inputs(model, seed) for seed in range(batches)]
    findings = Calibration(model, targets, config, inputs, None, settings).run()
    packed = {
        f"{name}.{leaf}": module._parameters[leaf]
        for name, module in packed_modules(model)
        for leaf in module.packed_names()
    }
    return packed, findings


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_errors_are_those_of_running_everything_again(
    kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(min_tokens=1)
    found, findings = calibrate(tiny_model(kind), settings=settings, **METHODS[method])
    monkeypatch.setattr(BlockQuantizer, "settle", lambda self, groups: None)
    expected, others = calibrate(tiny_model(kind), settings=settings, **METHODS[method])
    assert found.keys() == expected.keys() and found
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert [block.error for block in findings] == [block.error for block in others]


def runs(kind: str, name: str, batches: int = 3) -> int:
    """How often a module runs to its end for each batch, besides to trace the block and in the original one."""
    model, count = tiny_model(kind), [0]
    model.get_submodule(name).register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    calibrate(model, batches, **METHODS["weights"])
    followed = -(-FOLLOWED // next(iter(tiny_inputs(model).values())).shape[0])
    left = count[0] - 1 - min(followed, batches)
    assert left % batches == 0
    return left // batches


def test_an_attention_that_ends_with_a_matrix_runs_once() -> None:
    assert runs("llama", "model.layers.1.self_attn.q_proj") == 1
    assert runs("llama", "model.layers.1.mlp.gate_proj") == 2  # for down_proj's statistics, and with all of the block


def test_an_attention_that_ends_otherwise_runs_once_more() -> None:
    # BERT's adds the residual and normalizes.
    assert runs("bert", "bert.encoder.layer.1.attention.self.query") == 2


class Part(nn.Module):
    """A matrix, and what comes after it."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.a, self.b, self.answer = nn.Linear(4, 4), nn.Linear(4, 4), answer

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x))
        return {"tensor": y, "tuple": (y, None), "changed": y + 1, "weights": (y, x), "wide": y.repeat(1, 1, 2)}[
            self.answer
        ]


class Block(nn.Module):
    """Writes into what its part gives it, as some models do."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.part, self.c = Part(answer), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        y = y[0] if isinstance(y, tuple) else y
        return self.c(y[..., :4].mul_(2))


@torch.no_grad()
@pytest.mark.parametrize(
    ("answer", "kept_early", "kept"),
    [
        ("tensor", True, True),
        ("tuple", True, True),
        ("changed", False, True),
        ("weights", False, False),  # somebody may want what else it gives
        ("wide", False, False),  # more than the hidden states
    ],
)
def test_what_is_kept_and_when(answer: str, kept_early: bool, kept: bool) -> None:
    torch.manual_seed(0)
    block, x, outputs = Block(answer), torch.randn(2, 3, 4), HiddenStates()
    with find_ends(block) as ends:
        groups = trace("block", block, {"block.part.a", "block.part.b", "block.c"}, lambda: block(x))
    settled = Settled(block, groups, ends, outputs)
    ran: list[int] = []
    block.part.a.register_forward_hook(lambda *_: ran.append(1))

    def run() -> Tensor:
        with settled.instead(0, x, keep=True):
            return block(x)

    expected = run()
    assert 0 not in outputs
    settled.finish(groups[:1])
    for done in range(2):
        assert torch.equal(run(), expected)
        assert (0 in outputs) == (kept_early if done == 0 else kept)
        if done == 0:
            block.part.b.weight.mul_(0.5)  # the matrix gets its final values only now
            expected = block(x)
            settled.finish(groups[1:2])
    ran.clear()
    assert torch.equal(run(), expected) and torch.equal(run(), expected)
    assert len(ran) == (0 if kept else 2)
    assert isinstance(block.part, Part)


def test_a_block_without_a_part_runs_as_it_is() -> None:
    block, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(1, 2, 4)
    settled = Settled(block, [], {}, HiddenStates())
    with settled.instead(0, x, keep=True):
        assert torch.equal(block(x), block(x))


def test_the_original_follows_the_same_batches_for_any_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def followed(samples: int, batches: int, **options: Any) -> list[int]:
        found = []
        for rank in range(world):
            monkeypatch.setattr("hfquant.processes.rank", lambda rank=rank: rank)
            model = tiny_model("llama")
            inputs = [{"input_ids": torch.zeros(samples, 5, dtype=torch.int64)}] * batches
            config = HfQuantConfig("gptq", data=torch.zeros(1, 1, dtype=torch.int64), **options)
            run = Calibration(model, survey(model, None, False)[0], config, inputs)
            found += [number * world + rank for number in run.state.followed]
        return sorted(found)

    for world in (1, 2, 3):
        monkeypatch.setattr("hfquant.processes.world", lambda world=world: world)
        assert followed(1, 9) == [0, 1, 2, 3] and followed(3, 9) == [0, 1] and followed(16, 3) == [0]
        assert followed(1, 9, gptaq=0.5) == list(range(9))
