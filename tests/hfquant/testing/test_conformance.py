"""Conformance passes a right backend, and finds each kind of wrong one with the check that is meant for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hfquant import SpecError
from hfquant.backend import Backend, register, unregister
from hfquant.blocks import Blocks
from hfquant.kernel import Kernel
from hfquant.layouts import Bytes, unpack
from hfquant.presets import kbit
from hfquant.ranges import absmax
from hfquant.recipe import Recipe, Step
from hfquant.rounders import nearest
from hfquant.spec import InputSpec, Scheme, TensorSpec
from hfquant.testing import ConformanceError, Report, conformance
from hfquant.testing.model_checks import reload

WEIGHT_ONLY = Recipe(Scheme(TensorSpec("int8", Blocks(1, 32))))
QUANTIZED_INPUT = Recipe(Scheme(TensorSpec("int8", Blocks(1, -1)), InputSpec(TensorSpec("int8", Blocks(1, -1)))))


@contextmanager
def registered(name: str, recipe: Recipe = WEIGHT_ONLY, **parts: Any) -> Iterator[None]:
    """A backend with one method of its own name, for the length of a block."""
    backend = Backend(name, presets={name: lambda: recipe}, **parts)
    register(backend, "test")
    try:
        yield
    finally:
        unregister(backend, "test")


def failures(name: str, **options: Any) -> set[str]:
    """Names of the checks that fail."""
    with pytest.raises(ConformanceError) as caught:
        conformance(name, **{"models": (), **options})
    report = caught.value.report
    for check in report.failed:
        assert f"{check.subject}: {check.name}: {check.why}" in str(caught.value)
    return {check.name for check in report.failed}


# What is wrong


class Fault(Bytes):
    """One code per byte."""

    name = "fault"


class WrongUnpack(Fault):
    def decode(self, stored: Tensor, grid: Any, count: int) -> Tensor:
        return stored.flip(1)


class WrongLevels(Fault):
    def levels_of_bytes(self, grid: Any) -> Tensor:
        return Bytes().levels_of_bytes(grid).roll(1)  # type: ignore[union-attr]


class ForgetsLastColumn(Fault):
    def encode(self, codes: Tensor, grid: Any) -> Tensor:
        return codes[:, : codes.shape[1] // 2 * 2]  # right as long as K is even

    def decode(self, stored: Tensor, grid: Any, count: int) -> Tensor:
        return F.pad(stored, (0, count - stored.shape[1]))


class LooksAtValues(Fault):
    def encode(self, codes: Tensor, grid: Any) -> Tensor:
        return codes.clamp_max(int(codes.max()))  # meta tensors have no values


class ShapeOfValues(Fault):
    def encode(self, codes: Tensor, grid: Any) -> Tensor:
        return codes if codes.is_meta or codes.min() < codes.max() else codes.to(torch.int32)


class WrongRows(Fault):
    def rows(self, packed: Any, index: Tensor, shape: Any, spec: Any) -> Tensor:
        return self.unpack(packed, shape, spec).dequantize()[index.sort().values]


LAYOUTS = {
    WrongUnpack: {"unpack inverts pack", "gradient of the input"},
    ForgetsLastColumn: {"unpack inverts pack", "gradient of the input"},
    LooksAtValues: {"shapes are known in advance"},
    ShapeOfValues: {"shapes are known in advance"},
    WrongRows: {"rows are rows of the matrix"},
    WrongLevels: {"bytes stand for their levels"},
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_wrong_layout_is_found(layout: type[Fault]) -> None:
    with registered("faulty", replace(WEIGHT_ONLY, layout="fault"), layouts=(layout(),)):
        found = failures("faulty")
    assert LAYOUTS[layout] <= found <= LAYOUTS[layout] | {"unpack inverts pack", "rows are rows of the matrix"}


def coin(w: Tensor, spec: Any, find: Any, stats: Any) -> Any:
    """Stochastic rounding from the global generator."""
    q = nearest(w, spec, find, stats)
    return replace(q, codes=(q.codes.int() + torch.randint(0, 2, q.codes.shape)).clamp(0, 255).to(torch.uint8))


def all_zero(w: Tensor, spec: Any, find: Any, stats: Any) -> Any:
    q = nearest(w, spec, find, stats)
    return replace(q, codes=torch.full_like(q.codes, spec.numbers().zero_code))


def in_place(w: Tensor, spec: Any, find: Any, stats: Any) -> Any:
    q = nearest(w, spec, find, stats)
    w.mul_(2)
    return q


def drifting(w: Tensor, spec: Any, find: Any, stats: Any) -> Any:
    """Turns zero weights into something."""
    q = nearest(w, spec, find, stats)
    return replace(q, codes=q.codes.clamp_max(spec.numbers().size - 2) + 1)


ROUNDERS: dict[Callable, set[str]] = {
    coin: {"same result twice"},
    all_zero: {"values are near the weight"},
    in_place: {"weight is left alone"},
    drifting: {"values are finite"},
}


@pytest.mark.parametrize("rounder", ROUNDERS, ids=lambda rounder: rounder.__name__)
def test_wrong_rounder_is_found(rounder: Callable) -> None:
    with registered("faulty", replace(WEIGHT_ONLY, rounder=Step("fault")), rounders={"fault": rounder}):
        found = failures("faulty")
    # Codes that are random or move zero are also visible where two runs are compared, or zeros stay zero.
    assert ROUNDERS[rounder] <= found <= ROUNDERS[rounder] | {"values are finite", "unpack inverts pack"}


def unguarded(w: Tensor, spec: TensorSpec, stats: Any) -> Any:
    """0 / 0 for a block of zeros."""
    params = absmax(w, spec, stats)
    (top,) = spec.blocks.reduce(w, lambda x: (x.abs().amax(1),))
    scale = top / top * params.scale
    return replace(params, scale=scale, stored=scale)


def test_range_that_gives_nan_is_found() -> None:
    with registered("faulty", replace(WEIGHT_ONLY, range=Step("fault")), ranges={"fault": unguarded}):
        found = failures("faulty")
    assert "values are finite" in found and "values are near the weight" not in found


def test_recipe_that_json_changes_is_found() -> None:
    options = {"sizes": (1, 2)}

    def sized(w: Tensor, spec: TensorSpec, stats: Any, sizes: Any = ()) -> Any:
        return absmax(w, spec, stats)

    with registered("faulty", replace(WEIGHT_ONLY, range=Step("fault", options)), ranges={"fault": sized}):
        assert failures("faulty") == {"recipe survives JSON"}


def test_method_without_recipe_is_found() -> None:
    with registered("faulty", replace(WEIGHT_ONLY, range=Step("not there"))):
        assert failures("faulty") == {"has a recipe"}


def test_accepting_damage_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("hfquant.quantize"), "check_finite", lambda w, name: None)
    assert "damaged weights are refused" in failures("int4")


def test_error_without_the_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = import_module("hfquant.quantize")
    check_finite = quantize.check_finite
    monkeypatch.setattr(quantize, "check_finite", lambda w, name: check_finite(w, "a weight"))
    assert failures("int4") == {"damaged weights are refused"}


# Kernels


def right(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: Any) -> Tensor:
    """float32 throughout: another order of rounding than the reference."""
    y = F.linear(x.float(), unpack(packed, spec).dequantize(), None if bias is None else bias.float())
    return y.to(x.dtype)


def no_bias(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: Any) -> Tensor:
    return right(x, packed, None, spec)


def two_percent_more(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: Any) -> Tensor:
    return right(x, packed, bias, spec) * 1.02


def last_block_forgotten(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: Any) -> Tensor:
    whole = x.shape[-1] // 32 * 32
    return right(F.pad(x[..., :whole], (0, x.shape[-1] - whole)), packed, bias, spec)


def float32_out(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: Any) -> Tensor:
    return right(x.float(), packed, bias, spec)


def writes_input(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: Any) -> Tensor:
    y = right(x, packed, bias, spec)
    x.zero_()
    return y


def wrong_in_bfloat16(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: Any) -> Tensor:
    y = right(x, packed, bias, spec)
    return y if x.dtype != torch.bfloat16 else y + 1


def matrix_only(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: Any) -> Tensor:
    return right(x, packed, bias, spec).reshape(-1, spec.shape[0])


def zeros_as_integers(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: Any) -> Tensor:
    tensors = dict(zip(spec.names, packed, strict=True))
    if isinstance(spec.scheme.weight.zero, str):
        tensors["zero"] = tensors["zero"].round()
    return right(x, list(tensors.values()), bias, spec)


EVERYWHERE = {f"agrees with the reference in {dtype}" for dtype in ("float32", "bfloat16", "float16")}
KERNELS: dict[Callable, set[str]] = {
    no_bias: EVERYWHERE,
    two_percent_more: EVERYWHERE,
    last_block_forgotten: EVERYWHERE,
    float32_out: EVERYWHERE - {"agrees with the reference in float32"},
    writes_input: EVERYWHERE,
    wrong_in_bfloat16: {"agrees with the reference in bfloat16"},
    matrix_only: EVERYWHERE,
    zeros_as_integers: EVERYWHERE,
}


def kernel(run: Callable, **options: Any) -> Kernel:
    return Kernel("fault", "*", "cpu", run, **options)


@pytest.mark.parametrize("run", KERNELS, ids=lambda run: run.__name__)
def test_wrong_kernel_is_found(run: Callable) -> None:
    # It declines nothing, but is the choice of no layer: what is wrong must be seen by comparing, not in the layers.
    with registered("faulty", kernels=(kernel(run, priority=-2, why_not=weight_only),)):
        assert failures("faulty") == KERNELS[run]


def weight_only(spec: Any, dtype: torch.dtype, capability: Any) -> str | None:
    return None if spec.scheme.input is None else "the input is quantized"


def test_right_kernel_passes() -> None:
    with registered("sound", kernels=(kernel(right, priority=-2, why_not=weight_only),)):
        report = conformance("sound", models=())
    assert {check.name for check in report.checks if check.subject == "kernel fault"} == EVERYWHERE


def test_kernel_that_forgets_to_quantize_the_input_is_found() -> None:
    """It is more accurate than the reference, and still not what the checkpoint says."""
    coarse = replace(QUANTIZED_INPUT.scheme, input=InputSpec(TensorSpec("int4", Blocks(1, -1))))
    with registered("faulty", replace(QUANTIZED_INPUT, scheme=coarse), kernels=(kernel(right, priority=-2),)):
        assert failures("faulty") == EVERYWHERE


def test_kernel_for_another_device_is_not_run_and_said() -> None:
    refuses = kernel(right, priority=-2, why_not=lambda *_: "needs 1024 columns")
    other = Kernel("other", "*", "npu", right)
    with registered("sound", kernels=(refuses, other)):
        report = conformance("sound", models=())
    reasons = {(check.subject, check.why) for check in report.checks if check.state == "not run"}
    assert reasons == {("kernel fault", "needs 1024 columns"), ("kernel other", "there is no npu device here")}


# Models


def in_this_process(paths: Any) -> dict[str, str]:
    return {str(path): reload(str(path)) for path in paths}


def test_faults_of_whole_models_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three at once: layers left out, no gradient in 16 bit, nothing dequantized. The rest still passes."""
    from hfquant import ops

    gradient = ops.run_input_grad

    def broken(grad: Tensor, *rest: Any) -> Tensor:
        right = gradient(grad, *rest)
        return right if grad.dtype == torch.float32 else torch.full_like(right, torch.nan)

    monkeypatch.setattr(ops, "run_input_grad", broken)
    monkeypatch.setattr("hfquant.hf.swap_out", lambda model, dtype: None)
    monkeypatch.setattr("hfquant.testing.model_checks.run_fresh", in_this_process)
    found = failures("int4", models=("llama",), modules_to_not_convert=["down_proj"])
    assert found == {"every layer is packed", "adapter trains", "dequantizes to the same weights"}


