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


def ended(arguments, stdout):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=stdout, stderr=subprocess.PIPE
    )
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["diff", SAVED, SAVED], 0),
        (["diff", SAVED, OTHER, "--any-texts"], 1),
        (["diff", SAVED, "nowhere.json"], 2),
        (["--help"], 0),
    ],
)
def test_a_reader_that_left_does_not_change_the_exit_code(arguments, code):
    reader, writer = os.pipe()
    os.close(reader)
    found, said = ended(arguments, writer)
    os.close(writer)
    assert found == code
    assert "pipe" not in said.lower()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("arguments", [["known", "smollm2-135m", SAVED], ["--version"]])
def test_a_full_disk_is_one_line(arguments):
    with Path("/dev/full").open("w") as full:
        code, said = ended(arguments, full)
    assert code == 3
    assert said.count("\n") == 1
    assert "cannot write to standard output: No space left on device" in said


def test_no_arguments_show_the_help(capsys):
    shown = []
    for arguments, code in (([], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == code
        shown.append(capsys.readouterr())
    assert shown[0] == shown[1]
    assert shown[0].out.count("\n") > 30
