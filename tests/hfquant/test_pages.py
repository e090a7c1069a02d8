"""Pages of mapped checkpoint files are given back, and never any that the file could not bring again."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hfquant import pages
from hfquant.pages import release_mapped

SIZE = 1 << 16  # float32 values: many pages


def test_mapped_tensors_keep_their_values_for_everybody_who_maps_the_file(tmp_path: Path) -> None:
    w = torch.randn(SIZE)
    save_file({"w": w}, tmp_path / "w.safetensors")
    one, other = (load_file(tmp_path / "w.safetensors")["w"] for _ in range(2))
    release_mapped(one)
    assert torch.equal(one, w) and torch.equal(other, w)
    release_mapped(other[100:-100])
    assert torch.equal(one, w) and torch.equal(other, w)


@pytest.mark.parametrize("part", [slice(None), slice(SIZE // 4, SIZE // 2)])
def test_what_was_written_to_a_private_mapping_stays(tmp_path: Path, part: slice) -> None:
    torch.save(torch.zeros(SIZE), tmp_path / "w.pt")
    mapped = torch.load(tmp_path / "w.pt", mmap=True)
    mapped[SIZE // 3] = 7  # one page of the mapping is no longer that of the file
    release_mapped(mapped[part])
    assert mapped[SIZE // 3] == 7 and mapped.sum() == 7


def test_ordinary_memory_is_left_alone() -> None:
    w = torch.ones(SIZE)
    release_mapped(w)
    assert w.sum() == SIZE


@pytest.mark.parametrize(("anonymous", "swap", "safe"), [(0, 0, True), (4, 0, False), (0, 4, False), (4, 4, False)])
def test_written_pages_count_in_memory_and_swapped_out(
    anonymous: int, swap: int, safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel counts pages that were written and then moved to swap under Swap, no longer under Anonymous."""
    text = f"1000-9000 rw-p 0 08:01 1 /model\nAnonymous: {anonymous} kB\nSwap: {swap} kB\nVmFlags: rd\n"
    monkeypatch.setattr(pages, "open", lambda path: io.StringIO(text), raising=False)
    assert pages._is_unwritten_file(0x2000, 0x3000) is safe


FREED = """
import sys, torch
from hfquant.pages import return_what_is_freed
def resident():
    status = dict(line.split(":") for line in open("/proc/self/status"))
    return int(status["VmRSS"].split()[0]) * 1024
if sys.argv[1] == "returned":
    return_what_is_freed()
torch.ones(1 << 22)  # the C library takes its size as a hint what to keep from now on
before, large, small = resident(), [], []
for _ in range(40):
    large.append(torch.ones(1 << 21))
    small.append(torch.ones(1 << 16))  # lies between, and stays
del large
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of the GNU C library")
@pytest.mark.parametrize("how", ["kept", "returned"])
def test_large_tensors_that_are_freed_go_back_to_the_system(how: str) -> None:
    done = subprocess.run([sys.executable, "-c", FREED, how], check=True, capture_output=True, text=True, timeout=300)
    left, taken = int(done.stdout), 40 * 4 << 21
    assert left < 0.1 * taken if how == "returned" else left > 0.5 * taken
