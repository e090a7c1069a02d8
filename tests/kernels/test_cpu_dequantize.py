"""What the CPU library says a weight is, is what `QTensor.dequantize` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfquant import ops
from hfquant.cpu.dequantize import columns
from hfquant.errors import FormatError
from hfquant.kernel import columns_of, use_kernel
from hfquant.layouts import unpack
from hfquant.spec import PackedSpec

from .problems import DTYPES, ISAS, LIBRARY, kinds, packed, problems

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=120, deadline=None)
@given(problem=problems(), share=st.tuples(st.floats(0, 1), st.floats(0, 1)), tiny=st.booleans())
def test_columns_are_those_of_the_dequantized_weight(name: str, problem: tuple, share: tuple, tiny: bool) -> None:
    q, layout, x, _ = problem
    if tiny and isinstance(
        q.scale, torch.Tensor
    ):  # weights that are subnormal numbers, and one scale that is no number
        q.scale.mul_(torch.finfo(q.scale.dtype).tiny)
        q.scale.view(-1)[0] = torch.nan
    tensors, spec = packed(q, layout)
    first, last = sorted(round(at * spec.shape[1]) for at in share)
    with LIBRARY.using(name):
        found = columns(tensors, spec, x.dtype, first, last)
    torch.testing.assert_close(found, q.dequantize(x.dtype)[:, first:last], rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Columns that the library was asked for."""
    asked: list[tuple[int, int]] = []

    def watched(key: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
        found = columns_of(key, device, dtype)
        if found is None:
            return None

        def watched_columns(packed: Any, spec: Any, dtype: torch.dtype, first: int, last: int) -> torch.Tensor:
            asked.append((first, last))
            return found(packed, spec, dtype, first, last)

        return watched_columns

    monkeypatch.setattr(ops, "columns_of", watched)
    return asked


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_weight_is_what_the_reference_says(
    kind: str, dtype: torch.dtype, taken: list[tuple[int, int]]
) -> None:
    q, layout = kinds()[kind]
    tensors, spec = packed(q, layout)
    key, exact = spec.key(), unpack(tensors, spec).dequantize()
    assert torch.equal(ops.dequantize(tensors, key, dtype), exact.to(dtype))
    assert taken == [(0, 96)]
    with use_kernel("reference"):
        assert torch.equal(ops.dequantize(tensors, key, dtype), exact.to(dtype))
    assert len(taken) == 1


def test_what_the_library_does_not_take_goes_to_the_reference(taken: list[tuple[int, int]]) -> None:
    q = kinds()["plain"][0]
    tensors, spec = packed(replace(q, rotated=True), "dense")
    rotated = PackedSpec(**{**vars(spec), "rotated": True})
    assert torch.equal(ops.dequantize(tensors, rotated.key(), torch.float32), unpack(tensors, rotated).dequantize())
    assert torch.equal(ops.dequantize(tensors, spec.key(), torch.float64), q.dequantize(torch.float64))
    assert columns_of(spec.key(), torch.device("meta"), torch.float32) is None
    assert not taken


def test_tensors_that_are_too_short_are_refused() -> None:
    tensors, spec = packed(kinds()["plain"][0], "dense")
    for index in range(len(tensors)):
        short = [tensor[:-1] if at == index else tensor for at, tensor in enumerate(tensors)]
        with pytest.raises(FormatError, match="the checkpoint is damaged"):
            ops.dequantize(short, spec.key(), torch.float32)
