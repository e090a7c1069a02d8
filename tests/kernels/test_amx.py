"""The kernels with tile registers, on processors without them.

Results come from a library in which functions stand in for the instructions, with the numbers and the limits that the
manual gives them. What only a processor with AMX can show is looked up in the machine code of the real library.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfquant import cpu
from hfquant.blocks import Blocks
from hfquant.build import LIBRARY as FILE
from hfquant.build import Build, build_library, cpu_folder, find_compiler
from hfquant.cpu import gradient, linear
from hfquant.cpu.inputs import MOST_COLUMNS
from hfquant.errors import UnsupportedError
from hfquant.qtensor import QTensor
from hfquant.spec import InputSpec, PackedSpec, TensorSpec

from .problems import (
    BOUND,
    WORST_INT,
    WORST_LEVELS,
    assert_close,
    assert_grid_product,
    assert_int_product,
    assert_product,
    assert_same_on_threads,
    error,
    grid_problems,
    int_problems,
    normal,
    packed,
    problems,
    random_weight,
)

REAL = cpu.library()
assert not isinstance(REAL, str), REAL  # the suite is for machines with a compiler
NEEDED = {"amx_tile", "amx_bf16", "amx_int8"}
CPUINFO = Path("/proc/cpuinfo")


def built(folder: Path, flags: list[str]) -> Build:
    """The library without the instruction sets in between, from a compiler that is given more flags."""
    source = cpu_folder()
    assert source is not None
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix in {".cpp", ".h"} and path.name not in {"avx2.cpp", "avx512_bf16.cpp"}:
            shutil.copy(path, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", shlex.join([*find_compiler().command, *flags]))
        return build_library(folder, folder)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> cpu.Library:
    folder = tmp_path_factory.mktemp("emulated") / "cpu"
    built(folder, ["-DHFQ_EMULATE_TILES"])
    return cpu.Library(str(folder / FILE))


@pytest.fixture(scope="module", autouse=True)
def in_use(emulated: cpu.Library) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (linear, gradient):
            patch.setattr(module, "library", lambda: emulated)
        yield


def many(shape: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, tuple[int, int]]:
    rows, n, k = shape
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype), (n, k)


# More than a tile, a panel of rows, a panel of columns, or the inputs that meet a panel together.
SHAPES = [(5, 16, 32), (16, 300, 100), (33, 130, 1100), (70, 40, 2100), (1025, 20, 70), (1056, 40, 600)]


def test_tiles_come_first_where_the_rest_of_their_code_runs(emulated: cpu.Library) -> None:
    assert emulated.isas() == (["amx", "scalar"] if "avx512_bf16" in REAL.isas() else ["scalar"])


@settings(max_examples=150, deadline=None)
@given(problem=problems(st.integers(1, 70), [torch.bfloat16]))
def test_the_product_is_that_of_the_dequantized_weight(problem: tuple) -> None:
    assert_product(problem)


@settings(max_examples=25, deadline=None)
@given(problem=problems(dtypes=[torch.float16, torch.float32]))
def test_so_it_is_in_other_types(problem: tuple) -> None:
    assert_product(problem)


@settings(max_examples=150, deadline=None)
@given(problem=int_problems(st.integers(1, 70)))
def test_integer_products_are_those_of_what_the_layer_sees(problem: tuple) -> None:
    assert_int_product(problem)


@settings(max_examples=100, deadline=None)
@given(problem=grid_problems(st.integers(1, 70)))
def test_inputs_on_other_grids_are_those_that_the_layer_sees(problem: tuple) -> None:
    assert_grid_product(problem)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grid", ["nf4", "uint4", "int3", "e4m3"])
def test_large_products(grid: str, shape: tuple[int, int, int]) -> None:
    x, sides = many(shape)
    q = random_weight(sides, TensorSpec(grid, Blocks(1, 32), grid == "uint4"), 0)
    tensors, spec = packed(q, "dense" if q.spec.numbers().bits < 8 else "bytes")
    bias = torch.randn(sides[0], generator=torch.Generator().manual_seed(2))
    assert error(cpu.run(x, tensors, bias, spec), x, q.dequantize(), bias) <= BOUND[torch.bfloat16]


def int_layer(q: QTensor) -> tuple[list[Tensor], PackedSpec]:
    return packed(q, "bytes", InputSpec(TensorSpec("int8", Blocks(1, -1))))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_large_integer_products_are_exact(shape: tuple[int, int, int]) -> None:
    """Inputs that are whole numbers up to 127 are their own codes, so that sums are known to the last bit."""
    rows, n, k = shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-127, 128, (rows, k), generator=generator).float()
    x[:, 0] = 127
    q = random_weight((n, k), TensorSpec("int8", Blocks(1, -1)), 0)
    q.scale.fill_(1)
    tensors, spec = int_layer(q)
    assert torch.equal(cpu.run(x, tensors, None, spec), (x.double() @ q.dequantize().double().T).float())


def test_the_largest_integer_sums_fit(emulated: cpu.Library) -> None:
    k = MOST_COLUMNS
    q = random_weight((16, k), TensorSpec("int8", Blocks(1, -1)), 0)
    q.scale.fill_(1)
    for code in (0, 255):
        q.codes.fill_(code)
        x = torch.full((7, k), 127.0)
        x[1::2] *= -1
        tensors, spec = int_layer(q)
        assert_close(cpu.run(x, tensors, None, spec), x, q.dequantize(), None, WORST_INT)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_results_do_not_depend_on_threads(kind: str) -> None:
    x, sides = many((37, 333, 700))
    q = random_weight(sides, TensorSpec("int8", Blocks(1, -1)), 0)
    tensors, spec = packed(q, "bytes") if kind == "bfloat16" else int_layer(q)
    assert_same_on_threads(x, tensors, spec)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_values_that_are_not_numbers_stay_in_their_rows(kind: str) -> None:
    q = random_weight((20, 200), TensorSpec("int8", Blocks(1, -1)), 0)
    q.codes[q.codes == q.spec.numbers().zero_code] = 0  # no weight is 0, so that none hides an infinity
    tensors, spec = packed(q, "bytes") if kind == "bfloat16" else int_layer(q)
    x, _ = many((20, 20, 200))
    x[3, 150], x[-1, 7] = float("nan"), float("inf")
    y = cpu.run(x, tensors, None, spec)
    assert y[3].isnan().all() and not y[-1].isfinite().any()
    assert y[[*range(3), *range(4, 19)]].isfinite().all()


@settings(max_examples=60, deadline=None)
@given(problem=problems(st.integers(1, 70), [torch.bfloat16]))
def test_gradients_are_those_of_the_dequantized_weight(problem: tuple) -> None:
    q, layout, x, _ = problem
    tensors, spec = packed(q, layout)
    grad = normal(len(x), q.shape[0]).bfloat16()
    assert_close(cpu.input_grad(grad, tensors, spec), grad, q.dequantize().T, None, WORST_LEVELS)


# As above: rows of weights are what is added up here, 32 of them a step, and their columns come in panels.
@pytest.mark.parametrize("shape", [(5, 32, 16), (33, 1100, 130), (70, 2100, 300), (1056, 70, 600)], ids=str)
@pytest.mark.parametrize("grid", ["nf4", "uint4", "int3", "e4m3"])
def test_large_gradients(grid: str, shape: tuple[int, int, int]) -> None:
    rows, n, k = shape
    q = random_weight((n, k), TensorSpec(grid, Blocks(1, 32), grid == "uint4"), 0)
    tensors, spec = packed(q, "dense" if q.spec.numbers().bits < 8 else "bytes")
    grad = normal(rows, n).bfloat16()
    assert_close(cpu.input_grad(grad, tensors, spec), grad, q.dequantize().T, None, WORST_LEVELS)


# ---- the real instructions


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Build, Path]:
    folder = tmp_path_factory.mktemp("real") / "cpu"
    return built(folder, []), folder / FILE


def test_the_source_compiles_without_warnings_where_the_compiler_knows_tiles(real: tuple[Build, Path]) -> None:
    build, _ = real
    assert build.warnings == ""
    assert "amx.cpp" in build.sources or "-mamx" in build.left_out["amx.cpp"]


def encoded(prefix: int, opcode: int, sums: int, first: int, second: int) -> bytes:
    """A product of three tile registers: VEX.128.0F38.W0, sums in ModRM.reg, first operand in r/m, second in vvvv."""
    return bytes([0xC4, 0xE2, (~second & 15) << 3 | prefix, opcode, 0xC0 | sums << 3 | first])


PRODUCTS = {"tdpbf16ps": (0b10, 0x5C), "tdpbusd": (0b01, 0x5E)}  # F3 and 66 in front of the opcode


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_machine_code_has_the_products_with_the_right_operand_first(real: tuple[Build, Path], name: str) -> None:
    """Of `tdpbusd` the first operand is the unsigned one: registers 4 and 5 hold weights, 6 and 7 inputs.

    Gradients, which are products of bfloat16 alone, have it the other way round.
    """
    build, library = real
    code, there = library.read_bytes(), "amx.cpp" in build.sources
    for sums, (weights, inputs) in enumerate([(4, 6), (4, 7), (5, 6), (5, 7)]):
        assert (encoded(*PRODUCTS[name], sums, weights, inputs) in code) == there
        assert (encoded(*PRODUCTS[name], sums, inputs, weights) in code) == (there and name == "tdpbf16ps")
    configure, release = rb"\xc4\xe2\x78\x49[^\xc0]", rb"\xc4\xe2\x78\x49\xc0"
    assert all((re.search(pattern, code) is not None) == there for pattern in (configure, release))


def test_tiles_are_used_where_the_processor_and_the_system_have_them(real: tuple[Build, Path]) -> None:
    """Elsewhere an instruction would end the program: the name is not offered, and asking for it is refused."""
    build, library = real
    known = set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()
    loaded = cpu.Library(str(library))
    if "amx.cpp" in build.sources and known >= NEEDED:
        assert loaded.isas()[0] == "amx"
        return
    assert "amx" not in loaded.isas()
    with pytest.raises(UnsupportedError, match="nothing that runs here"), loaded.using("amx"):
        raise AssertionError("must not get here")
