"""melens census: what is here is found, measured, held against the record, and goes on."""

from __future__ import annotations

import json
import os
import shutil

import pandas as pd
import pytest
from planted import plant
from words import tokenizer as words

from melens.batches import prompts
from melens.cli.app import main
from melens.comparing import Survey, census, surveying
from melens.comparing.found_models import find_models
from melens.errors import ModelError, ModelNotFoundError, OutputError, ResultError
from melens.figures import save_figure
from melens.results import Census, CensusRow, load_result

TEXT = prompts(" ".join(f"w{i % 50}" for i in range(200)), n=2, length=24, bos=True)
LOCATED = Survey(locate=True)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """Two planted models, one of them in a hub's cache, beside what cannot be read."""
    place = tmp_path_factory.mktemp("machine")
    planted = plant("llama", "single", 1)
    planted.model.save_pretrained(place / "a-planted")
    words().save_pretrained(place / "a-planted")
    cached = place / "hub" / "models--org--nothing-here"
    plant("llama", "none", 2).model.save_pretrained(cached / "snapshots" / "abc")
    words().save_pretrained(cached / "snapshots" / "abc")
    (cached / "snapshots" / "old").mkdir()
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc\n")
    (place / "torn").mkdir()
    shutil.copy(place / "a-planted" / "config.json", place / "torn")
    whole = (place / "a-planted" / "model.safetensors").read_bytes()
    (place / "torn" / "model.safetensors").write_bytes(whole[:-100])
    (place / "deep" / "er").mkdir(parents=True)
    (place / "deep" / "er" / "x-00001-of-00002.gguf").write_bytes(b"GGUF")
    (place / "deep" / "er" / "x-00002-of-00002.gguf").write_bytes(b"GGUF")
    (place / "only-a-config").mkdir()
    (place / "only-a-config" / "config.json").write_text("{}")
    return place, planted.truth


NAMES = ["a-planted", "x-00001-of-00002.gguf", "org/nothing-here", "torn"]


def test_what_is_here_is_found_once_and_by_its_published_name(machine, tmp_path, monkeypatch):
    place, _ = machine
    found = find_models([place, place / "a-planted", place / "hub"])
    assert [one.name for one in found] == NAMES
    assert [one.kind for one in found] == ["folder", "gguf", "folder", "folder"]
    assert found[2].model.endswith("snapshots/abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path))
    assert [one.name for one in find_models()] == ["org/nothing-here"]  # no place: this machine
    shutil.copytree(place / "a-planted", tmp_path / "models" / "a-copy")
    assert [one.name for one in find_models()] == ["org/nothing-here", "a-copy"]
    shutil.copytree(place / "a-planted", tmp_path / "a-planted")
    twice = find_models([place / "a-planted", tmp_path / "a-planted"])
    assert [one.name for one in twice] == [one.model for one in twice]  # each by its path


def test_bad_places_are_refused_before_anything_is_read(machine, tmp_path, monkeypatch):
    place, _ = machine
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("")
    monkeypatch.setattr(surveying, "_row", lambda *_: pytest.fail("a model was read"))
    for bad, error, match in (
        (tmp_path / "empty", ModelError, "holds no model"),
        (tmp_path / "a.txt", ModelError, "is a file, but no .gguf"),
        ("./nowhere", ModelNotFoundError, "there is no file or folder"),
        ("smollm2-135n", ModelNotFoundError, "Did you mean 'smollm2-135m'"),
        ("org/not-here", ModelNotFoundError, "not in the hub's cache"),
    ):
        monkeypatch.setenv("MELENS_OFFLINE", "1")
        with pytest.raises(error, match=match):
            census([place / "a-planted", bad])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="name a folder, a file or an id"):
        census()
    with pytest.raises(ModelError, match="must be a Survey"):
        census([place], survey="locate")


@pytest.fixture(scope="module")
def located(machine):
    seen = []
    result = census([machine[0]], TEXT, survey=LOCATED, progress=lambda *at: seen.append(at))
    return result, seen


