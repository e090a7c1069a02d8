"""The library of compiled CPU kernels: how it is built, where it lies, and what it says of how it was built.

Only the standard library, and nothing of hfquant: setup.py loads this file where there is neither torch nor hfquant.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

MACOS = sys.platform == "darwin"
LIBRARY = "libhfquant_cpu.dylib" if MACOS else "libhfquant_cpu.so"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"),
)
OPENMP = "-fopenmp"
# What dispatch.cpp needs from a source that was left out is a weak symbol, which macOS resolves only when loading.
LINK = ("-shared", "-Wl,-undefined,dynamic_lookup") if MACOS else ("-shared", "-Wl,--no-undefined")

_FLAGS_LINE = "// flags:"
_LAST_LINES = 12
_MARK = "hfquant-build:"  # the text behind it, in the library itself, is the record as JSON
_RECORD = """extern "C" {{
extern __attribute__((visibility("default"))) const char hfquant_build_record[];
const char hfquant_build_record[] = {text};
}}
"""
_PROBE = """#ifdef _OPENMP
#include <omp.h>
extern "C" int hfquant_probe() { return omp_get_max_threads(); }
#else
extern "C" int hfquant_probe() { return 1; }
#endif
"""


class BuildError(Exception):
    """The library could not be built; `command` is what failed and `output` the last lines that it said."""

    def __init__(self, message: str, command: tuple[str, ...] = (), output: str = "") -> None:
        self.command, self.output = command, output
        super().__init__("\n".join(part for part in (message, shlex.join(command), output) if part))


class NoCompilerError(BuildError):
    """There is no C++ compiler, or the one that $CXX names does not run."""


@dataclass(frozen=True)
class Compiler:
    """A compiler's command, and the first line of what it says its version is."""

    command: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Build:
    """What was built from what. The library carries it: `read_record`.

    `sources` has the extra flags of each file that is in, `left_out` the reason for each that is not; `digest` is that
    of the folder, headers included. `warnings` is what the compiler had to say, which the library does not carry.
    """

    compiler: str
    version: str
    openmp: bool
    sources: dict[str, list[str]]
    left_out: dict[str, str]
    digest: str
    warnings: str = field(default="", compare=False)

    def lines(self) -> list[str]:
        """One line for the compiler and one for each source."""
        threads = "" if self.openmp else ", without OpenMP: its kernels run on one thread"
        lines = [f"{LIBRARY}: {self.compiler}, {self.version}{threads}"]
        lines += [f"  {name}: {' '.join(['compiled', *flags])}" for name, flags in self.sources.items()]
        return lines + [f"  {name}: left out, {reason}" for name, reason in self.left_out.items()]


def cpu_folder() -> Path | None:
    """The folder of the sources and the library in the installed package, None if the package is not installed."""
    spec = importlib.util.find_spec("hfquant.kernels")
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) / "cpu" if places else None


def cpu_library() -> Path | None:
    """The library of the installed package, from a wheel or in the tree of an editable install; None if not built."""
    folder = cpu_folder()
    return folder / LIBRARY if folder and (folder / LIBRARY).is_file() else None


def build_cpu_library() -> Build:
    """Build the library of the installed package into its folder. Raises like `build_library`."""
    folder = cpu_folder()
    if folder is None:
        raise BuildError("hfquant runs from a folder that is not installed: pip install -e . in that folder")
    return build_library(folder, folder)


def build_library(sources: Path, target: Path) -> Build:
    """Compile the *.cpp files of a folder, and replace the library in the folder `target` in one step.

    A source may ask for more flags in its first line ("// flags: -mavx2"); it is left out where the compiler does not
    know them. Raises NoCompilerError, or BuildError if there are no sources, or compiling or linking fails.
    """
    files = sorted(sources.resolve().glob("*.cpp"))
    if not files:
        raise BuildError(f"there are no *.cpp files in {sources}")
    target.mkdir(parents=True, exist_ok=True)
    if not os.access(target, os.W_OK):
        raise BuildError(f"{target} is not writable")
    compiler = find_compiler()
    with tempfile.TemporaryDirectory(prefix="hfquant-") as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        work = Path(scratch)
        common = _common_flags(compiler, work)
        wanted = {file: extra_flags(file) for file in files}
        reasons = pool.map(lambda extra: _why_unknown(compiler, extra, work), wanted.values())
        unknown = dict(zip(files, reasons, strict=True))
        built = Build(
            compiler=shlex.join(compiler.command),
            version=compiler.version,
            openmp=OPENMP in common,
            sources={file.name: extra for file, extra in wanted.items() if unknown[file] is None},
            left_out={file.name: reason for file, reason in unknown.items() if reason is not None},
            digest=digest(sources),
        )
        jobs = [(file, wanted[file]) for file in files if unknown[file] is None]
        jobs.append((_write_record(built, work), []))
        said = list(pool.map(lambda job: _compile(compiler, [*common, *job[1]], job[0], work), jobs))
        _link(compiler, common, [_object(file, work) for file, _ in jobs], target)
    return Build(**{**asdict(built), "warnings": "".join(said)})