class Salted(Fault):
    """Exact as long as the process lives."""

    salt = 7

    def encode(self, codes: Tensor, grid: Any) -> Tensor:
        return codes ^ self.salt

    def decode(self, stored: Tensor, grid: Any, count: int) -> Tensor:
        return stored ^ self.salt


def test_reload_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Salted()

    def another_process(paths: Any) -> dict[str, str]:
        layout.salt = 8
        return in_this_process(paths)

    monkeypatch.setattr("hfquant.testing.model_checks.run_fresh", another_process)
    with registered("faulty", replace(WEIGHT_ONLY, layout="fault"), layouts=(layout,)):
        assert failures("faulty", models=("llama",)) == {"reload is bit-identical"}


# The report


def test_report_of_a_backend_that_passes() -> None:
    report = conformance("int4", models=(), group_size=32, symmetric=False, double_quant=True)
    assert report.ok and not report.failed and len(report.checks) >= 10
    assert str(report).splitlines()[0] == f"int4: {len(report.checks)} checks passed, 0 failed, 0 not run"
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_every_method_of_a_backend_is_checked() -> None:
    backend = Backend("pair", presets={"one": partial(kbit, "int4"), "two": partial(kbit, "nf4")})
    register(backend, "test")
    try:
        assert {check.subject for check in conformance("pair", models=()).checks} == {"one", "two"}
    finally:
        unregister(backend, "test")


def test_nothing_checked_is_no_pass() -> None:
    assert not Report("empty").ok
    backend = Backend("hollow")
    register(backend, "test")
    try:
        with pytest.raises(ConformanceError, match="nothing to check"):
            conformance("hollow")
    finally:
        unregister(backend, "test")


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(SpecError, match=r"neither a backend nor a method is called 'nope': backends are .*core.*int4"):
        conformance("nope")


@pytest.mark.parametrize("recipe", [WEIGHT_ONLY, QUANTIZED_INPUT], ids=["weight only", "quantized input"])
def test_right_recipe_passes(recipe: Recipe) -> None:
    with registered("sound", recipe):
        assert conformance("sound", models=()).ok
