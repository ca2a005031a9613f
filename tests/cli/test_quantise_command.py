"""melens quantise, from the command line to the files."""

from __future__ import annotations

import json

import pytest
import words
from planted import plant

from melens.cli.app import main
from melens.results import load_result
from melens.results.quantise import Quantisation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return words.save(
        plant("llama", "single", 1).model, tmp_path_factory.mktemp("models") / "planted"
    )


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{10 + i * 7 % 100}" for i in range(400)))
    return path


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    out = capsys.readouterr()
    return caught.value.code, out.out, out.err


def test_a_run_writes_result_rows_and_figures_and_goes_on_where_it_was(
    folder, text, tmp_path, capsys
):
    out = tmp_path / "out"
    line = ["quantise", folder, "--text", text, "--bos", "--n-seq", 2, "--length", 24]
    line += ["--scheme", "w8a8-token,kv4-token", "--control-seeds", 0, "--out", out]
    code, said, _ = run(capsys, *line)
    assert code == 0
    assert "what helps cannot be said of so few texts" in " ".join(said.split())
    found = load_result(out / "quantise.json")
    assert isinstance(found, Quantisation)
    assert [one.scheme for one in found.schemes] == ["w8a8-token", "kv4-token"]
    for name in ("quantise.jsonl", "quantise.png", "locate.json"):
        assert (out / name).is_file()
    rows = (out / "quantise.jsonl").read_text()
    code, _, _ = run(capsys, *line, "--json")
    assert code == 0
    assert (out / "quantise.jsonl").read_text() == rows
    again = load_result(out / "quantise.json")
    assert isinstance(again, Quantisation)
    assert again.schemes == found.schemes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--scheme", "w8a8"], "unknown scheme 'w8a8'. Did you mean"),
        (["--control-seeds", "-1"], "--control-seeds must be from 0"),
        (["--first", "0"], "first"),
        (["--super-weights", "no.json"], "no.json"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(given, said, capsys):
    code, out, err = run(capsys, "quantise", "no-such-model", *given)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_weights_of_another_model_are_refused(folder, text, tmp_path, capsys):
    from pathlib import Path

    docs = Path(__file__).parents[2] / "docs" / "results"
    other = docs / "gemma3-270m.super-weights.json"
    line = ["quantise", folder, "--text", text, "--n-seq", 2, "--length", 24, "--scheme", "w8a16"]
    code, _, err = run(capsys, *line, "--super-weights", other)
    assert code == 2
    assert "super weights are of" in err
    assert json.loads(other.read_text())["run"]["model"].split("/")[-1] in err