def test_every_model_is_a_row_and_a_failure_stops_nothing(machine, located):
    (result, seen), truth = located, machine[1]
    assert [row.name for row in result.models] == NAMES
    assert seen[0] == (0, 4, "a-planted")
    assert seen[-1][:2] == (4, 4)
    first, gguf, nothing, torn = result.models
    assert (first.me_layer, first.verdict, first.how) == (truth.me_layer, "single", "located")
    assert truth.dim in first.dims
    assert first.predicted == truth.me_layer
    assert first.depth == truth.me_layer / (first.n_layers - 1)
    assert first.family == "llama"
    stored = sum(p.numel() for p in plant("llama", "single", 1).model.parameters())
    assert first.parameters == stored
    assert 0 <= first.sink_rate <= 1
    assert (nothing.me_layer, nothing.verdict, nothing.depth) == (None, "none", None)
    assert {row.name for row in result.failed} == {gguf.name, torn.name}
    assert "truncated" in torn.error
    assert "2 located, 0 predicted from the weights, 2 failed" in result.summary()


def test_a_scan_alone_predicts(machine):
    place, truth = machine
    result = census(str(place / "a-planted"), survey=Survey(reach=False))
    (row,) = result.models
    assert (row.how, row.me_layer, row.largest) == ("predicted", truth.me_layer, None)
    assert row.verdict is row.sink_rate is row.published is row.match is None


def test_the_result_is_a_result(located, tmp_path):
    result, _ = located
    assert Census.from_json(result.to_json()) == result
    assert list(result.to_frame().name) == NAMES
    assert result.to_csv().count("\n") == 5
    assert r"\toprule" in result.to_latex(columns=["name", "depth"])
    assert result.arrays()["main.me_layer"][0] == result.models[0].me_layer
    path = save_figure(result.plot(), tmp_path / "depth.png")
    assert path.stat().st_size > 1000
    axes = result.plot().axes[0]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"] == [
        result.models[0].depth
    ]
    assert [t.get_text() for t in axes.texts].count("failed") == 2
    for change, says in (
        ({"models": []}, "has a model"),
        ({"models": [result.models[0].model_dump()] * 2}, "comes twice"),
    ):
        data = json.loads(result.to_json()) | change
        with pytest.raises(ResultError, match=says):
            Census.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"me_layer": 99}, "layers must be within"),
        ({"dims": (9999,)}, "dimensions must be within"),
        ({"error": "broken"}, "has no numbers"),
        ({"how": None}, "has layers, a width and an answer"),
    ],
)
def test_a_row_that_no_run_made_is_refused(located, change, says):
    row = located[0].models[0]
    with pytest.raises(ValueError, match=says):
        CensusRow.model_validate({**row.model_dump(), **change})


def test_an_interrupted_census_goes_on(machine, tmp_path, monkeypatch):
    place, out = machine[0], tmp_path / "out"
    measured, original = [], surveying._measured

    def stop(done, total, name):
        if name == "torn":
            raise KeyboardInterrupt

    def counting(one, *given):
        measured.append(one.name)
        return original(one, *given)

    monkeypatch.setattr(surveying, "_measured", counting)
    survey = Survey(reach=False)
    with pytest.raises(KeyboardInterrupt):
        census([place], survey=survey, out=out, progress=stop)
    assert measured == ["a-planted", "org/nothing-here"]
    again = census([place], survey=survey, out=out)
    assert measured == ["a-planted", "org/nothing-here"]  # what failed to open is tried again
    assert [row.name for row in again.models] == NAMES
    assert load_result(out / "models" / "a-planted" / "scan.json").me_layer is not None
    assert (out / "models" / surveying.folder_of("org/nothing-here") / "scan.json").is_file()
    assert surveying.folder_of("a/b") != surveying.folder_of("a_b") == "a_b"
    assert surveying.folder_of("../..").count("/") == 0
    with pytest.raises(ResultError, match="other settings"):
        census([place], survey=Survey(reach=False, seed=1), out=out)
    changed = tmp_path / "changed"
    shutil.copytree(place / "a-planted", changed / "a-planted")
    config = changed / "a-planted" / "config.json"
    config.write_text(config.read_text().replace("{", '{"note": 1,', 1))
    census([changed], survey=survey, out=out)
    assert measured[2:] == ["a-planted"]  # other files of the same name are measured
    surveying.remove_kept(out)
    assert not (out / surveying.KEPT).exists()


