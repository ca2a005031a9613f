"""Files of `melens check`: refused before any work, written in an order that loses nothing."""

from __future__ import annotations

import os

import planted_report as planted
import pytest
from full_disk import FullDisk

from melens.cli.app import main
from melens.errors import OutputError


@pytest.fixture
def run(capsys):
    def go(*arguments):
        with pytest.raises(SystemExit) as done:
            main(["check", *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return done.value.code or 0, captured.err

    return go


@pytest.fixture
def made(monkeypatch):
    """A check that is done at once; counts how often it ran."""
    from melens import checking
    from melens.cli.job import Job

    ran = []
    monkeypatch.setattr(Job, "load", lambda job: (None, None))
    monkeypatch.setattr(
        checking, "check", lambda *_, **options: ran.append(options) or planted.report("smollm2")
    )
    return ran


@pytest.mark.parametrize("option", ["--junit", "--card"])
def test_a_file_that_cannot_be_written_is_refused_before_any_work(
    run, made, tmp_path, monkeypatch, option
):
    import tempfile

    here = tmp_path / "README.md"
    here.write_text("# A model\n")

    monkeypatch.setattr(tempfile, "TemporaryFile", FullDisk)
    code, stderr = run("any", option, here)
    assert code == 3
    assert (
        stderr == f"melens: cannot write into {tmp_path}: No space left on device; choose "
        f"another place for {option} {here}.\n"
    )
    assert made == []


def test_a_junit_below_a_file_is_refused_before_any_work(run, made, tmp_path):
    (tmp_path / "file").write_text("")
    code, stderr = run("any", "--junit", tmp_path / "file" / "a.xml")
    assert code == 3
    assert stderr.startswith("melens: cannot write into")
    assert stderr.count("\n") == 1
    assert made == []


def test_a_path_of_the_wrong_kind_is_bad_usage_everywhere(run, made, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, said in (
        (("--junit", tmp_path), f"--junit {tmp_path} is a folder"),
        (("--junit", "-"), "--junit - is not a file"),
        (("--card", tmp_path), f"--card {tmp_path} is not a file"),
        (("--card", "-"), "--card - is not a file"),
        (("--out", tmp_path / "file"), f"--out {tmp_path / 'file'} is a file"),
        (("--budget", "foo"), "'--budget': 'foo' is not one of"),
    ):
        code, stderr = run("any", *arguments)
        assert (code, stderr.count("\n")) == (2, 1), stderr
        assert said in stderr
    assert made == []


def test_stages_that_were_taken_up_are_named(run, made, tmp_path, monkeypatch):
    from melens import checking

    stages, report = tmp_path / "stages", planted.report("smollm2")
    stages.mkdir()
    for name in ("describe", "locate"):
        (stages / f"{name}.key").write_text("old")

    def measured(*_, **__):
        os.utime(stages / "describe.key", ns=(1, 1))  # written again: another time
        (stages / "sinks.key").write_text("new")
        return report

    monkeypatch.setattr(checking, "check", measured)
    monkeypatch.setattr("melens.reporting.write_report", lambda *_: [])
    monkeypatch.setattr("melens.cli.output.save_figures", lambda *_: None)
    _, stderr = run("any", "--out", tmp_path)
    assert f"melens: taken up from {stages}: locate\n" in stderr
    assert "taken up" not in run("any", "--out", tmp_path / "other")[1]
    assert "taken up" not in run("any", "--out", tmp_path, "--quiet")[1]


def test_the_probe_leaves_nothing_and_junit_comes_after_the_pages(run, made, tmp_path, monkeypatch):
    from melens import reporting as report

    junit, out = tmp_path / "new" / "a.xml", tmp_path / "out"
    usual = ("any", "--junit", junit, "--out", out)

    def refuse(*_):
        raise OutputError("cannot write the page.")

    with monkeypatch.context() as broken:
        broken.setattr(report, "write_report", refuse)
        assert run(*usual)[0] == 3
    assert not junit.exists()
    assert run(*usual)[0] == 1
    assert junit.read_text().startswith("<?xml")
    assert (out / "report.html").exists()
    assert len(made) == 2
