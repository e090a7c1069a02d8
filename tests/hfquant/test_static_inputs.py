"""Static input ranges travel with the packed weight, and define what the layer sees of its input."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hfquant import HfQuantConfig, ops, reference
from hfquant.backend import Backend, register, unregister
from hfquant.blocks import Blocks
from hfquant.errors import CalibrationError, FormatError, SpecError
from hfquant.experts import QExperts, to_packed_experts
from hfquant.histogram import Histogram
from hfquant.input_ranges import absmax, input_params
from hfquant.kernel import REFERENCE
from hfquant.layouts import LAYOUTS, Bytes, unpack, unpack_inputs
from hfquant.nn import QLinear
from hfquant.parallel import kept_whole, why_not_split
from hfquant.qtensor import InputParams, QTensor
from hfquant.quantize import check_recipe, pack, pack_empty, quantize_linear
from hfquant.recipe import Recipe, Step
from hfquant.spec import InputSpec, PackedSpec, Scheme, TensorSpec
from hfquant.stats import Stats
from hfquant.swap import packed_modules
from hfquant.testing.kernel_checks import check_kernel
from hfquant.testing.report import Report
from hfquant.testing.tiny import tiny_inputs, tiny_model
from hfquant.testing.weight_checks import check_weights

TENSOR = Blocks(-1, -1)
ROW = TensorSpec("int8n", Blocks(1, -1))
SYMMETRIC = InputSpec(TensorSpec("int8", TENSOR), dynamic=False)
ASYMMETRIC = InputSpec(TensorSpec("uint8", TENSOR, zero=True), dynamic=False)
BOTH = pytest.mark.parametrize("seen", [SYMMETRIC, ASYMMETRIC], ids=["int8", "uint8"])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ranged(seen: InputSpec, low: float = -1.5, high: float = 2.5) -> InputParams:
    """A range that clips normal values on both sides."""
    return input_params(low, high, seen.tensor)


def packed_weight(seen: InputSpec, rows: int = 6, cols: int = 40, **recipe) -> tuple[list[Tensor], PackedSpec]:
    made = Recipe(Scheme(ROW, seen), **recipe)
    q = quantize_linear(drawn(rows, cols), made, Stats("w", torch.arange(float(cols))))
    packed, spec = pack(q, made, ranged(seen))
    return list(packed.values()), spec


def packed_linear(seen: InputSpec, dtype: torch.dtype = torch.float32, rows: int = 6, cols: int = 40) -> QLinear:
    layer = QLinear(cols, rows, nn.Parameter(drawn(rows, seed=1).to(dtype)), dtype)
    layer.kind = "linear"
    packed, spec = packed_weight(seen, rows, cols)
    layer.hold(dict(zip(spec.names, packed, strict=True)), spec)
    return layer


# Numbers: what the reference computes.


@BOTH
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 6), cols=st.integers(1, 40))
def test_a_static_input_is_an_integer_product(seen: InputSpec, seed: int, tokens: int, cols: int) -> None:
    w, x = drawn(9, cols, seed=seed), drawn(tokens, cols, seed=seed + 1)
    recipe = Recipe(Scheme(ROW, seen))
    q = quantize_linear(w, recipe)
    packed, spec = pack(q, recipe, ranged(seen))
    # Written out from the definition: codes clipped to 8 bits, their 32-bit product, the zero point, both scales.
    low, high = (-128, 127) if seen is SYMMETRIC else (0, 255)
    x_scale, zero = (2.5 / 127, 0) if seen is SYMMETRIC else (4.0 / 255, round(1.5 * 255 / 4))
    x_scale = torch.tensor(x_scale, dtype=torch.float32)
    x_codes = ((x / x_scale).round() + zero).clamp(low, high).to(torch.int32) - zero
    w_codes = q.codes.to(torch.int32) - 127
    accumulated = (x_codes[:, None, :] * w_codes[None, :, :]).sum(-1, dtype=torch.int32)
    expected = accumulated.double() * x_scale.double() * q.scale.double().T
    size = (x_codes.double() * x_scale).abs() @ q.dequantize().double().abs().T
    y = reference.linear(x, list(packed.values()), None, spec)
    assert ((y.double() - expected).abs() <= (cols + 4) * 2**-24 * size).all()


@BOTH
def test_values_beyond_the_range_become_its_ends(seen: InputSpec) -> None:
    params = ranged(seen)
    x = torch.tensor([-1e30, -9.0, 0.0, 9.0, 1e30])
    got = reference.static_round_trip(x, seen.tensor, params)
    zero = 0 if params.zero is None else int(params.zero)
    levels = seen.tensor.numbers().levels()
    ends = [float((level - zero) * params.scale) for level in (levels[0], levels[-1])]
    assert got.tolist() == [ends[0], ends[0], 0.0, ends[1], ends[1]]


@given(st.sampled_from([SYMMETRIC, ASYMMETRIC]), st.integers(0, 10**6))
def test_inside_the_range_values_hardly_move_and_only_once(seen: InputSpec, seed: int) -> None:
    x = drawn(50, seed=seed).clamp(-1.5, 2.5)
    params = ranged(seen)
    got = reference.static_round_trip(x, seen.tensor, params)
    # The rounded zero point moves the grid by up to half a step against the range.
    within = (0.5 if seen is SYMMETRIC else 1.0) * float(params.scale) * (1 + 1e-5)
    assert ((got - x).abs() <= within).all()
    assert torch.equal(reference.static_round_trip(got, seen.tensor, params), got)


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_input_is_seen_in_its_own_tokens_only(seen: InputSpec, bad: float) -> None:
    packed, spec = packed_weight(seen)
    x = drawn(5, 40, seed=1)
    x[3, 9] = bad
    y = reference.linear(x, packed, None, spec)
    assert y[3].isnan().all() and y[[0, 1, 2, 4]].isfinite().all()


@BOTH
def test_no_token_depends_on_another(seen: InputSpec) -> None:
    """Products of one shape are compared: a product of fewer rows may be summed in another order."""
    packed, spec = packed_weight(seen)
    x = drawn(5, 40, seed=1)
    louder = torch.cat([x[:4], 1000 * x[4:]])
    one, other = (reference.linear(v, packed, None, spec) for v in (x, louder))
    assert torch.equal(one[:4], other[:4]) and not torch.equal(one[4], other[4])
    assert reference.linear(x[:0], packed, None, spec).shape == (0, 6)


@BOTH
def test_columns_with_16_bit_weights_are_not_rounded(seen: InputSpec) -> None:
    packed, spec = packed_weight(seen, columns=Step("proxy", {"fraction": 0.1}))
    outliers = unpack(packed, spec).outliers
    x = 100 * drawn(5, 40, seed=1)
    got = reference.quantize_input(x, seen, outliers, ranged(seen))
    kept = outliers.index.long()
    assert kept.numel() == 4 and torch.equal(got[:, kept], x[:, kept])
    rest = torch.tensor([i for i in range(40) if i not in kept.tolist()])
    assert torch.equal(got[:, rest], reference.static_round_trip(x[:, rest], seen.tensor, ranged(seen)))


def test_the_calibrated_batch_gives_the_dynamic_result() -> None:
    x = drawn(5, 40, seed=1)
    hist = Histogram()
    hist.add(x)
    for tensor in (SYMMETRIC.tensor, ASYMMETRIC.tensor):
        dynamic, static = (Recipe(Scheme(ROW, InputSpec(tensor, dynamic))) for dynamic in (True, False))
        q = quantize_linear(drawn(6, 40), static)
        results = []
        for packed, spec in (pack(q, dynamic), pack(q, static, absmax(hist, tensor, "w"))):
            results.append(reference.linear(x, list(packed.values()), None, spec))
        assert torch.equal(*results)


# Storage: the range is packed after the tensors of the layout, and none of its business.


@BOTH
@pytest.mark.parametrize("layout", ["bytes", "dense"])
def test_pack_and_unpack_are_inverses(seen: InputSpec, layout: str) -> None:
    weight = TensorSpec("uint4", Blocks(1, 8), zero=True)
    recipe, params = Recipe(Scheme(weight, seen), layout=layout), ranged(seen)
    q = quantize_linear(drawn(6, 40), recipe)
    packed, spec = pack(q, recipe, params)
    own = tuple(LAYOUTS.get(layout).pack(q))
    assert spec.names == (*own, "input_scale", *(["input_zero"] if seen is ASYMMETRIC else []))
    assert PackedSpec.parse(spec.key()) == spec
    assert unpack_inputs(list(packed.values()), spec) == params
    restored = unpack(list(packed.values()), spec)
    assert torch.equal(restored.codes, q.codes) and torch.equal(restored.zero, q.zero)
    empty, planned = pack_empty(q.shape, recipe, torch.float32)
    assert planned == spec and all(value.is_meta for value in empty.values())
    assert {k: (v.shape, v.dtype) for k, v in empty.items()} == {k: (v.shape, v.dtype) for k, v in packed.items()}
    rows = LAYOUTS.get(layout).rows(packed, torch.tensor([4, 1]), q.shape, weight)
    assert torch.equal(rows, q.dequantize()[[4, 1]])
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_range_is_given_where_it_is_needed_and_nowhere_else() -> None:
    q = quantize_linear(drawn(6, 40), Recipe(Scheme(ROW)))
    assert unpack_inputs(*first(pack(q, Recipe(Scheme(ROW))))) is None
    with pytest.raises(CalibrationError, match="needs the range that calibration found"):
        pack(q, Recipe(Scheme(ROW, SYMMETRIC)))
    with pytest.raises(SpecError, match="a range with a zero point does not fit"):
        pack(q, Recipe(Scheme(ROW, SYMMETRIC)), ranged(ASYMMETRIC))
    with pytest.raises(SpecError, match="a range without a zero point does not fit"):
        pack(q, Recipe(Scheme(ROW, ASYMMETRIC)), ranged(SYMMETRIC))
    for other in (None, InputSpec(SYMMETRIC.tensor)):
        with pytest.raises(SpecError, match="not quantized, or that has its ranges at run time"):
            pack(q, Recipe(Scheme(ROW, other)), ranged(SYMMETRIC))


def first(made: tuple[dict[str, Tensor], PackedSpec]) -> tuple[list[Tensor], PackedSpec]:
    return list(made[0].values()), made[1]


def test_a_weight_whose_range_is_lost_is_refused() -> None:
    packed, spec = packed_weight(SYMMETRIC)
    with pytest.raises(FormatError, match="no input_scale"):
        unpack_inputs(packed[:-1], replace(spec, names=spec.names[:-1]))


class Picky(Bytes):
    """A layout that would break on tensors which are none of its own."""

    name = "picky"

    def unpack(self, packed: dict[str, Tensor], shape: tuple[int, int], spec: TensorSpec) -> QTensor:
        assert set(packed) == {"codes", "scale"}
        return super().unpack(packed, shape, spec)


def test_a_layout_never_sees_the_range() -> None:
    backend = Backend("picky", layouts=(Picky(),))
    register(backend, "here")
    try:
        packed, spec = packed_weight(ASYMMETRIC, layout="picky")
        assert len(packed) == 4 and unpack(packed, spec).shape == (6, 40)
    finally:
        unregister(backend, "here")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Step("absmaxx"), "unknown input range 'absmaxx'. Did you mean 'absmax'"),
        (Step("mse", {"stepz": 3}), "input range 'mse' has no option 'stepz': its options are steps"),
        (Step("percentile", {"percentile": "high"}), "option 'percentile' is a number like 99.99, got 'high'"),
        (Step("percentile", {"percentile": 3}), "above 50 and at most 100"),
    ],
)
def test_recipes_are_checked_before_long_work(step: Step, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_recipe(Recipe(Scheme(ROW, SYMMETRIC), input_range=step))
    with pytest.raises(SpecError, match="'kl' is for evenly spaced levels"):
        fp8 = InputSpec(TensorSpec("e4m3fn", TENSOR), dynamic=False)
        check_recipe(Recipe(Scheme(ROW, fp8), input_range=Step("kl")))


def test_a_plugins_input_range_is_recorded_in_checkpoints(monkeypatch) -> None:
    """Else a machine without the plugin could not say what to install."""
    asked = []
    monkeypatch.setattr("hfquant.config.provider", lambda table, name: asked.append((table.axis, name)))
    HfQuantConfig("int8")
    assert ("input range", "absmax") in asked


@BOTH
def test_the_conformance_checks_know_static_inputs(seen: InputSpec) -> None:
    report, recipe = Report("core"), Recipe(Scheme(ROW, seen))
    assert check_weights(report, "static", recipe)
    check_kernel(report, REFERENCE, [recipe])
    assert not report.failed
    dynamic = replace(seen, dynamic=True)

    def blind(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: PackedSpec) -> Tensor:
        """A kernel that takes the range from the input instead."""
        return reference.linear(x, packed, bias, replace(spec, scheme=replace(spec.scheme, input=dynamic)))

    check_kernel(report, replace(REFERENCE, name="blind", run=blind), [recipe])
    assert report.failed


# Layers.


@BOTH
def test_moves_copies_and_state_dicts_keep_the_range(seen: InputSpec) -> None:
    layer, x = packed_linear(seen), drawn(5, 40, seed=1)
    names = [name for name in layer.spec.names if name.startswith("input_")]
    assert names and not any(layer._parameters[name].requires_grad for name in names)
    other = packed_linear(seen)
    with torch.no_grad():
        other.codes.zero_(), other.input_scale.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    moved = copy.deepcopy(layer).to(torch.bfloat16)
    for name in names:
        assert moved.state_dict()[name].dtype == layer.state_dict()[name].dtype
        assert torch.equal(moved.state_dict()[name], layer.state_dict()[name])
    assert moved.to("meta").input_scale.is_meta


def test_a_state_dict_of_another_static_input_is_refused() -> None:
    """Both hold one scale: what it means is nowhere in its numbers."""
    layer = packed_linear(SYMMETRIC)
    for other in (replace(SYMMETRIC, tensor=TensorSpec("e4m3fn", TENSOR)), ASYMMETRIC, InputSpec(SYMMETRIC.tensor)):
        if other.dynamic:
            recipe = Recipe(Scheme(ROW, other))
            source = QLinear(40, 6, None, torch.float32)
            source.hold(*pack(quantize_linear(drawn(6, 40), recipe), recipe))
        else:
            source = packed_linear(other)
        with pytest.raises(FormatError, match="quantize both alike"):
            layer.load_state_dict(source.state_dict())


@BOTH
def test_new_weights_leave_the_range_alone(seen: InputSpec) -> None:
    layer = packed_linear(seen)
    before = {name: value.clone() for name, value in layer.state_dict().items() if name.startswith("input_")}
    layer.weight.data = drawn(6, 40, seed=7)
    layer.weight.data += 0.3 * drawn(6, 40, seed=8)
    assert before and all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
    x = drawn(5, 40, seed=1)
    clipped = reference.static_round_trip(x, seen.tensor, ranged(seen))
    torch.testing.assert_close(layer(x), F.linear(clipped, layer.weight, layer.bias))


class Routed(nn.Module):
    """The least that packed experts need of the class they replace."""

    has_gate, has_bias, is_transposed, num_experts = False, False, False, 3

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.ReLU()


@BOTH
def test_each_expert_has_its_own_range(seen: InputSpec) -> None:
    experts, recipe = to_packed_experts(Routed(), torch.float32), Recipe(Scheme(ROW, seen))
    plain: dict[str, list[tuple[Tensor, InputParams]]] = {}
    for projection, shape in (("up_proj", (24, 16)), ("down_proj", (16, 24))):
        parts, plain[projection] = [], []
        for expert in range(3):
            q = quantize_linear(drawn(*shape, seed=expert), recipe)
            params = ranged(seen, -0.5 - expert, 1.0 + expert)
            packed, spec = pack(q, recipe, params)
            parts.append(packed)
            plain[projection].append((q.dequantize(), params))
        experts.hold(projection, {name: torch.stack([part[name] for part in parts]) for name in spec.names}, spec)
    assert experts.up_proj_input_scale.shape == (3, 1)
    assert {"up_proj_input_scale", "down_proj_input_scale"} <= set(experts.state_dict())
    assert torch.equal(experts.dequantize("up_proj", torch.float32)[1], plain["up_proj"][1][0])
    x = 3 * drawn(7, 16, seed=9)
    index = torch.tensor([[0], [1], [2], [2], [1], [0], [1]])
    expected = []
    for token, expert in enumerate(index[:, 0].tolist()):
        hidden = x[token]
        for projection in ("up_proj", "down_proj"):
            w, params = plain[projection][expert]
            hidden = F.linear(reference.static_round_trip(hidden, seen.tensor, params), w)
            hidden = hidden.relu() if projection == "up_proj" else hidden
        expected.append(hidden)
    before = {name: value.clone() for name, value in experts.state_dict().items()}
    torch.testing.assert_close(experts(x, index, torch.ones(7, 1)), torch.stack(expected), rtol=1e-4, atol=1e-4)
    experts.to(torch.bfloat16)
    assert all(torch.equal(experts.state_dict()[name], value) for name, value in before.items())


@BOTH
@pytest.mark.parametrize("style", ["colwise", "rowwise"])
def test_ranks_share_the_range(seen: InputSpec, style: str) -> None:
    """The oracle is the uncut layer: a rank of "rowwise" sees half of the features, with the same range."""
    recipe = Recipe(Scheme(TensorSpec("int8n", TENSOR), seen))
    q = quantize_linear(drawn(32, 64), recipe)
    packed, spec = pack(q, recipe, ranged(seen))
    whole = QLinear(64, 32, None, torch.float32)
    whole.hold(packed, spec)
    assert why_not_split(whole, style, 2) is None
    kept, x, parts = kept_whole(spec, style), drawn(5, 64, seed=1), []
    assert {name for name in spec.names if name.startswith("input_")} <= set(kept)
    axis = 0 if style == "colwise" else 1
    for rank in range(2):
        cut = [value if name in kept else value.chunk(2, axis)[rank] for name, value in packed.items()]
        part = replace(spec, shape=(16, 64) if axis == 0 else (32, 32))
        parts.append(reference.linear(x if axis == 0 else x.chunk(2, 1)[rank], cut, None, part))
    joined = torch.cat(parts, 1) if axis == 0 else parts[0] + parts[1]
    torch.testing.assert_close(joined, whole(x), rtol=1e-5, atol=1e-4)


@settings(max_examples=3)
@given(st.sampled_from([SYMMETRIC, ASYMMETRIC]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_opcheck(seen: InputSpec, dtype: torch.dtype) -> None:
    packed, spec = packed_weight(seen)
    x, bias = drawn(2, 3, 40, seed=1).to(dtype).requires_grad_(), drawn(6).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.hfquant.linear.default, (x, packed, bias, spec.key()))
    torch.library.opcheck(torch.ops.hfquant.dequantize.default, (packed, spec.key(), dtype))
    torch.library.opcheck(torch.ops.hfquant.input_grad.default, (drawn(3, 6).to(dtype), packed, spec.key()))


@BOTH
def test_the_gradient_passes_straight_through(seen: InputSpec) -> None:
    packed, spec = packed_weight(seen)
    x, grad = drawn(5, 40, seed=1).requires_grad_(), drawn(5, 6, seed=2)
    ops.linear(x, packed, None, spec.key()).backward(grad)
    torch.testing.assert_close(x.grad, grad @ unpack(packed, spec).dequantize())


@BOTH
def test_a_layer_compiles_and_exports_as_one_graph(seen: InputSpec) -> None:
    torch.compiler.reset()
    layer = packed_linear(seen)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    program = torch.export.export(
        layer, (drawn(4, 40),), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=64)},), strict=True
    )
    for tokens in (3, 17):
        x = drawn(tokens, 40, seed=tokens)
        assert torch.equal(compiled(x), layer(x)) and torch.equal(program.module()(x), layer(x))
    torch.compiler.reset()


@BOTH
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_checkpoint_gives_the_same_bits_again(tmp_path, kind: str, seen: InputSpec) -> None:
    source = tiny_model(kind, dtype=torch.bfloat16)
    source.save_pretrained(tmp_path / "source")
    config = HfQuantConfig("int8", modules_to_not_convert=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config)
    with torch.no_grad():
        free = model(**tiny_inputs(model)).logits
    give_ranges(model, seen)
    with torch.no_grad():
        expected = model(**tiny_inputs(model)).logits
    assert not torch.equal(expected, free)
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert {n: v.dtype for n, v in again.state_dict().items()} == {n: v.dtype for n, v in model.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs(again)).logits, expected)


def give_ranges(model: nn.Module, seen: InputSpec) -> None:
    """Turn a model with quantized weights into one with static inputs too, each with a range of its own."""
    config = model.hf_quantizer.quantization_config
    config.recipe = replace(config.recipe, scheme=replace(config.recipe.scheme, input=seen))
    for number, (_, module) in enumerate(packed_modules(model)):
        specs = module.specs if isinstance(module, QExperts) else {"": module.spec}
        for leaf, spec in list(specs.items()):
            held = {name: module._parameters[f"{leaf}_{name}" if leaf else name] for name in spec.names}
            experts = held["codes"].shape[0] if leaf else 0
            params = [ranged(seen, -1 - number / 7 - expert / 5, 2.0) for expert in range(max(experts, 1))]
            scale = torch.stack([p.scale for p in params]) if experts else params[0].scale
            held["input_scale"] = scale
            if seen.tensor.zero:
                held["input_zero"] = torch.stack([p.zero for p in params]) if experts else params[0].zero
            made = replace(spec, scheme=replace(spec.scheme, input=seen), names=tuple(held))
            module.hold(*([leaf] if leaf else []), {name: value.data for name, value in held.items()}, made)
