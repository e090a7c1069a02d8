"""Progress bars appear where somebody looks, and JSON is JSON."""

from __future__ import annotations

import io
import json
import sys

import pytest

from hfquant.cli import output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "switch", "shown"),
    [(Terminal, None, True), (Terminal, "1", False), (Terminal, "0", True), (io.StringIO, None, False)],
)
def test_progress_needs_a_terminal_and_honours_the_switch(monkeypatch, stream, switch, shown):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    if switch is not None:
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", switch)
    with output.progress("measuring", 2) as tick:
        tick()
        tick("the last one")
    written = sys.stderr.getvalue()
    assert output.shows_progress() == shown == ("2/2" in written) == ("the last one" in written)


def test_infinite_intervals_become_null(capsys):
    output.print_json({"interval": (float("-inf"), float("inf")), "value": [1.5, None]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "interval": [None, None],
        "value": [1.5, None],
    }


def test_an_error_is_printed_as_it_is(capsys):
    output.error("no [wheels] in C:/[red]")
    assert capsys.readouterr().err == "error: no [wheels] in C:/[red]\n"
