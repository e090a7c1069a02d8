"""Compiles Triton kernels for GPUs that are not here, as a launch on one would, and reads the machine code."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pytest
import triton
from triton import knobs
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = tuple(name for name in TARGETS if name.startswith("sm_"))
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
INSTRUCTION = r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;"  # of NVIDIA, behind its address
ATOMIC = r"ATOMG|ATOM\.|REDG|RED\.|global_atomic|buffer_atomic"  # on global memory
_CACHE = tempfile.TemporaryDirectory(prefix="hfquant-triton-")


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a kernel: what it was called with."""

    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]
    grid: tuple[int, ...]

    def compile(self, target: str) -> Binary:
        """Machine code for a target of `TARGETS`, made once for launches that would share it."""
        device = TARGETS[target]
        backend = make_backend(device)
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, _ = binder(*self.args, **self.options)
        given = {**self.options, "debug": False}
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, given, bound, specialization, self.options
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        return _compiled(Key(f"{target} {source.hash()} {options.hash()}", source, options), target)


@dataclass(frozen=True)
class Key:
    """What machine code depends on, by its text."""

    text: str
    source: Any = field(compare=False)
    options: Any = field(compare=False)


@lru_cache(maxsize=1024)
def _compiled(key: Key, target: str) -> Binary:
    with knobs.cache.scope():
        knobs.cache.dir = _CACHE.name
        kernel = triton.compile(key.source, target=TARGETS[target], options=key.options.__dict__)
    return Binary(target, kernel.metadata, dict(kernel.asm))


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches inside the block instead of running them; their tensors may be on any device."""
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | options
        launches.append(Launch(kernel, args, options, grid(named) if callable(grid) else grid))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        yield launches


class Binary:
    """Machine code of a kernel for one target."""

    def __init__(self, target: str, metadata: Any, asm: dict[str, Any]) -> None:
        self.target, self.metadata, self.asm = target, metadata, asm

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.metadata.shared

    @cached_property
    def text(self) -> str:
        """The instructions, as the tools of the maker of the GPU write them."""
        return self.asm["amdgcn"] if "amdgcn" in self.asm else self._dump()

    @cached_property
    def lines(self) -> list[str]:
        """One instruction each, with its operands and without predicates, addresses and labels."""
        if "amdgcn" in self.asm:
            return re.findall(r"^\t([a-z]\w+(?:[ \t].*)?)$", self.text, re.MULTILINE)
        return [line for _, line in re.findall(INSTRUCTION, self.text, re.MULTILINE)]

    @cached_property
    def opcodes(self) -> Counter[str]:
        """How often each opcode occurs, with its suffixes."""
        return Counter(line.split()[0] for line in self.lines)

    def count(self, pattern: str, inside: list[str] | None = None) -> int:
        """How many instructions have an opcode that starts like the regular expression."""
        lines = self.lines if inside is None else inside
        return sum(re.match(pattern, line) is not None for line in lines)

    @cached_property
    def loop(self) -> list[str]:
        """The instructions of the longest loop: between a backward branch and where it goes to."""
        if "amdgcn" in self.asm:
            return _longest(self.text, r"^(\.\w+):", r"^\ts_c?branch\w* (\.\w+)", r"^\t([a-z]\w+.*)$")
        # Behind the end of the program lie paths that are rarely taken and jump back into it: they are no loops.
        program = re.split(r"^\s+/\*[0-9a-f]{4,6}\*/\s+EXIT\s*;", self.text, maxsplit=1, flags=re.MULTILINE)[0]
        numbered = re.findall(INSTRUCTION, program, re.MULTILINE)
        at = {int(address, 16): place for place, (address, _) in enumerate(numbered)}
        best: list[str] = []
        for here, (_, line) in enumerate(numbered):
            found = re.match(r"BRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?`?\(?0x([0-9a-f]+)", line)
            begin = at.get(int(found[1], 16), here) if found else here
            if here - begin > len(best):
                best = [text for _, text in numbered[begin : here + 1]]
        return best

    @cached_property
    def registers(self) -> int:
        """Registers of a thread."""
        return self._metadata(r"\.vgpr_count:\s+(\d+)", r"REG:(\d+)")

    @cached_property
    def spilled(self) -> int:
        """Registers that did not fit, or bytes of stack: anything but 0 is a kernel that keeps its sums in memory."""
        return self._metadata(r"\.vgpr_spill_count:\s+(\d+)", r"STACK:(\d+)")

    def _metadata(self, amd: str, cuda: str) -> int:
        (found,) = re.findall(amd if "amdgcn" in self.asm else cuda, self.text)
        return int(found)

    def _dump(self) -> str:
        """Instructions, and what they need."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.asm["cubin"])
            file.flush()
            command = [os.fspath(CUOBJDUMP), "-sass", "-res-usage", file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


def _longest(text: str, label: str, branch: str, instruction: str) -> list[str]:
    """The longest stretch between a label and a branch back to it."""
    seen: dict[str, int] = {}
    lines: list[str] = []
    best: list[str] = []
    for line in text.splitlines():
        if found := re.match(label, line):
            seen[found[1]] = len(lines)
        elif found := re.match(instruction, line):
            lines.append(found[1])
            back = re.match(branch, line)
            if back and len(lines) - seen.get(back[1], len(lines)) > len(best):
                best = lines[seen[back[1]] :]
    return best
