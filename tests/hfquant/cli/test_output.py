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
    monkeypatch.delenv("RANK", raising=False)
    if switch is not None:
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", switch)
    with output.progress("measuring", 2) as tick:
        tick()
        tick("the last one")
    written = sys.stderr.getvalue()
    assert output.shows_progress() == shown == ("2/2" in written) == ("the last one" in written)


def test_one_of_several_processes_shows_progress(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    for rank, shown in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert output.shows_progress() == shown


def test_infinite_intervals_become_null(capsys):
    output.print_json({"interval": (float("-inf"), float("inf")), "value": [1.5, None]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "interval": [None, None],
        "value": [1.5, None],
    }


def test_an_error_is_printed_as_it_is(capsys):
    output.error("no [wheels] in C:/[red]")
    assert capsys.readouterr().err == "error: no [wheels] in C:/[red]\n"


@pytest.mark.parametrize(("stream", "shown"), [(Terminal, True), (io.StringIO, False)])
def test_progress_by_shares_names_the_block_and_needs_a_terminal(monkeypatch, stream, shown):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    with output.share_progress("reading") as tick:
        tick("model.layers.0", 0.0)
        tick("model.layers.1", 0.5)
    written = sys.stderr.getvalue()
    assert ("model.layers.1" in written) == ("50%" in written) == ("left" in written) == shown


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_left_follows_from_a_steady_speed():
    clock = Clock()
    left = output.TimeLeft(clock)
    assert left.seconds() is None and left.render(None).plain == "-:--:--"
    left.note(0.0)
    assert left.seconds() is None
    for step in range(1, 11):
        clock.now += 60
        left.note(step / 10)
        assert left.seconds() == pytest.approx(600 - 60 * step)
    assert left.render(None).plain == "0:00:00"


def test_time_left_runs_down_between_steps_and_never_below_nothing():
    clock = Clock()
    left = output.TimeLeft(clock)
    left.note(0.0)
    clock.now += 100
    left.note(0.5)
    clock.now += 30
    assert left.seconds() == pytest.approx(70) and left.render(None).plain == "0:01:10"
    clock.now += 1000
    assert left.seconds() == 0


def test_steps_that_an_earlier_run_had_finished_do_not_promise_the_same_speed():
    clock = Clock()
    left = output.TimeLeft(clock, steps=4)
    for step in range(50):  # finished before: a second each
        left.note(step / 100)
        clock.now += 1
    for step in range(50, 60):  # a minute each
        left.note(step / 100)
        clock.now += 60
    clock.now -= 60
    assert left.seconds() == pytest.approx(60 * 41)


def test_a_step_without_progress_tells_nothing():
    clock = Clock()
    left = output.TimeLeft(clock)
    left.note(0.2)
    clock.now += 5
    left.note(0.2)
    assert left.seconds() is None
