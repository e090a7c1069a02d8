"""No kernel reads or writes outside of what it is given, leaves a result out, or keeps memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hfquant import build

DRIVER = Path(__file__).with_name("drive_cpu.cpp")
# Not optimized: the compiler drops no access that is wrong, and is done in a quarter of the time.
SANITIZERS = ("-O0", "-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
PLAIN = ("-O1", "-g")
VALGRIND = ("--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite", "--quiet")


def run(command: list[str]) -> str:
    """What a command prints; a failure shows everything that it said."""
    reports = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1", "OMP_WAIT_POLICY": "passive"}
    environment = {key: value for key, value in os.environ.items() if key != "HFQUANT_CPU_ISA"} | reports
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout


def build_driver(folder: Path, flags: tuple[str, ...], without: tuple[str, ...] = ()) -> Path:
    """The driver with the kernels in it, each source with its own flags; those that ask for flags `without` are not."""
    sources, compiler = build.cpu_folder(), build.find_compiler()
    assert sources is not None
    common = [*build._common_flags(compiler, folder), *flags, "-I", str(sources)]
    objects = []
    for source in [DRIVER, *sorted(sources.glob("*.cpp"))]:
        extra = build.extra_flags(source)
        if any(flag.startswith(without) for flag in extra) if without else False:
            continue
        if build._why_unknown(compiler, extra, folder) is None:
            objects.append(str(folder / f"{source.stem}.o"))
            run([*compiler.command, *common, *extra, "-c", str(source), "-o", objects[-1]])
    driver = folder / "drive_cpu"
    run([*compiler.command, *common, *objects, "-o", str(driver)])
    return driver


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("sanitized"), SANITIZERS)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_sanitizers_find_nothing(sanitized: Path, threads: int) -> None:
    said = run([str(sanitized), "heap", str(threads), "500", str(threads)])
    assert f"500 problems with {threads} threads on" in said and "scalar" in said


def test_the_library_itself_stays_inside_its_arrays(tmp_path: Path) -> None:
    """As it was built, optimized: arrays lie next to pages whose access ends the program."""
    library, sources = build.cpu_library(), build.cpu_folder()
    assert library is not None and sources is not None
    driver, compiler = tmp_path / "drive_cpu", build.find_compiler()
    linked = [*PLAIN, "-std=c++17", "-I", str(sources), str(DRIVER), str(library), f"-Wl,-rpath,{library.parent}"]
    run([*compiler.command, *linked, "-o", str(driver)])
    for threads in ("1", "2"):
        assert "1000 problems" in run([str(driver), "guard", f"1{threads}", "1000", threads])


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_valgrind_finds_nothing(tmp_path: Path) -> None:
    """Values that were never written, too. It knows no AVX-512."""
    driver = build_driver(tmp_path, PLAIN, without=("-mavx512", "-mamx"))
    command = ["valgrind", *VALGRIND, str(driver), "heap", "20", "60", "2", "scalar"]
    assert "60 problems" in run([*command, "avx2"] if "avx2" in run([str(driver), "heap", "20", "1", "1"]) else command)
