"""A table of names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hfquant import tables
from hfquant.errors import BackendError, SpecError
from hfquant.tables import Table, on_missing


@pytest.fixture
def discovery() -> Iterator[None]:
    """Restore the functions that bring plugins in."""
    saved = list(tables._discover), list(tables._explain)
    yield
    tables._discover[:], tables._explain[:] = saved


@pytest.fixture
def colours(discovery: None) -> Table[int]:
    on_missing(explain=lambda: "")
    table: Table[int] = Table("colour")
    table.add("red", 1, "core")
    table.add("blue", 2, "core")
    return table


def test_get_owner_names(colours: Table[int]) -> None:
    assert colours.get("red") == 1
    assert colours.owner("red") == "core"
    assert colours.names() == ["blue", "red"]
    assert "red" in colours and "green" not in colours


def test_taken_name_is_refused_and_kept(colours: Table[int]) -> None:
    with pytest.raises(BackendError, match="colour 'red' of plugin is already provided by core"):
        colours.add("red", 3, "plugin")
    assert colours.get("red") == 1


def test_unknown_name_lists_what_there_is(colours: Table[int]) -> None:
    with pytest.raises(SpecError, match=r"unknown colour 'rad'\. Did you mean 'red'\? Installed are blue, red"):
        colours.get("rad")


@pytest.mark.parametrize("name", [None, 4, ["red"], b"red"])
def test_name_is_a_string(colours: Table[int], name: object) -> None:
    with pytest.raises(SpecError, match="the name of a colour is a string, got"):
        colours.get(name)  # type: ignore[arg-type]


def test_discovery_stops_at_the_first_that_knows(colours: Table[int]) -> None:
    asked: list[tuple[str, str]] = []

    def first(name: str) -> None:
        asked.append(("first", name))
        if name == "green":
            colours.add("green", 3, "first")

    on_missing(first, lambda name: asked.append(("second", name)), explain=lambda: " Or install more.")
    assert colours.get("red") == 1 and asked == []
    assert colours.get("green") == 3 and asked == [("first", "green")]
    with pytest.raises(SpecError, match=r"Or install more\.$"):
        colours.get("pink")
    assert asked[1:] == [("first", "pink"), ("second", "pink")]


def test_drop_and_restore(colours: Table[int]) -> None:
    before = colours.entries()
    colours.add("green", 3, "plugin")
    colours.drop("plugin")
    assert colours.entries() == before
    colours.drop("core")
    assert colours.names() == []
    colours.restore(before)
    before.clear()
    assert colours.names() == ["blue", "red"]