def read_record(library: Path) -> Build | None:
    """What a library says of how it was built, without loading it; None if it says nothing."""
    data = library.read_bytes()
    start = data.find(_MARK.encode() + b"{")
    if start < 0:
        return None
    text = data[start + len(_MARK) : data.index(b"\0", start)]
    return Build(**json.loads(text))


def digest(folder: Path) -> str:
    """A hash of the sources and headers of a folder, by name: whether a library was built from those that lie there."""
    total = hashlib.sha256()
    for file in sorted([*folder.glob("*.cpp"), *folder.glob("*.h")]):
        total.update(f"{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def find_compiler() -> Compiler:
    """The compiler in $CXX, which may have arguments, or the first of c++, g++ and clang++ that runs.

    Raises NoCompilerError; what $CXX names is never replaced by another one.
    """
    asked = os.environ.get("CXX", "").strip()
    tried = []
    for command in [_words(asked)] if asked else [[name] for name in COMPILERS]:
        if shutil.which(command[0]) is None:
            tried.append(f"{command[0]} is not there")
            continue
        done = _run([*command, "--version"])
        if done.returncode == 0 and done.stdout.strip():
            return Compiler(tuple(command), done.stdout.strip().splitlines()[0])
        tried.append(f"`{shlex.join(command)} --version` fails")
    what = f"CXX={asked} is no C++ compiler that runs" if asked else "no C++ compiler was found"
    raise NoCompilerError(f"{what} ({', '.join(tried)})")


def extra_flags(source: Path) -> list[str]:
    """The flags that the first line of a source asks for."""
    with source.open(encoding="utf-8") as lines:
        first = lines.readline()
    return shlex.split(first.removeprefix(_FLAGS_LINE)) if first.startswith(_FLAGS_LINE) else []


def _words(command: str) -> list[str]:
    """A command line as a list; a path with spaces that is there is one word."""
    try:
        return [command] if shutil.which(command) else shlex.split(command)
    except ValueError:  # a quote that is never closed
        return [command]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; `stdout` holds all that it said, in English."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except OSError as problem:  # a file that cannot be executed
        return subprocess.CompletedProcess(command, 127, str(problem))


def _checked(command: list[str], what: str) -> str:
    """What a command says, or BuildError with its last lines."""
    done = _run(command)
    if done.returncode:
        raise BuildError(what, tuple(command), "\n".join(done.stdout.splitlines()[-_LAST_LINES:]))
    return done.stdout


def _common_flags(compiler: Compiler, work: Path) -> list[str]:
    """The flags of all sources: without OpenMP for compilers that come without it, as Apple's does."""
    probe = work / "probe.cpp"
    probe.write_text(_PROBE)
    rest = [*LINK, str(probe), "-o", str(work / "probe.library")]
    if _run([*compiler.command, *FLAGS, OPENMP, *rest]).returncode == 0:
        return [*FLAGS, OPENMP]
    _checked([*compiler.command, *FLAGS, *rest], "the compiler cannot build a C++17 library")
    return list(FLAGS)


def _why_unknown(compiler: Compiler, extra: list[str], work: Path) -> str | None:
    """What the compiler has against some flags, or None. clang only warns of flags for other processors."""
    if not extra:
        return None
    done = _run([*compiler.command, *extra, "-Werror", "-fsyntax-only", str(work / "probe.cpp")])
    if done.returncode == 0:
        return None
    errors = [line for line in done.stdout.splitlines() if "error" in line] or done.stdout.splitlines()
    return (errors or [f"the compiler does not take {shlex.join(extra)}"])[0].strip()


def _object(source: Path, work: Path) -> Path:
    return work / f"{source.stem}.o"


def _compile(compiler: Compiler, flags: list[str], source: Path, work: Path) -> str:
    command = [*compiler.command, *flags, "-c", str(source), "-o", str(_object(source, work))]
    return _checked(command, f"{source.name} does not compile")


def _link(compiler: Compiler, flags: list[str], objects: list[Path], target: Path) -> None:
    """Link next to the library and rename: whoever has the old one loaded keeps it, and nobody sees half of one."""
    made = target / f".{os.getpid()}.{LIBRARY}"
    try:
        command = [*compiler.command, *flags, *LINK, *map(str, objects), "-o", str(made)]
        _checked(command, f"{LIBRARY} cannot be linked")
        os.replace(made, target / LIBRARY)
    finally:
        made.unlink(missing_ok=True)


def _write_record(built: Build, work: Path) -> Path:
    """A source that puts the record into the library. JSON of JSON is ASCII, and a C string."""
    record = asdict(built)
    del record["warnings"]
    source = work / "hfquant_build_record.cpp"
    source.write_text(_RECORD.format(text=json.dumps(_MARK + json.dumps(record))))
    return source
