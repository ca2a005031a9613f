"""Standard output that nobody reads, or that cannot be written; and no arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from melens.cli.app import main

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SAVED = str(RESULTS / "smollm2-135m.locate.json")
OTHER = str(RESULTS / "smollm2-135m-bos.locate.json")
PROGRAM = "from melens.cli import main; main()"


STREAMS = [{}, {"PYTHONUNBUFFERED": "1"}, {"PYTHONIOENCODING": "ascii"}]
"""typer wraps the buffer of an ascii stream anew."""


def ended(arguments, stdout, how, stderr=subprocess.PIPE):
    given = {name: value for name, value in os.environ.items() if not name.startswith("PYTHONUN")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=stdout, stderr=stderr, env=given | how
    )
    return done.returncode, (done.stderr or b"").decode()


@pytest.mark.parametrize(
    ("arguments", "code", "how"),
    [
        *((["diff", SAVED, OTHER, "--any-texts"], 1, how) for how in STREAMS),
        (["diff", SAVED, SAVED], 0, STREAMS[2]),
        (["--help"], 0, STREAMS[0]),
    ],
)
def test_a_reader_that_left_does_not_change_the_exit_code(arguments, code, how):
    reader, writer = os.pipe()
    os.close(reader)
    found, said = ended(arguments, writer, how)
    os.close(writer)
    assert found == code
    assert "pipe" not in said.lower()


def test_nor_does_one_of_both_streams():
    reader, writer = os.pipe()
    os.close(reader)
    found, _ = ended(["diff", SAVED, "nowhere.json"], writer, STREAMS[0], stderr=writer)
    os.close(writer)
    assert found == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("how", STREAMS)
def test_a_full_disk_is_one_line(how):
    with Path("/dev/full").open("w") as full:
        code, said = ended(["known", "smollm2-135m", SAVED], full, how)
    assert code == 3
    assert said.count("\n") == 1
    assert "cannot write to standard output: No space left on device" in said


@pytest.mark.parametrize(("given", "skipped"), [("", True), ("['--version']", False)])
def test_the_program_alone_ends_without_a_last_collection(given, skipped):
    """Whoever calls it with arguments goes on, and what they left must be collected."""
    code = "import atexit, gc; from melens.cli import main; "
    code += f"atexit.register(lambda: print(gc.get_freeze_count() > 0)); main({given})"
    called = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(called, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(skipped)


def test_no_arguments_show_the_help(capsys):
    shown = []
    for arguments, code in (([], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == code
        shown.append(capsys.readouterr())
    assert shown[0] == shown[1]
    assert shown[0].out.count("\n") > 30


@pytest.mark.parametrize("closed", ["2>&-", ">&-"])
def test_a_stream_that_is_closed_changes_no_exit_code(closed):
    line = f'"$0" -c "$1" diff "$2" "$3" --any-texts {closed}'
    called = ["bash", "-c", line, sys.executable, PROGRAM, SAVED, OTHER]
    done = subprocess.run(called, capture_output=True)
    assert done.returncode == 1
    assert bool(done.stdout) == (closed == "2>&-")
