"""Shards of the same tensors are the same bytes, whenever and by whom they are written."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from hfquant.journal import Journal

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@given(st.dictionaries(NAMES, NAMES, max_size=5), st.lists(NAMES.filter(lambda n: n != "__metadata__"), unique=True))
def test_the_metadata_of_a_shard_is_kept_and_has_one_order(tmp_path_factory, metadata, names):
    tensors = {name: torch.arange(index + 1.0) for index, name in enumerate(names)}
    header = {"format": "pt", "hfquant": "gptq", **metadata}
    written = set()
    for attempt in range(4):  # two keys alone come in either order
        folder = tmp_path_factory.mktemp("journal")
        journal = Journal(folder, {"run": attempt}, resume=True)
        journal.write("block", "shard.safetensors", tensors, header)
        journal.close()
        written.add((folder / "shard.safetensors").read_bytes())
    assert len(written) == 1
    with safe_open(folder / "shard.safetensors", framework="pt") as opened:
        assert opened.metadata() == header and set(opened.keys()) == set(names)
        assert all(torch.equal(opened.get_tensor(name), value) for name, value in tensors.items())