def test_what_cannot_be_written_is_no_models_fault(machine, tmp_path, monkeypatch):
    def full(*_):
        raise OutputError("cannot write: the disk is full.")

    monkeypatch.setattr(surveying, "_save", full)
    with pytest.raises(OutputError, match="disk is full"):
        census([machine[0] / "a-planted"], survey=Survey(reach=False), out=tmp_path)


def test_a_model_that_does_not_fit_is_scanned_and_says_so(machine, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    monkeypatch.setattr(surveying, "_run", lambda *_: pytest.fail("it was loaded"))
    (row,) = census([machine[0] / "a-planted"], TEXT, survey=LOCATED).models
    assert row.how == "predicted"
    assert "--stream" in row.note


def test_a_model_that_cannot_be_run_keeps_its_scan(machine, monkeypatch):
    def broken(*_):
        raise ModelError("no tokenizer.")

    monkeypatch.setattr(surveying, "_run", broken)
    (row,) = census([machine[0] / "a-planted"], TEXT, survey=LOCATED).models
    assert (row.how, row.note) == ("predicted", "not located: no tokenizer.")


def test_a_result_is_held_against_the_record_of_its_size(machine, tmp_path, monkeypatch):
    """A folder that is called like a published model but is of another size is not on record."""
    shutil.copytree(machine[0] / "a-planted", tmp_path / "Qwen3-8B")
    (row,) = census([tmp_path], survey=Survey(reach=False)).models
    assert row.published is None
    monkeypatch.setattr("melens.published.holding.fits_model", lambda *_: True)
    monkeypatch.setattr("melens.published.weights.fits_model", lambda *_: True)
    (row,) = census([tmp_path], survey=Survey(reach=False)).models
    assert (row.published, row.match) == ("6", "match" if row.me_layer == 6 else "mismatch")
    if row.me_layer != 6:
        assert "ME Layer: " in row.off
        assert "layer" in row.off


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["census", *map(str, arguments)])
    return ended.value.code or 0


def test_the_command_writes_table_figure_parquet_and_card(machine, tmp_path, capsys):
    place, truth = machine
    card, table, out = tmp_path / "README.md", tmp_path / "c.parquet", tmp_path / "out"
    card.write_text("# Mine\n")
    assert not run(place, "--no-reach", "--out", out, "--parquet", table, "--card", card)
    text = capsys.readouterr().out
    assert f"{truth.me_layer} of " in text
    assert "torn failed: " in text
    assert {path.name for path in out.iterdir()} == {
        "census.json",
        "census.png",
        "census.svg",
        "models",
    }
    frame = pd.read_parquet(table)
    assert list(frame.name) == NAMES
    assert frame.dims[0].tolist() == [truth.dim]
    said = card.read_text()
    assert said.startswith("# Mine\n")
    assert f"| {truth.me_layer} of " in said
    assert said.count("melens census: start") == 1
    assert not run(place, "--no-reach", "--json", "--card", card)
    assert json.loads(capsys.readouterr().out)["schema"] == "melens/census/1"
    assert card.read_text() == said


def test_the_command_refuses_first(machine, tmp_path, capsys, monkeypatch):
    place = machine[0]
    monkeypatch.setattr(surveying, "find_models", lambda _: pytest.fail("work began"))
    for arguments, code, match in (
        (["--parquet", tmp_path / "c.csv"], 2, "ends in .parquet"),
        (["--card", tmp_path / "none.md"], 2, "cannot read"),
        (["--out", place / "torn" / "config.json"], 2, "is a file; name a folder"),
    ):
        assert run(place, *arguments) == code
        assert match in capsys.readouterr().err
