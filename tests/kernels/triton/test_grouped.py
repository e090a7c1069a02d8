"""All experts in one launch compute what they compute one after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfquant.blocks import Blocks
from hfquant.gpu import experts as gpu_experts
from hfquant.kernel import choose, use_kernel
from hfquant.kernels.triton import grouped
from hfquant.spec import PackedSpec, TensorSpec

from ...hfquant.test_experts import CLASSES, EXPERTS, both, routed
from ..problems import DTYPES, GRIDS, packed, random_weight
from .compiled import TARGETS, recording
from .interpret import interpreted
from .products import as_if_on, assert_near


def experts(
    count: int, shape: tuple[int, int], spec: TensorSpec, layout: str, seed: int
) -> tuple[list[Any], dict[str, torch.Tensor], PackedSpec]:
    """Weights, their packed tensors [E, ...] and what these are."""
    weights = [random_weight(shape, spec, seed + number) for number in range(count)]
    stored = [packed(q, layout) for q in weights]
    names = stored[0][1].names
    tensors = {name: torch.stack([part[place] for part, _ in stored]) for place, name in enumerate(names)}
    return weights, tensors, stored[0][1]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_products(data: st.DataObject) -> None:
    """Every grid, tokens that no expert or one of another rank gets, gathered rows and rows in order."""
    draw = data.draw
    count, top, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 9, 40]))
    shape = draw(st.integers(1, 70)), draw(st.sampled_from([16, 40, 61, 128, 192]))
    grid = draw(st.one_of(st.sampled_from(["uint3", "uint4", "uint8"]), st.sampled_from(GRIDS)))
    blocks = Blocks(draw(st.sampled_from([1, 16, -1])), draw(st.sampled_from([-1, 16, 32, 64])))
    how: Any = draw(st.sampled_from(["float32", "bfloat16", TensorSpec("dyn8", Blocks(1, 64))]))
    zero = grid.startswith("uint") and draw(st.sampled_from([False, True, "float32"]))
    spec = TensorSpec(grid, blocks, zero, how)
    layout = draw(st.sampled_from(["dense", "bytes"])) if spec.numbers().bits < 8 else "bytes"
    seed, dtype = draw(st.integers(0, 2**31)), draw(st.sampled_from(DTYPES))
    weights, tensors, described = experts(count, shape, spec, layout, seed)
    assert grouped.why_not(described) is None
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(count + 1, (tokens, top), generator=generator)
    bias = torch.randn(count, shape[0], generator=generator) if draw(st.booleans()) else None
    in_order = draw(st.booleans())
    x = (torch.randn(tokens * (top if in_order else 1), shape[1], generator=generator) * 0.1).to(dtype)
    with as_if_on(draw(st.sampled_from(["none", "sm_90"]))), interpreted():
        plan = grouped.routing(index, count, dtype)
        y = grouped.project(x, tensors, bias, described, plan, 0 if in_order else top)
    whose = index.flatten()[plan.sorted]
    assert torch.equal(plan.sorted.sort().values, torch.arange(tokens * top)) and (whose.diff() >= 0).all()
    for number in range(count):
        rows = whose == number
        given = x[rows] if in_order else x[plan.sorted[rows] // top]
        assert_near(y[rows], given, weights[number], None if bias is None else bias[number])


def test_what_runs_one_by_one() -> None:
    _, _, spec = experts(1, (16, 48), TensorSpec("int4", Blocks(1, 16)), "dense", 0)
    assert grouped.why_not(spec) is None
    assert "rotated" in grouped.why_not(replace(spec, rotated=True))
    assert "fitted levels" in grouped.why_not(replace(spec, names=(*spec.names, "levels")))
    weight = replace(spec.scheme.weight, blocks=Blocks(1, 12))
    odd = replace(spec, scheme=replace(spec.scheme, weight=weight))
    assert "16 does not divide" in grouped.why_not(odd)


@pytest.mark.parametrize("kind", CLASSES)
def test_experts_of_models(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates, activations, biases, norms, transposed weights, slots of other ranks: as one expert after the other."""
    packed_experts, _ = both(kind, "nf4", group_size=16)
    x, index, weights = routed()
    index[0, 0] = EXPERTS
    with torch.no_grad():
        expected = packed_experts(x, index, weights)
        monkeypatch.setattr(gpu_experts, "can_run", lambda keys, x: True)
        monkeypatch.setattr(packed_experts, "_project", None)
        with interpreted():
            y = packed_experts(x, index, weights)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_when_all_run_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, without gradients, with weights that both kernels take and no other kernel asked for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    keys = {"down_proj": experts(1, (16, 48), TensorSpec("int4", Blocks(1, 16)), "dense", 0)[2].key()}
    gpu, dtype = torch.device("cuda"), torch.bfloat16
    assert gpu_experts.fits(keys, gpu, dtype)
    assert not gpu_experts.fits(keys, torch.device("cpu"), dtype)
    assert not gpu_experts.fits(keys, gpu, torch.float64)
    with use_kernel("reference"):
        assert not gpu_experts.fits(keys, gpu, dtype)
    odd = experts(1, (16, 48), TensorSpec("int4", Blocks(1, 12)), "dense", 0)[2].key()
    assert not gpu_experts.fits({**keys, "up_proj": odd}, gpu, dtype)
    assert not gpu_experts.can_run(keys, torch.zeros(1))
    choose.cache_clear()


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code(target: str) -> None:
    _, tensors, spec = experts(1, (512, 2048), TensorSpec("int4", Blocks(1, 128)), "dense", 0)
    tensors = {name: tensor.expand(8, *tensor.shape[1:]).contiguous() for name, tensor in tensors.items()}
    index = torch.arange(1024).reshape(512, 2) % 8
    with as_if_on(target), recording() as launches:
        plan = grouped.routing(index, 8, torch.bfloat16)
        grouped.project(torch.empty(512, 2048, dtype=torch.bfloat16), tensors, None, spec, plan, 2)
    binary = launches[-1].compile(target)
    assert binary.spilled == 0 and binary.shared <= (64 if target == "gfx942" else 99) << 10
    assert binary.count("HMMA|HGMMA|UTCHMMA|v_mfma.*bf16")
    assert binary.count(r"(LDG|LDGSTS)\.E.*\.128|(global|buffer)_load_dwordx[24]")
    assert not binary.count("I2F|v_cvt_f32_[iu]", binary.loop)
