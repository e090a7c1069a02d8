"""Worked examples from lecture notes, as they are once their slips are corrected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hfquant  # noqa: F401  registers the tables of the core
from hfquant.blocks import Blocks
from hfquant.codebooks import quantiles
from hfquant.grids import FloatGrid, grid
from hfquant.quantize import quantize_linear
from hfquant.recipe import Recipe
from hfquant.scales import encode, scale_from_bounds, zero_from_bounds
from hfquant.spec import Scheme, TensorSpec

GOLDEN = Path(__file__).parents[1] / "golden"


def cases(name: str) -> list[Any]:
    found = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["cases"]
    return [pytest.param(case, id=f"{name}-{number}") for number, case in enumerate(found)]


def test_every_file_is_read_and_names_its_sources() -> None:
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in GOLDEN.glob("*.json")}
    assert set(files) == {"affine", "symmetric", "floats", "quantiles"}
    assert all(case["source"] for content in files.values() for case in content["cases"])


@pytest.mark.parametrize("case", cases("affine"))
def test_affine(case: dict[str, Any]) -> None:
    numbers = grid(case["grid"])
    low, high = torch.tensor(case["low"]), torch.tensor(case["high"])
    scale = scale_from_bounds(low, high, numbers, zero=True)
    zero = zero_from_bounds(low, scale, numbers)
    assert float(scale) == pytest.approx(case["scale"], rel=5e-4)
    assert int(zero) + case["code_offset"] == case["zero"]
    for value, code in case["codes"]:
        assert int(encode(torch.tensor(value), scale, zero, numbers)) + case["code_offset"] == code


@pytest.mark.parametrize("case", cases("affine"))
def test_affine_through_the_whole_quantizer(case: dict[str, Any]) -> None:
    w = torch.tensor([[value for value, _ in case["codes"]] + [case["low"], case["high"]]])
    q = quantize_linear(w, Recipe(Scheme(TensorSpec(case["grid"], Blocks(1, -1), zero=True))))
    assert q.zero is not None and int(q.zero) + case["code_offset"] == case["zero"]
    found = (q.codes[0].int() + case["code_offset"]).tolist()
    assert found[: len(case["codes"])] == [code for _, code in case["codes"]]


@pytest.mark.parametrize("case", cases("symmetric"))
def test_symmetric(case: dict[str, Any]) -> None:
    numbers = grid(case["grid"])
    q = quantize_linear(torch.tensor([case["weights"]]), Recipe(Scheme(TensorSpec(case["grid"], Blocks(1, -1)))))
    assert (q.codes[0].int() - numbers.zero_code).tolist() == case["steps"]
    assert float(q.scale_values()) == pytest.approx(case["scale"], rel=1e-5)


@pytest.mark.parametrize("case", cases("floats"))
def test_floats(case: dict[str, Any]) -> None:
    numbers = grid(case["grid"])
    assert isinstance(numbers, FloatGrid)
    codes = numbers.encode(torch.tensor([case["value"]]))
    assert format(int(numbers.to_bits(codes)), f"0{numbers.bits}b") == case["pattern"]
    assert float(numbers.decode(codes)) == case["rounded"]


@pytest.mark.parametrize("case", cases("quantiles"))
def test_quantiles(case: dict[str, Any]) -> None:
    assert quantiles(torch.tensor(case["values"], dtype=torch.float32), case["bits"]).tolist() == case["levels"]
