"""`conformance("name")`: what the author of a backend runs in their own tests.

from hfquant.testing import conformance

def test_conformance():
    conformance("ternary")
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..backend import BACKENDS, load_all
from ..config import HfQuantConfig
from ..errors import SpecError
from ..kernel import Kernel
from ..recipe import PRESETS, Recipe
from .kernel_checks import check_kernel
from .model_checks import MODELS, check_models
from .report import ConformanceError, Report
from .tiny import VOCABULARY
from .weight_checks import check_weights

# Recipes of the core whose layouts a kernel may be for, tried where its own backend has no method.
_CORE_METHODS = ("int8", "int4", "int3", "nf4", "e2m1", "e4m3", "dynamic8", "quantile4")


def conformance(name: str, *, models: Sequence[str] = MODELS, **options: Any) -> Report:
    """Check that a backend keeps its promises, on the CPU and whatever other devices its kernels name.

    `name`: a backend, for all its methods and kernels, or one method. `models`: kinds of tiny models (see
    `hfquant.testing.tiny.KINDS`) to load, save, reload and train; () leaves them out. `options`: of the methods.

    Every method is run on weights of all kinds (random, ragged, all zero, of one sign, tiny, huge, with NaN) in three
    dtypes, every kernel against the reference on all weights and dtypes that it accepts. Returns the report, which
    prints as a list. Raises ConformanceError with all failures, SpecError if there is no such backend or method,
    BackendError if it is broken.
    """
    report = Report(name)
    methods, kernels = _of(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other, and one makes runs repeatable
    try:
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory(prefix="hfquant-") as folder:
            _check(report, methods, kernels, tuple(models), options, Path(folder))
    finally:
        torch.set_num_threads(threads)
    if not report.ok:
        raise ConformanceError(report)
    return report


def _core_recipes() -> list[Recipe]:
    """The methods of the core, and zero points: on the grid, and the real ones that a merged adapter leaves."""
    whole = HfQuantConfig("int4", symmetric=False, group_size=32).recipe
    real = replace(whole, scheme=replace(whole.scheme, weight=replace(whole.scheme.weight, zero="float32")))
    return [*(HfQuantConfig(method).recipe for method in _CORE_METHODS), whole, real]


def _of(name: str) -> tuple[list[str], tuple[Kernel, ...]]:
    """Methods and kernels of a backend, or the one method of that name."""
    load_all()
    if name in BACKENDS:
        backend = BACKENDS.get(name)
        return sorted(backend.presets), backend.kernels
    try:
        PRESETS.get(name)
    except SpecError as error:
        known = f"backends are {', '.join(BACKENDS.names())}; methods are {', '.join(PRESETS.names())}"
        raise SpecError(f"neither a backend nor a method is called {name!r}: {known}") from error
    return [name], ()


def _config(method: str, options: dict[str, Any]) -> HfQuantConfig:
    """The config of a method; one that calibrates gets random tokens, which every tiny model knows."""
    config = HfQuantConfig(method, **options)
    if not config.needs_data:
        return config
    tokens = torch.randint(3, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))
    return HfQuantConfig(method, **options, data=[tokens])


def _check(
    report: Report,
    methods: list[str],
    kernels: tuple[Kernel, ...],
    models: tuple[str, ...],
    options: dict[str, Any],
    folder: Path,
) -> None:
    configs: dict[str, HfQuantConfig] = {}
    recipes: list[Recipe] = []
    for method in methods:
        config = report.run(method, "has a recipe", partial(_config, method, options))
        if config is None:
            continue
        recipes.append(config.recipe)
        if check_weights(report, method, config.recipe):  # a model would only repeat what is wrong with its weights
            configs[method] = config
    for kernel in kernels:
        check_kernel(report, kernel, [*recipes, *_core_recipes()])
    if models and configs:
        check_models(report, configs, models, folder)
