"""The short way to a kernel computes what the operator does, and follows every change of a layer."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hfquant import ops
from hfquant.binding import Binding, is_plain
from hfquant.blocks import Blocks
from hfquant.kernel import use_kernel
from hfquant.nn import QLinear
from hfquant.qtensor import InputParams
from hfquant.quantize import pack, quantize_linear
from hfquant.recipe import Recipe
from hfquant.spec import InputSpec, Scheme, TensorSpec

INT4 = Recipe(Scheme(TensorSpec("int4", Blocks(1, 16))))
TOKENS = Recipe(Scheme(TensorSpec("int8", Blocks(1, -1)), InputSpec(TensorSpec("int8", Blocks(1, -1)))))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(recipe: Recipe = INT4, bias: bool = True) -> QLinear:
    made = QLinear(64, 24, nn.Parameter(drawn(24, seed=2)) if bias else None, torch.float32)
    made.hold(*pack(quantize_linear(drawn(24, 64), recipe), recipe))
    return made


def by_operator(module: QLinear, x: Tensor) -> Tensor:
    return ops.linear(x, module.packed(), module.bias, module.key)


@pytest.mark.parametrize("recipe", [INT4, TOKENS])
@pytest.mark.parametrize("bias", [True, False])
def test_both_ways_give_the_same(recipe: Recipe, bias: bool) -> None:
    module, x = layer(recipe, bias), drawn(2, 3, 64, seed=1)
    trained = module(x)
    with torch.no_grad():
        assert is_plain(x)
        for _ in range(2):
            assert torch.equal(module(x), by_operator(module, x))
    assert torch.equal(trained, by_operator(module, x)) and trained.requires_grad is bias


@torch.no_grad()
def test_tensors_that_come_to_mean_something_else_are_bound_anew() -> None:
    """The very same codes and scales, on another grid."""
    module, x = layer(), drawn(3, 64, seed=1)
    before = module(x)
    scheme = Scheme(TensorSpec("nf4", Blocks(1, 16)))
    module.hold(dict(zip(module.spec.names, module.packed(), strict=True)), replace(module.spec, scheme=scheme))
    assert torch.equal(module(x), by_operator(module, x)) and not torch.allclose(module(x), before)


@torch.no_grad()
def test_every_change_of_the_layer_is_seen() -> None:
    module, x = layer(), drawn(3, 64, seed=1)
    before = module(x)
    module.weight = drawn(24, 64, seed=5)
    changed = module(x)
    assert torch.equal(changed, by_operator(module, x)) and not torch.allclose(before, changed)
    module.load_state_dict(layer().state_dict())  # in place
    assert torch.equal(module(x), before)
    module._parameters["scale"].data.mul_(2)
    torch.testing.assert_close(module(x) - module.bias, 2 * (before - module.bias))
    assert torch.equal(module.to(torch.bfloat16)(x.bfloat16()), by_operator(module, x.bfloat16()))
    with use_kernel("reference"):
        assert torch.equal(module(x.bfloat16()), by_operator(module, x.bfloat16()))


@torch.no_grad()
def test_a_static_range_that_changes_in_place_is_seen() -> None:
    given = InputSpec(TensorSpec("int8", Blocks(-1, -1)), dynamic=False)
    recipe = Recipe(Scheme(TensorSpec("int8", Blocks(1, -1)), given))
    packed, spec = pack(quantize_linear(drawn(24, 64), recipe), recipe, InputParams(torch.tensor([0.05])))
    module, x = QLinear(64, 24, None, torch.float32), drawn(3, 64, seed=1)
    module.hold(packed, spec)
    before = module(x)
    module._parameters["input_scale"].fill_(0.001)  # clips nearly everything
    after = module(x)
    assert torch.equal(after, by_operator(module, x)) and not torch.allclose(before, after)


@torch.no_grad()
def test_copies_are_bound_to_their_own_weights() -> None:
    module, x = layer(), drawn(3, 64, seed=1)
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), expected)
        other.weight = torch.zeros(24, 64)
        assert torch.equal(other(x), other.bias.expand(3, 24))
    assert torch.equal(module(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("recipe", [INT4, TOKENS])
def test_a_binding_keeps_no_weight_alive(recipe: Recipe) -> None:
    """Offloading replaces the parameters of a layer after every call."""
    module = layer(recipe)
    module(drawn(3, 64))
    held = [weakref.ref(module._parameters[name]) for name in module.packed_names()]
    for name in module.packed_names():
        module._parameters[name] = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


def test_whoever_watches_operators_sees_them() -> None:
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    module, x = layer(bias=False), drawn(3, 64, seed=1)
    with torch.no_grad(), Watch():
        assert not is_plain(x)
        module(x)
    assert "hfquant.linear.default" in seen
    with torch.no_grad():
        rows = torch.func.vmap(lambda row: torch.ones(()) if is_plain(row) else torch.zeros(()))(x)
        assert not rows.any() and not is_plain(nn.Parameter(x))
    assert not is_plain(x)  # gradients are on


def test_kernels_without_a_short_way_go_through_the_operator() -> None:
    module, x = layer(), drawn(3, 64)
    with torch.no_grad(), use_kernel("reference"):
        assert Binding().run(x, module.packed(), None, module.key) is None
