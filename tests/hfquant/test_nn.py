"""Packed layers behave as the layers they replace: moves, copies, state dicts, hooks, and a weight to write to."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import initialization

from hfquant.blocks import Blocks
from hfquant.errors import FormatError
from hfquant.kernel import use_kernel
from hfquant.nn import QEmbedding, QLinear, adopt
from hfquant.quantize import pack, quantize_linear
from hfquant.recipe import Recipe
from hfquant.requantize import directions, requantize
from hfquant.spec import Scheme, TensorSpec

NESTED = TensorSpec("uint8", Blocks(1, 256))
SPECS = {
    "int4 groups": TensorSpec("int4", Blocks(1, 32), scale="bfloat16"),
    "int8 rows": TensorSpec("int8", Blocks(1, -1)),
    "uint4 ragged": TensorSpec("uint4", Blocks(1, 7), zero=True),
    "nf4 double": TensorSpec("nf4", Blocks(1, 16), scale=NESTED),
    "tiles": TensorSpec("e4m3fn", Blocks(16, 16)),
    "quantile": TensorSpec("quantile4", Blocks(1, 32)),
    "int3 tensor": TensorSpec("int3", Blocks(-1, -1), scale="float16"),
}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_linear(spec: TensorSpec, rows=40, cols=48, dtype=torch.float32, bias=True, layout=None) -> QLinear:
    layer = QLinear(cols, rows, nn.Parameter(drawn(rows, seed=1).to(dtype)) if bias else None, dtype)
    layer.kind = "linear"
    recipe = Recipe(Scheme(spec), layout=layout)
    layer.hold(*pack(quantize_linear(drawn(rows, cols), recipe), recipe))
    return layer


def packed_embedding(spec: TensorSpec, rows=40, cols=48, dtype=torch.float32, padding_idx=None) -> QEmbedding:
    table = QEmbedding(rows, cols, padding_idx, dtype)
    table.kind = "embedding"
    recipe = Recipe(Scheme(spec))
    table.hold(*pack(quantize_linear(drawn(rows, cols), recipe), recipe))
    return table


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def layer(request) -> QLinear:
    return packed_linear(request.param)


def test_is_a_linear_layer_of_its_dequantized_weight(layer):
    assert isinstance(layer, nn.Linear) and not isinstance(layer.weight, nn.Parameter)
    assert layer.weight.shape == (40, 48) and layer.weight.dtype == torch.float32 and not layer.weight.requires_grad
    x = drawn(2, 3, 48)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    with use_kernel("reference"):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_no_parameter_is_called_weight_or_trainable(layer):
    assert "weight" not in layer.state_dict()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"bias"}
    assert set(layer.state_dict()) == {*layer.spec.names, "bias"} and not list(layer.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_changes_the_dtype_of_the_weight_and_not_one_packed_bit(layer, dtype):
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    for name in layer.spec.names:
        after = layer.state_dict()[name]
        assert after.dtype == before[name].dtype and torch.equal(after, before[name])
    layer.to(torch.float32)
    assert layer.weight.dtype == torch.float32


def test_float8_codes_are_moved_and_never_converted():
    layer = packed_linear(SPECS["int8 rows"])
    codes = drawn(40, 48).to(torch.float8_e4m3fn)
    layer._parameters["codes"] = nn.Parameter(codes, requires_grad=False)
    for cast in (layer.half, layer.bfloat16, layer.double, lambda: layer.to(torch.float16)):
        cast()
        assert layer.codes.dtype == torch.float8_e4m3fn
        assert torch.equal(layer.codes.view(torch.uint8), codes.view(torch.uint8))
    assert layer.to("meta").codes.device.type == "meta" and layer.codes.dtype == torch.float8_e4m3fn


def test_marks_on_packed_parameters_survive_a_move(layer):
    layer.codes._is_hf_initialized = True
    layer.to(torch.bfloat16)
    assert layer.codes._is_hf_initialized and not layer.codes.requires_grad


def test_deepcopy_is_equal_and_independent(layer):
    twin = copy.deepcopy(layer)
    before = layer.weight.clone()
    assert torch.equal(twin.weight, before)
    twin.weight.data = torch.zeros_like(before)
    assert torch.equal(layer.weight, before) and not torch.equal(twin.weight, before)


def test_state_dict_round_trip_is_strict_and_exact(layer):
    other = packed_linear(layer.spec.scheme.weight)
    other.weight.data = drawn(40, 48, seed=5)
    assert not torch.equal(other.weight, layer.weight)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other.weight, layer.weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({name: t for name, t in layer.state_dict().items() if not name.startswith("scale")})


def test_a_state_dict_of_other_numbers_is_refused(tmp_path):
    """nf4 and int4 have the same tensors; only the meaning of the codes differs."""
    ours, theirs = (packed_linear(TensorSpec(grid, Blocks(1, 32))) for grid in ("nf4", "int4"))
    assert {n: (t.shape, t.dtype) for n, t in ours.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.state_dict().items()
    }
    torch.save(nn.Sequential(theirs).state_dict(), tmp_path / "theirs.pt")
    before = ours.weight.clone()
    with pytest.raises(FormatError, match=r"0: the state dict holds.*int4.*this layer.*nf4"):
        nn.Sequential(ours).load_state_dict(torch.load(tmp_path / "theirs.pt"))
    assert torch.equal(ours.weight, before)


def test_assigning_data_writes_through(layer):
    new = 3 * drawn(40, 48, seed=2)
    layer.weight.data = new
    written = layer.weight.clone()
    nearest = packed_linear(layer.spec.scheme.weight)
    nearest.hold(*_packed(new, layer.spec.scheme.weight))
    assert (written - new).norm() <= 1.1 * (nearest.weight - new).norm()
    layer.weight = drawn(40, 48)
    assert not torch.equal(layer.weight, written)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda weight, new: weight.data.copy_(new),
        lambda weight, new: weight.copy_(new),
        lambda weight, new: weight.data.mul_(0).add_(new),
        lambda weight, new: weight.data.__setitem__(slice(None), new),
        lambda weight, new: torch.add(new, 0, out=weight.data),
        lambda weight, new: setattr(weight, "data", new),
    ],
    ids=["data.copy_", "copy_", "chained", "item", "out", "assign"],
)
def test_every_way_to_write_counts(change, inference):
    layer, new = packed_linear(SPECS["int8 rows"]), drawn(40, 48, seed=2)
    before = layer.weight.clone()
    with torch.inference_mode(inference):
        change(layer.weight, new)
    assert (
        torch.equal(new, drawn(40, 48, seed=2)) and (layer.weight - new).abs().max() < 0.02 < (before - new).abs().max()
    )


def test_reading_gives_plain_tensors_and_writes_nothing(layer):
    weight, written = layer.weight, []
    weight._write = written.append
    results = [
        weight + 1,
        weight.T,
        weight.double(),
        weight.clone(),
        weight.to(torch.bfloat16),
        weight[0],
        weight.data @ weight.T,
    ]
    results += [F.linear(drawn(2, 48), weight), weight.norm(dim=1), torch.cat([weight, weight])]
    assert all(type(result) is torch.Tensor for result in results) and not written
    weight.clone().add_(1)
    assert not written


def _packed(w: torch.Tensor, spec: TensorSpec):
    recipe = Recipe(Scheme(spec))
    return pack(quantize_linear(w, recipe), recipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_writing_a_weight_its_own_values_changes_nothing(layer, dtype):
    """In 16 bit too, where the view is rounded: an adapter of zeros must not move a code."""
    layer.to(dtype)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.weight.data += 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("size", [0.02, 0.1])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_adding_in_place_keeps_what_a_small_low_rank_change_does(spec, size):
    """Rounding to nearest would lose it: every weight lies on the grid already."""
    layer = packed_linear(spec, 64, 320, bias=False)
    old = layer.weight.clone()
    down, up = drawn(4, 320, seed=3), drawn(64, 4, seed=4)
    delta = up @ down
    delta *= size * old.norm() / delta.norm()
    x = drawn(256, 4, seed=6) @ down  # inputs that the change acts on
    layer.weight.data += delta
    lost = ((layer.weight - old - delta) @ x.T).norm() / (delta @ x.T).norm()
    assert lost < 0.3


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("size", [1e-5, 1e-3, 0.02])
def test_what_a_write_adds_in_noise_it_gains_for_the_change(spec, size):
    """Codes leave the nearest level only in rows where at least half of the squared error within the change goes."""
    layer, delta = packed_linear(spec), size * drawn(40, 2, seed=3) @ drawn(2, 48, seed=4)
    new = layer.weight + delta
    q, v = requantize(new, layer.qtensor()), torch.linalg.svd(delta).Vh[:2].T
    error = q.dequantize() - new
    moved = (error.square().sum(1) > 1.01 * delta.square().sum(1)) & (error.square().sum(1) > 1e-9)
    before, after = (-delta @ v).square().sum(1), (error @ v).square().sum(1)
    same_ranges = torch.equal(q.scale_values(), layer.qtensor().scale_values())
    assert not same_ranges or (after[moved] <= 0.51 * before[moved]).all()


def test_directions_span_the_rows_of_a_low_rank_change():
    down, up = drawn(5, 96), drawn(64, 5, seed=1)
    v = directions(up @ down)
    assert v.shape == (96, 5)
    torch.testing.assert_close(v.T @ v, torch.eye(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(down @ v @ v.T, down, rtol=1e-4, atol=1e-4)
    assert directions(torch.zeros(8, 8)).shape == (8, 0)


def test_transformers_does_not_initialise_a_packed_weight(layer):
    """GPT-2's `_init_weights` reaches for `c_proj.weight` of its blocks after loading."""
    before = layer.weight.clone()
    initialization.normal_(layer.weight, std=0.02)
    initialization.zeros_(layer.weight)
    assert torch.equal(layer.weight, before)


