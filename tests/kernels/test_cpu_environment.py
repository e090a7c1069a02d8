"""HFQUANT_CPU_ISA says which instruction set a process uses; it is read once, when the library is loaded."""

from __future__ import annotations

import os
import subprocess

import pytest

from hfquant import build
from hfquant.kernel import REFERENCE
from tests import fresh

from .problems import ISAS

ISA = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.hfq_isa.restype = ctypes.c_char_p
print(library.hfq_isa().decode())
"""
LAYER = """
import logging, torch
from hfquant import cpu, ops
from hfquant.kernel import choose
from hfquant.presets import BUILTIN
from hfquant.quantize import pack, quantize_linear
from hfquant.stats import Stats

logging.basicConfig(format="%(message)s")
print(cpu.library())
recipe = BUILTIN["int4"]()
packed, spec = pack(quantize_linear(torch.randn(32, 64), recipe, Stats("layer")), recipe)
print(choose(spec.key(), torch.device("cpu"), torch.float32).name)
print(ops.linear(torch.zeros(3, 64), list(packed.values()), None, spec.key()).abs().max().item())
"""


def run(program: str, asked: str | None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HFQUANT_")}
    if asked is not None:
        environment["HFQUANT_CPU_ISA"] = asked
    done = fresh.run(program, build.cpu_library(), environment=environment)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("asked", ISAS)
def test_each_instruction_set_can_be_asked_for(asked: str) -> None:
    assert run(ISA, asked).stdout.split() == [asked]


@pytest.mark.parametrize("asked", [None, ""])
def test_the_best_one_is_used_where_none_is_asked_for(asked: str | None) -> None:
    assert run(ISA, asked).stdout.split() == ISAS[:1]


def test_an_unknown_one_leaves_the_reference_kernel_and_a_reason() -> None:
    done = run(LAYER, "nonsense")
    reason, kernel, result = done.stdout.splitlines()
    assert reason == f"HFQUANT_CPU_ISA='nonsense' is nothing that runs here: choose from {', '.join(ISAS)}"
    assert (kernel, result) == (REFERENCE.name, "0.0")
    assert "run on the reference kernel" in done.stderr and reason in done.stderr
