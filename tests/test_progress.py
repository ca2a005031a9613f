"""Progress: a bar on a terminal, a line every few seconds anywhere else, silence where asked."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest

from melens import progress
from melens.progress import Lines, hush, one_command, progress_on, remark, say_once

ALIVE = re.compile(r"melens: 3 of 12 rows, 25 %, \d+ s so far, about \d+ s left\n")


ALWAYS_SAID = {
    "progress.py",
    "cli/app.py",
    "evaluating/harness/__main__.py",
    "evaluating/generated.py",
    "evaluating/harness/run.py",
}
"""Errors; the last two have a callback of that name, which counts items."""


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.02)


def wait_for(told):
    end = time.monotonic() + 20
    while not told():
        assert time.monotonic() < end, "nothing was said"
        time.sleep(0.01)


def test_off_a_terminal_a_long_step_is_no_silence(fast, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    with progress_on("rows") as tick:
        tick(3, 12)
        wait_for(lambda: said.getvalue().count("\n") >= 2)  # no call in between
    done = said.getvalue()
    assert all(ALIVE.fullmatch(line) for line in done.splitlines(keepends=True))
    time.sleep(0.1)
    assert said.getvalue() == done  # the thread ended with the work


def test_a_short_job_says_nothing_and_quiet_never_does(fast, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 60.0)
    before = threading.active_count()
    with progress_on("rows") as tick:
        tick(12, 12)
    monkeypatch.setattr(progress, "EVERY", 0.01)
    with one_command():
        hush()
        with progress_on("rows") as tick:
            tick(1, 12, "a part")
            time.sleep(0.1)
        remark("a note")
    assert capsys.readouterr().err == ""
    remark("the next command's")
    assert capsys.readouterr().err == "melens: the next command's\n"
    assert threading.active_count() == before


def test_a_quiet_command_leaves_nothing_behind(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TQDM_DISABLE", "0")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    with one_command():
        hush()
        assert os.environ["TQDM_DISABLE"] == os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
        say_once("which weights are read, for this test")
    assert os.environ["TQDM_DISABLE"] == "0"
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    for _ in range(2):
        say_once("which weights are read, for this test")
    assert sys.stderr.getvalue() == "melens: note: which weights are read, for this test\n"


def test_another_part_of_the_work_is_said_at_once(capsys):
    with progress_on(None) as tick:
        tick(0, 1000, "locate")
        tick(10, 1000, "locate")
        tick(200, 1000, "sinks")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["melens: locate: 0 %", "melens: sinks: 20 %"]


def test_on_a_terminal_it_is_a_bar(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with progress_on("rows") as tick:
        tick(3, 12, "locate")
        tick(12, 12)
    assert "locate: 100%" in screen.getvalue()
    assert "12/12" in screen.getvalue()
    assert "melens:" not in screen.getvalue()


def test_a_closed_stderr_or_an_error_ends_no_work(fast, monkeypatch):
    gone = io.StringIO()
    gone.close()
    monkeypatch.setattr(sys, "stderr", gone)

    def work():
        with progress_on("rows") as tick:
            tick(1, 2, "a part")
            time.sleep(0.1)
            tick(1 // 0, 2)

    with pytest.raises(ZeroDivisionError):
        work()
    assert not [t for t in threading.enumerate() if t.name == "progress"]


def test_the_line_by_hand():
    lines = Lines("rows", "isolate")
    assert lines.line(4.2) == "isolate: rows, 4 s so far"
    lines.done, lines.total = 1500, 6000
    assert lines.line(10.0) == "isolate: 1,500 of 6,000 rows, 25 %, 10 s so far, about 30 s left"
    lines.done = 6000
    assert lines.line(40.0) == "isolate: 6,000 of 6,000 rows, 100 %, 40 s so far"


def test_only_the_command_line_tells_what_quiet_does_not_silence():
    package = Path(progress.__file__).parent
    telling = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"(?<![\w.])tell\(|stderr\.write", path.read_text("utf-8"))
    }
    assert telling == ALWAYS_SAID


@pytest.mark.parametrize("setting", [("TERM", "dumb"), ("TQDM_DISABLE", "1")])
def test_where_no_bar_can_be_drawn_the_stages_are_lines(monkeypatch, setting):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv(*setting)
    with progress_on(None) as tick:
        tick(0, 1000, "locate")
        tick(500, 1000, "sinks")
    assert [line.split(":")[1] for line in screen.getvalue().splitlines()] == [" locate", " sinks"]


def test_variables_are_after_the_block_what_they_were(monkeypatch):
    from melens.progress import restored

    monkeypatch.setenv("MELENS_THERE", "before")
    monkeypatch.delenv("MELENS_NOT_THERE", raising=False)
    with restored(["MELENS_THERE", "MELENS_NOT_THERE"]):
        os.environ |= {"MELENS_THERE": "within", "MELENS_NOT_THERE": "within"}
    assert os.environ["MELENS_THERE"] == "before"
    assert "MELENS_NOT_THERE" not in os.environ
