"""Checks of an installation, each with its reason: versions, plugins, devices, kernels, disk, optional libraries."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from . import cpu, gpu
from .backend import backends
from .build import NoCompilerError, cpu_folder, cpu_library, digest, find_compiler, read_record
from .kernel import KERNELS

OK, NOTE, BROKEN = "ok", "note", "broken"
LOW_DISK = 10e9  # bytes: less than a small model and its quantized copy


@dataclass(frozen=True)
class Check:
    """One finding: `state` is "ok", "note" (worth knowing, nothing is broken) or "broken"; `detail` says why."""

    topic: str
    name: str
    state: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        """Plain JSON types."""
        return asdict(self)


def examine() -> list[Check]:
    """All checks, in the order in which they are worth reading."""
    checks: list[Check] = []
    for look in (_versions, _plugins, _devices, _kernels, _library, _disk, _optional):
        checks += look()
    return checks


def is_broken(checks: Iterable[Check]) -> bool:
    """Whether something has to be repaired."""
    return any(check.state == BROKEN for check in checks)


def check_requirement(requirement: Requirement) -> Check:
    """Whether what is installed lies in the range that hfquant supports."""
    wanted = str(requirement.specifier) or "any version"
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        repair = f"pip install '{requirement.name}{requirement.specifier}'"
        return Check("versions", requirement.name, BROKEN, f"not installed, needs {wanted}: {repair}")
    if not requirement.specifier.contains(found, prereleases=True):
        repair = f"pip install '{requirement.name}{requirement.specifier}'"
        return Check("versions", requirement.name, BROKEN, f"{found} is outside {wanted}: {repair}")
    return Check("versions", requirement.name, OK, f"{found} ({wanted})")


def _requirements() -> list[tuple[Requirement, str | None]]:
    """What hfquant's metadata asks for here: a requirement, and the extra it belongs to or None."""
    found: list[tuple[Requirement, str | None]] = []
    for line in requires("hfquant") or []:
        requirement = Requirement(line)
        extras = [part.split('"')[1] for part in str(requirement.marker or "").split("extra ==")[1:]]
        extra = extras[0] if extras else None
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""})
        if applies and requirement.name != "hfquant":
            found.append((requirement, extra))
    return found


def _versions() -> Iterator[Check]:
    yield Check("versions", "python", OK, f"{platform.python_version()} on {platform.platform()}")
    try:
        yield Check("versions", "hfquant", OK, version("hfquant"))
    except PackageNotFoundError:
        why = "runs from a folder that is not installed, so no plugin is found: pip install -e . in that folder"
        yield Check("versions", "hfquant", BROKEN, why)
        return
    yield from (check_requirement(requirement) for requirement, extra in _requirements() if extra is None)


def _plugins() -> Iterator[Check]:
    limit = os.environ.get("HFQUANT_BACKENDS")
    if limit is not None:
        yield Check("plugins", "HFQUANT_BACKENDS", NOTE, f"only {limit or 'none'} may load")
    found = backends()
    if not found:
        yield Check("plugins", "none", NOTE, "no backend is installed beside the core's own methods")
    for plugin in found:
        if plugin.error:
            why = f"{plugin.source} cannot be used; repair or uninstall it\n{plugin.error.rstrip()}"
            yield Check("plugins", plugin.name, BROKEN, why)
        else:
            yield Check("plugins", plugin.name, OK, f"{plugin.distribution} {plugin.version}")


def devices() -> dict[str, str]:
    """The torch devices of this machine by type, and what they are."""
    found = {"cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        found["cuda"] = ", ".join(_cuda(index) for index in range(torch.cuda.device_count()))
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found["xpu"] = f"{torch.xpu.device_count()} devices"
    return found


def _cuda(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 1e9:.0f} GB"


def _devices() -> Iterator[Check]:
    found = devices()
    yield from (Check("devices", name, OK, what) for name, what in found.items())
    if list(found) == ["cpu"]:
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        yield Check("devices", "accelerator", NOTE, f"none: {reason}")


def _kernels() -> Iterator[Check]:
    for device in devices():
        names = [name for name in KERNELS.names() if KERNELS.get(name).device in ("*", device)]
        if device == "cuda" and (reason := gpu.missing()):
            yield Check("kernels", device, NOTE, reason)
            continue
        fast = [name for name in names if name != "reference"]
        if fast:
            yield Check("kernels", device, OK, ", ".join(names))
        else:
            why = "reference only: runs every method by dequantizing, so it saves memory but no time"
            yield Check("kernels", device, NOTE, why)


def _library() -> Iterator[Check]:
    """The compiled CPU kernels, and what they run on here."""
    library = cpu_library()
    if library is None:
        yield Check("kernels", "cpu library", NOTE, f"not built: {_why_not_built()}")
        return
    yield check_library(library)
    found = cpu.library()
    if isinstance(found, str):
        yield Check("kernels", "cpu instructions", BROKEN, found)
    else:
        others = ", ".join(isa for isa in found.isas() if isa != found.isa)
        yield Check("kernels", "cpu instructions", OK, f"{found.isa}; HFQUANT_CPU_ISA can ask for {others}")


def check_library(library: Path) -> Check:
    """Whether a library of compiled kernels loads here, and was built from the sources next to it."""
    again = "compile it here: hfquant doctor --build"
    try:
        ctypes.CDLL(str(library))
    except OSError as problem:
        return Check("kernels", "cpu library", BROKEN, f"does not load ({problem}); {again}")
    record = read_record(library)
    if record is None or record.digest != digest(library.parent):
        return Check("kernels", "cpu library", NOTE, f"{library} was built from other sources than now; {again}")
    threads = "" if record.openmp else ", without OpenMP: one thread"
    return Check("kernels", "cpu library", OK, f"{library}, built with {record.version}{threads}")


def _why_not_built() -> str:
    folder = cpu_folder()
    if folder is None or not folder.is_dir():
        return "the package hfquant.kernels is not installed: pip install hfquant, or pip install -e . in its folder"
    try:
        compiler = find_compiler()
    except NoCompilerError as problem:
        return f"{problem}; install one (g++ or clang++), then: hfquant doctor --build"
    return f"hfquant doctor --build compiles it, with {compiler.version}"


def _disk() -> Iterator[Check]:
    from huggingface_hub.constants import HF_HUB_CACHE

    places: dict[str, Any] = {"working folder": Path.cwd(), "model cache": Path(HF_HUB_CACHE)}
    for name, place in places.items():
        yield check_folder(name, place)


def check_folder(name: str, folder: Path) -> Check:
    """Whether there is room in a folder, or in the one where it would be created, and whether it can be written."""
    there = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Check("disk", name, NOTE, f"{folder} is not writable")
    state = OK if free >= LOW_DISK else NOTE
    return Check("disk", name, state, f"{folder}: {free / 1e9:.1f} GB free")


def _optional() -> Iterator[Check]:
    try:
        optional = [(requirement, extra) for requirement, extra in _requirements() if extra not in (None, "dev", "all")]
    except PackageNotFoundError:
        return
    for requirement, extra in optional:
        check = check_requirement(requirement)
        if check.detail.startswith("not installed"):
            yield Check("optional", requirement.name, NOTE, f"not installed: pip install 'hfquant[{extra}]'")
        else:
            yield Check("optional", requirement.name, NOTE if check.state == BROKEN else OK, check.detail)
