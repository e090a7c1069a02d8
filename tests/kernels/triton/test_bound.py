"""What is found out once about a bound weight is not asked for again, and keeps none of its tensors."""

from __future__ import annotations

import gc
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from hfquant.blocks import Blocks
from hfquant.gpu import inputs, weight_only
from hfquant.kernels.triton import int8, launch, levels
from hfquant.kernels.triton.plans import MOST_PLANS, Plan, Plans
from hfquant.spec import InputSpec, PackedSpec, TensorSpec

from ..problems import packed, random_weight
from .compiled import recording

TOKENS = InputSpec(TensorSpec("int8", Blocks(1, -1)))
KERNELS = {
    "weight": (weight_only.KERNEL, launch, "int4", None),
    "fitted": (weight_only.KERNEL, launch, "quantile4", None),
    "int8": (inputs.INT8, int8, "int4", TOKENS),
    "levels": (inputs.LEVELS, levels, "e2m1", TOKENS),
}


def layer(grid: str, input: InputSpec | None) -> tuple[list[torch.Tensor], PackedSpec]:
    q = random_weight((24, 64), TensorSpec("nf4" if grid == "quantile4" else grid, Blocks(1, -1)), 0)
    if grid == "quantile4":
        q = replace(q, spec=replace(q.spec, grid=grid), levels=torch.arange(16.0))
    return packed(q, "dense", input)


@pytest.mark.parametrize("name", KERNELS)
def test_a_call_is_planned_once_for_a_number_of_rows(name: str) -> None:
    kernel, module, grid, input = KERNELS[name]
    tensors, spec = layer(grid, input)
    assert kernel.bind is not None
    with mock.patch.object(module, "plan_of", wraps=module.plan_of) as planned, recording() as launches:
        run = kernel.bind(tensors, spec)
        for rows in (1, 1, 5, 1, 5):
            run(torch.empty(rows, 64), tensors, None)
    assert planned.call_count == 2
    products = [launched for launched in launches if "BM" in launched.options]
    assert [launched.options["M"] for launched in products] == [1, 1, 5, 1, 5]
    assert products[0].options.keys() == products[1].options.keys()


@pytest.mark.parametrize("name", KERNELS)
def test_a_binding_keeps_no_tensor_alive(name: str) -> None:
    kernel, _, grid, input = KERNELS[name]
    tensors, spec = layer(grid, input)
    assert kernel.bind is not None
    with recording() as launches:
        run = kernel.bind(tensors, spec)
        run(torch.empty(1, 64), tensors, None)
        memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        launches.clear()
        assert not any(one.expired() for one in memory)
        del tensors
        gc.collect()
        assert all(one.expired() for one in memory) and run is not None


def test_plans_do_not_grow_without_end() -> None:
    made: list[int] = []

    def make(rows: int) -> Plan:
        made.append(rows)
        return Plan((rows,), 1, False, {}, {})

    plans = Plans(make)
    for rows in (*range(2 * MOST_PLANS), 2 * MOST_PLANS - 1):
        assert plans.get(rows).grid == (rows,)
    assert made == list(range(2 * MOST_PLANS))
