"""How long does it take to quantize layers of a model of 7 billion parameters on a GPU?

Of each weight: seconds to round it, or to search for its range, with statistics of its input that are gathered on the
same device. Then one whole block of the model, from its hidden states to its packed layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hfquant import HfQuantConfig
from hfquant.backend import load_all
from hfquant.calibrate import Calibration
from hfquant.coverage import survey
from hfquant.quantize import quantize_linear
from hfquant.recipe import Recipe
from hfquant.stats import CHANNELS, HESSIAN, InputStats, Stats

from .decode import prompt_of
from .findings import Findings
from .models import BF16, build
from .setting import Setting
from .timing import clock_of
from .weights import random_input

METHODS: dict[str, dict[str, Any]] = {"int4": {}, "gptq": {}, "awq": {}, "fpq": {}}
CALIBRATED = ("gptq", "awq", "fpq")


def recipe_of(method: str) -> Recipe:
    """The recipe of a method without its transforms, which need a whole block."""
    return replace(HfQuantConfig(method, **METHODS[method]).recipe, transforms=())


def statistics(setting: Setting, width: int) -> tuple[float, InputStats]:
    """Seconds for all tokens, and what they left."""
    clock, stats = clock_of(setting), InputStats(width, frozenset({CHANNELS, HESSIAN}))
    x = random_input(setting.sizes.calibration, width, setting.device)
    return clock.seconds(lambda: stats.add(x)), stats


def weight(setting: Setting, method: str, shape: tuple[int, int], stats: InputStats) -> float:
    """Seconds to quantize one weight; what layers share is found out anew."""
    generator = torch.Generator(setting.device).manual_seed(0)
    w = (0.02 * torch.randn(shape, generator=generator, device=setting.device)).bfloat16()
    recipe = recipe_of(method)

    def run() -> None:
        stats.memo.clear()
        quantize_linear(w, recipe, Stats("layer", inputs=stats))

    return timed(setting, run)


def timed(setting: Setting, run: Callable[[], object]) -> float:
    """Seconds of one call; the clock of a GPU waits for what it has to do."""
    return clock_of(setting).seconds(run)


def block(setting: Setting, method: str) -> float:
    """Seconds to quantize the only block of a model."""
    llama = replace(setting.sizes.llama, layers=1, vocabulary=256)
    small = replace(setting, sizes=replace(setting.sizes, llama=llama))
    model = build(BF16, small)
    length = min(512, setting.sizes.calibration)
    ids: list[Tensor] = [prompt_of(small, length + number) for number in range(setting.sizes.calibration // length)]
    data = [{"input_ids": each[:, :length]} for each in ids]
    config = HfQuantConfig(method, data=data, **METHODS[method])
    targets, _ = survey(model, None, False)
    return timed(setting, lambda: Calibration(model, targets, config, data).run())


@torch.no_grad()
def run(setting: Setting, findings: Findings) -> None:
    """Weights of all methods, then blocks."""
    load_all()
    for shape in setting.while_time(findings, "shapes", setting.sizes.quantized):
        with findings.row(what="statistics", shape=shape) as line:
            line["seconds"], stats = statistics(setting, shape[1])
        for method in setting.while_time(findings, f"methods, {shape}", METHODS):
            with findings.row(what="weight", method=method, shape=shape) as line:
                line["seconds"] = weight(setting, method, shape, stats)
    for method in setting.while_time(findings, "blocks", CALIBRATED):
        with findings.row(what="block", method=method) as line:
            line["seconds"] = block(setting, method)
