"""One resolver of "the ME Layer of this file": a locate.json, or the report of a check."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from planted_report import SAVED, report

from melens.cli.app import main
from melens.errors import ResultError
from melens.results import load_located, load_result
from melens.results.check import located_of

LOCATED = SAVED / "smollm2-135m-bos.locate.json"


@pytest.fixture
def reported(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(report().to_json())
    return path


def test_a_report_gives_the_me_layer_that_it_holds(reported):
    assert load_located(reported) == load_located(LOCATED) == load_result(LOCATED)
    assert load_result(reported).located() == load_result(LOCATED)


def test_other_results_and_unfinished_reports_are_refused(tmp_path):
    other = SAVED / "smollm2-135m.scan.json"
    with pytest.raises(ResultError, match=r"scan\.json holds a result of 'scan'; give a locate"):
        load_located(other)
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
