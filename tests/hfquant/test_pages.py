"""Pages of mapped checkpoint files are given back, and never any that the file could not bring again."""

import io
import struct
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


FILE, SWAPPED, PRESENT = 1 << 61, 1 << 62, 1 << 63


@pytest.mark.parametrize(
    ("entry", "safe"), [(0, True), (PRESENT | FILE, True), (PRESENT, False), (SWAPPED, False), (SWAPPED | FILE, False)]
)
def test_written_pages_count_in_memory_and_swapped_out(entry: int, safe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that was written is no longer one of the file, wherever it is."""
    page = pages.mmap.PAGESIZE
    maps = f"{page:x}-{9 * page:x} rw-p 0 08:01 1 /model\n"
    table = struct.pack("<10Q", *([PRESENT | FILE] * 3), entry, *([PRESENT] * 6))
    files = {"/proc/self/maps": lambda: io.StringIO(maps), "/proc/self/pagemap": lambda: io.BytesIO(table)}
    monkeypatch.setattr(pages, "open", lambda path, *mode, **how: files[path](), raising=False)
    assert pages._is_unwritten_file(2 * page, 4 * page) is safe
    assert not pages._is_unwritten_file(2 * page, 5 * page)  # the next page was written
    assert not pages._is_unwritten_file(2 * page, 10 * page)  # beyond the mapping


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
