"""Which kernel runs, who says no and why, and what happens when none is fast."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch

import hfquant
from hfquant import kernel as module
from hfquant.blocks import Blocks
from hfquant.errors import SpecError, UnsupportedError
from hfquant.kernel import KERNELS, REFERENCE, Kernel, choose, declined, run_linear, use_kernel
from hfquant.quantize import pack, quantize_linear
from hfquant.recipe import Recipe
from hfquant.spec import PackedSpec, Scheme, TensorSpec

CPU = torch.device("cpu")
RECIPE = Recipe(Scheme(TensorSpec("int4", Blocks(1, 16))))
W = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
PACKED, SPEC = pack(quantize_linear(W, RECIPE), RECIPE)
KEY = SPEC.key()
X = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))


def run(value: float) -> Callable[..., torch.Tensor]:
    """A kernel that can be told by its result."""
    return lambda x, packed, bias, spec: x.new_full((*x.shape[:-1], spec.shape[0]), value)


@pytest.fixture(autouse=True)
def only_reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A table with the reference alone, whatever is installed; forgotten answers before and after."""
    monkeypatch.setattr(KERNELS, "_entries", {"reference": (REFERENCE, "core")})
    choose.cache_clear()
    module._log_once.cache_clear()
    yield
    choose.cache_clear()


def add(*kernels: Kernel) -> None:
    for kernel in kernels:
        KERNELS.add(kernel.name, kernel, "test")
    choose.cache_clear()


def result() -> float:
    """The value that the kernel in use writes everywhere."""
    return float(run_linear(X, list(PACKED.values()), None, KEY).unique())


def test_the_reference_is_what_is_left() -> None:
    assert choose(KEY, CPU, torch.float32) is REFERENCE
    expected = X @ quantize_linear(W, RECIPE).dequantize().T
    torch.testing.assert_close(run_linear(X, list(PACKED.values()), None, KEY), expected)


def test_the_highest_priority_wins_whatever_the_order() -> None:
    add(*(Kernel(name, "dense", "cpu", run(p), priority=p) for name, p in (("a", 1), ("z", 3), ("m", 2))))
    assert result() == 3.0 and choose(KEY, CPU, torch.float32).name == "z"


def test_a_kernel_that_declines_is_passed_over() -> None:
    asked: list[tuple[PackedSpec, torch.dtype, tuple[int, int] | None]] = []

    def why_not(spec: PackedSpec, dtype: torch.dtype, capability: tuple[int, int] | None) -> str | None:
        asked.append((spec, dtype, capability))
        return "rows are no multiple of 64"

    add(
        Kernel("picky", "dense", "cpu", run(9), why_not, priority=9),
        Kernel("plain", "dense", "cpu", run(1), priority=1),
    )
    assert result() == 1.0
    assert asked[0] == (SPEC, torch.float32, None)
    assert declined(SPEC, CPU, torch.float32) == {
        "picky": "picky: rows are no multiple of 64",
        "plain": None,
        "reference": None,
    }


def test_other_layouts_and_devices_are_declined_without_asking() -> None:
    def never(*_: object) -> str | None:
        raise AssertionError("asked about a weight that is none of its business")

    add(
        Kernel("tiles", "marlin", "cpu", run(1), never, 5),
        Kernel("gpu", "dense", "cuda", run(2), never, 5),
        Kernel("any", "*", "*", run(3), priority=1),
    )
    reasons = declined(SPEC, CPU, torch.float32)
    assert reasons["tiles"] == "tiles: is for layout 'marlin', the weight has 'dense'"
    assert reasons["gpu"] == "gpu: is for cuda, the weight is on cpu"
    assert result() == 3.0


def test_use_kernel_forces_one_and_gives_the_choice_back() -> None:
    add(Kernel("fast", "dense", "cpu", run(5), priority=5), Kernel("slow", "dense", "cpu", run(1), priority=1))
    assert result() == 5.0
    with use_kernel("slow"):
        assert result() == 1.0
        with use_kernel("fast"):
            assert result() == 5.0
        assert result() == 1.0
    assert result() == 5.0
    with pytest.raises(RuntimeError, match="inside"), use_kernel("slow"):
        raise RuntimeError("inside")
    assert result() == 5.0


def test_use_kernel_is_public() -> None:
    assert hfquant.use_kernel is use_kernel


def test_use_kernel_refuses_unknown_names_at_once() -> None:
    with pytest.raises(SpecError, match="unknown kernel 'nonsense'"), use_kernel("nonsense"):
        raise AssertionError("must not get here")


def test_a_forced_kernel_that_cannot_says_why() -> None:
    add(Kernel("picky", "dense", "cpu", run(1), lambda *_: "needs bfloat16"))
    with use_kernel("picky"), pytest.raises(UnsupportedError, match="'picky' was asked for on cpu") as error:
        result()
    assert error.value.reasons == ("picky: needs bfloat16",)


def test_strict_makes_the_fallback_an_error_with_all_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    add(Kernel("picky", "dense", "cpu", run(1), lambda *_: "needs AMX"), Kernel("gpu", "dense", "cuda", run(1)))
    run_linear(X, list(PACKED.values()), None, KEY)  # without it, and remembered
    monkeypatch.setenv("HFQUANT_STRICT", "1")
    with pytest.raises(
        UnsupportedError, match="HFQUANT_STRICT=1 and no fast kernel runs int4 weights in layout 'dense'"
    ) as e:
        result()
    assert e.value.reasons == ("gpu: is for cuda, the weight is on cpu", "picky: needs AMX")
    with use_kernel("reference"):  # asked for, so not a fallback
        run_linear(X, list(PACKED.values()), None, KEY)
    add(Kernel("fast", "dense", "cpu", run(4), priority=4))
    assert result() == 4.0


def test_the_fallback_is_reported_once_per_kind_of_weight(caplog: pytest.LogCaptureFixture) -> None:
    add(Kernel("picky", "dense", "cpu", run(1), lambda *_: "needs AMX", 5))
    recipe = Recipe(Scheme(TensorSpec("nf4", Blocks(1, 16))))
    other, other_spec = pack(quantize_linear(W, recipe), recipe)
    with caplog.at_level(logging.INFO, logger="hfquant.kernel"):
        for _ in range(3):
            run_linear(X, list(PACKED.values()), None, KEY)
            run_linear(X, list(other.values()), None, other_spec.key())
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "int4 weights in layout 'dense' on cpu" in caplog.text and "picky: needs AMX" in caplog.text


def test_with_nothing_faster_installed_the_report_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hfquant.kernel"):
        run_linear(X, list(PACKED.values()), None, KEY)
    assert [record.levelname for record in caplog.records] == ["INFO"]
