"""One resolver of "the ME Layer of this file": a locate.json, or the report of a check."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from planted_report import SAVED, report

from melens.cli.app import main
from melens.cli.options import RunOptions
from melens.errors import ResultError
from melens.results import load_located, load_result
from melens.results.reading import located_in, located_of

LOCATED = SAVED / "smollm2-135m-bos.locate.json"
SCAN = SAVED / "smollm2-135m.scan.json"


@pytest.fixture
def reported(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(report().to_json())
    return path


def test_a_report_gives_the_me_layer_that_it_holds(reported):
    assert load_located(reported) == load_located(LOCATED) == load_result(LOCATED)
    assert load_result(reported).located() == load_result(LOCATED)


def test_other_results_and_unfinished_reports_are_refused(tmp_path):
    other = SAVED / "smollm2-135m.sinks.json"
    with pytest.raises(ResultError, match=r"sinks\.json holds a result of 'sinks'; give a locate"):
        load_located(other)
    with pytest.raises(ResultError, match=r"only predicts an ME Layer \(11, from 0\), and here a"):
        load_located(SCAN)
    with pytest.raises(ResultError, match="r: this is a report whose locate stage did not finish"):
        located_of(report().model_copy(update={"results": {}}), "r")


def test_commands_take_it(reported, tmp_path, capsys):
    """`known` and `plot` alike on both; what --located reads goes through the same function."""
    outs = []
    for path in (reported, LOCATED):
        with pytest.raises(SystemExit) as done:
            main(["known", "smollm2-135m", str(path)])
        outs.append((done.value.code or 0, capsys.readouterr().out))
        with pytest.raises(SystemExit) as done:
            main(["plot", str(path), "-o", str(tmp_path / f"{len(outs)}.png")])
        assert not done.value.code
        capsys.readouterr()
    assert outs[0] == outs[1]
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    from melens.cli.job import Job

    assert Job._read_located(SimpleNamespace(located=reported)) == load_result(LOCATED)
    from melens.evaluating.harness.settings import _located
    from melens.results.edit import Edit

    assert _located(reported, Edit()) == load_result(LOCATED)


def test_a_scan_predicts_so_the_layer_is_located_and_both_are_said(capsys, monkeypatch):
    from melens.cli.job import Job

    found = load_result(LOCATED)
    monkeypatch.setattr("melens.locating.locate", lambda *_, **__: found)
    job = Job("m", RunOptions(), located=SCAN)
    job.saved = job._read_located()
    assert job.saved is None
    assert job.locate(None, None) is found
    said = capsys.readouterr().err
    assert "only predicts an ME Layer (11, from 0); located now, the ME Layer is 11." in said


def test_python_takes_whatever_holds_an_me_layer():
    """As the file options do; what it holds is taken out in one place."""
    found = load_result(LOCATED)
    assert located_in(None) is None
    assert located_in(found) is found
    assert located_in(report()) == found
    assert located_in(load_result(SCAN)) is None
    for given, says in (
        (load_result(SCAN), "me_layer is a scan and only predicts"),
        (load_result(SAVED / "smollm2-135m.sinks.json"), "holds a result of 'sinks'"),
        (3, "must be what melens.locate returns, or a check's report, got int"),
    ):
        with pytest.raises(ResultError, match=says):
            located_in(given, here=False)


@pytest.mark.parametrize("given", [3, None, b"x.json", [1], {}])
def test_what_is_not_a_path_is_no_file_of_a_result(given):
    for read in (load_result, load_located):
        with pytest.raises(ResultError, match="a result is read from a file: give its path"):
            read(given)