def test_outlier_columns_and_column_order_survive_a_write():
    recipe, w = Recipe(Scheme(SPECS["int8 rows"])), drawn(40, 48)
    q = quantize_linear(w, recipe, columns=torch.tensor([3, 17]))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    shuffled = replace(q, codes=q.codes[:, order], order=order.to(torch.int32))
    assert torch.equal(shuffled.dequantize(), q.dequantize())
    new = 2 * drawn(40, 48, seed=4)
    written = [requantize(new, like) for like in (q, shuffled)]
    assert torch.equal(written[0].dequantize(), written[1].dequantize()) and torch.equal(
        written[1].order, shuffled.order
    )
    assert torch.equal(written[0].dequantize()[:, [3, 17]], new[:, [3, 17]].bfloat16().float())
    assert (written[0].dequantize() - new).abs().max() < 0.05


def test_nan_cannot_be_written(layer):
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="assigned weight holds 48 NaN"):
        layer.weight.data = before.index_fill(0, torch.tensor(3), torch.nan)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("keep", [True, False])
def test_every_kind_of_hook_is_carried_over(keep):
    """Each hook counts; the replacement is called like the original and must run the same ones."""
    old, new = nn.Linear(48, 40), packed_linear(SPECS["int8 rows"])
    calls: list[str] = []
    old.register_forward_pre_hook(lambda m, args: calls.append("pre"))
    old.register_forward_pre_hook(lambda m, args, kwargs: calls.append("pre kwargs"), with_kwargs=True)
    old.register_forward_hook(lambda m, args, out: calls.append("forward"))
    old.register_forward_hook(lambda m, args, kwargs, out: calls.append("forward kwargs"), with_kwargs=True)
    old.register_forward_hook(lambda m, args, out: calls.append("always"), always_call=True)
    old.register_full_backward_pre_hook(lambda m, grad: calls.append("backward pre"))
    old.register_full_backward_hook(lambda m, grad_in, grad_out: calls.append("backward"))
    old.register_state_dict_pre_hook(lambda *args: calls.append("state pre"))
    old.register_state_dict_post_hook(lambda *args: calls.append("state post"))
    old.register_load_state_dict_pre_hook(lambda *args: calls.append("load pre"))
    old.register_load_state_dict_post_hook(lambda *args: calls.append("load post"))
    old.eval() if keep else old.train()

    def use(layer: nn.Module) -> list[str]:
        calls.clear()
        layer(drawn(2, 48).requires_grad_()).sum().backward()
        layer.load_state_dict(layer.state_dict())
        with pytest.raises(RuntimeError):
            layer(drawn(2, 3))
        return list(calls)

    expected = use(old)
    assert len(set(expected)) == 11 and expected.count("always") == 2
    adopt(new, old)
    assert use(new) == expected and new.training is old.training


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@settings(max_examples=12)
@given(rows=st.integers(8, 40), cols=st.integers(5, 48), lead=st.sampled_from([(), (3,), (2, 4), (1, 2, 3), (0, 2)]))
def test_embedding_is_a_lookup_in_the_dequantized_table(spec, rows, cols, lead):
    for padding_idx in (None, 2):
        table = packed_embedding(spec, rows, cols, padding_idx=padding_idx)
        ids = torch.randint(0, rows, lead, generator=torch.Generator().manual_seed(rows))
        assert torch.equal(table(ids), F.embedding(ids, table.weight, padding_idx))
        assert table.padding_idx == padding_idx and isinstance(table, nn.Embedding)


@pytest.mark.parametrize("index", [40, -1, -40])
@pytest.mark.parametrize("spec", ["int4 groups", "tiles"])
def test_embedding_ids_outside_the_table_raise(spec, index):
    with pytest.raises(IndexError):
        F.embedding(torch.tensor([index]), torch.zeros(40, 48))
    with pytest.raises(IndexError):
        packed_embedding(SPECS[spec])(torch.tensor([index]))


def test_a_move_that_fails_leaves_the_weights_in_place(layer):
    before = [tensor.clone() for tensor in layer.packed()]

    def out_of_memory(tensor):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        layer._apply(out_of_memory)
    assert all(torch.equal(now, then) for now, then in zip(layer.packed(), before, strict=True))
