from __future__ import annotations

import json
from pathlib import Path

import pytest
from planted import batch, plant

from melens.batches import Batch
from melens.errors import OutputError, ResultError
from melens.figures import draw, save_figure
from melens.locating import locate
from melens.published import known, known_models
from melens.results import KnownCheck, MELayer, load_result
from melens.store import write_atomically

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results():
    kinds = ("single", "re-emergent", "gradual", "final-growth", "none")
    made = {}
    for kind in kinds:
        planted = plant("llama", kind, 1)
        made[kind] = locate(planted.model, [Batch.of(batch(planted))])
    return made


def test_json_goes_there_and_back(results, tmp_path):
    for kind, result in results.items():
        text = result.to_json()
        assert MELayer.from_json(text) == result
        data = json.loads(text)
        assert list(data) == sorted(data)
        assert data["schema"] == "melens/locate/1"
        path = tmp_path / f"{kind}.json"
        write_atomically(path, text)
        assert load_result(path) == result


def test_the_json_has_what_it_promises(results):
    data = results["re-emergent"].to_dict()
    assert {
        "kind",
        "schema",
        "verdict",
        "me_layer",
        "main_layer",
        "effective_layers",
        "confidence",
        "criteria",
        "stages",
        "erase_layer",
        "massive",
        "writer",
        "profile",
        "run",
    } <= set(data)
    assert {"layer", "peak", "position", "dim", "erased_at"} <= set(data["stages"][0])
    assert {"position", "token", "dim", "value", "frequency"} <= set(data["massive"][0])
    assert set(data["writer"]) == {"attention", "ffn"}
    assert {
        "layer",
        "max",
        "median",
        "token_median",
        "norm_ratio",
        "position",
        "dim",
        "value",
        "write_share",
        "median_norm",
    } == set(data["profile"][0])
    assert [row["layer"] for row in data["profile"]] == list(range(data["n_layers"]))
    assert data["run"]["versions"]["torch"]
    for kind in ("none", "final-growth"):
        assert results[kind].to_dict()["me_layer"] is None


def test_ties_and_what_the_confidence_is_about_are_said():
    saved = Path(__file__).parents[2] / "docs" / "results"
    ties, fixed = (load_result(saved / f"smollm2-135m{n}.locate.json") for n in ("", "-bos"))
    assert (ties.alike, fixed.alike) == (8, 1)
    assert "token '{' at position 0 (the middle one of 8 equally frequent ones)" in ties.summary()
    assert "equally" not in fixed.summary()
    rarer = [token.model_copy(update={"frequency": 0.1}) for token in ties.massive[-1:]]
    assert ties.model_copy(update={"massive": (*ties.massive[:-1], *rarer)}).alike == 7
    assert fixed.summary().endswith("(confidence that one layer explains it: 0.91, high).")
    none = fixed.model_copy(
        update={"verdict": "none", "me_layer": None, "massive": (), "confidence": 0.5}
    )
    assert none.summary().endswith("(confidence that there is none: 0.50, medium).")
    assert none.alike == 0
    scan = load_result(saved / "smollm2-135m.scan.json")
    assert "confidence that it stands out: 0.92" in scan.summary()


def test_broken_results_are_refused(tmp_path, results):
    data = results["single"].to_dict()
    with pytest.raises(ResultError, match=r"me_layer: Input should be a valid integer"):
        MELayer.from_json(json.dumps({**data, "me_layer": "x"}))
    with pytest.raises(ResultError, match="more: Extra inputs"):
        MELayer.from_json(json.dumps({**data, "more": 1}))
    with pytest.raises(ResultError, match="expected a result of schema melens/locate/1"):
        MELayer.from_json("[]")
    path = tmp_path / "x.json"
    path.write_text('{"schema": "melens/other/9"}')
    with pytest.raises(ResultError, match="has schema 'melens/other/9', which is not a result"):
        load_result(path)
    path.write_text('{"a": 1}')
    with pytest.raises(ResultError, match="names no schema, so it is not a result of melens; giv"):
        load_result(path)
    path.write_text('{"schema": "melens/locate/9"}')
    with pytest.raises(ResultError, match="and this version of melens reads 'melens/locate/1'"):
        load_result(path)
    with pytest.raises(ResultError, match="cannot read"):
        load_result(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"profile": []}, "one row a layer"),
        ({"massive": []}, "must go together"),
        ({"me_layer": None}, "must go together"),
        ({"me_layer": 99}, "must be within"),
        ({"me_layer": "3"}, "me_layer: Input should be a valid integer"),
        ({"confidence": 9.0}, "confidence: Input should be less than or equal to 1"),
        ({"verdict": "none"}, "must go together"),
        ({"schema": ["a"]}, "found None"),
    ],
)
def test_edited_results_are_refused(results, changes, says):
    with pytest.raises(ResultError, match=says):
        MELayer.from_json(json.dumps({**results["single"].to_dict(), **changes}))


@pytest.mark.parametrize("text", ["[" * 200_000, "1" * 5000, "{", ""])
def test_what_is_no_json_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=r"is not JSON|has schema None"):
        load_result(path)


def test_results_are_frozen_and_show_themselves(results):
    result = results["single"]
    with pytest.raises(ValueError, match="frozen"):
        result.me_layer = 3
    assert f"ME Layer {result.me_layer} of {result.n_layers} (counted from 0" in repr(result)
    assert "no massive activations" in results["none"].summary()
    frame = result.to_frame()
    assert len(frame) == result.n_layers
    assert "<table" in result._repr_html_()


def test_a_hostile_model_name_stays_text(results):
    run = results["single"].run.model_copy(update={"model": "<script>alert(1)</script>"})
    shown = results["single"].model_copy(update={"run": run})._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown


def test_every_verdict_draws_and_equal_results_give_equal_bytes(results, tmp_path):
    for kind, result in results.items():
        drawn, same = result.plot(), MELayer.from_json(result.to_json()).plot()
        for ending in ("svg", "pdf", "png") if kind == "single" else ("svg",):
            first = save_figure(drawn, tmp_path / f"{kind}.{ending}").read_bytes()
            assert first == save_figure(same, tmp_path / f"again.{ending}").read_bytes()
    text = (tmp_path / "single.svg").read_text()
    assert f"ME Layer {results['single'].me_layer}" in text
    assert "no massive token" in (tmp_path / "none.svg").read_text()
    with pytest.raises(ResultError, match=r"end it in \.png, \.svg, \.pdf"):
        save_figure(results["single"].plot(), tmp_path / "x.gif")


def test_the_profile_figure_shows_the_numbers(results):
    result = results["single"]
    top, bottom = result.plot().axes
    assert list(top.lines[0].get_ydata()) == [row.max for row in result.profile]
    assert [bar.get_height() for bar in bottom.patches] == [r.write_share for r in result.profile]


def test_writing_is_atomic_and_says_why_it_cannot(tmp_path):
    path = tmp_path / "sub" / "a.json"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_atomically(tmp_path / "file" / "a.json", "x")


def test_known_says_match_mismatch_and_unknown(results):
    result = results["re-emergent"]
    unknown = known("nobody/nothing", result)
    assert (unknown.verdict, unknown.comparisons) == ("unknown", ())
    check = known("HuggingFaceTB/SmolLM2-135M-Instruct", result)
    assert check.verdict == "unknown"  # a longer published name is another checkpoint
    check = known("smollm2-135m", result)
    assert check.verdict == "mismatch"
    assert "ME Layer" in check.summary()
    assert "0-based" in check.convention
    assert KnownCheck.from_json(check.to_json()) == check
    none = known("allenai/OLMo-2-1124-7B", results["none"])
    assert none.verdict == "match"
    with pytest.raises(ResultError, match="needs a locate result"):
        known("x", check)


def _as_llama(result, *, bos, value):
    """A result with the published layer of Llama-3.2-1B, dimension 400 as large as asked."""
    settings = {**result.run.settings, "bos_first": bos}
    token = result.massive[0]
    massive = [token.model_copy(update={"dim": d, "value": value}) for d in (400, 698, 1159, 2029)]
    return result.model_copy(
        update={
            "me_layer": 1,
            "massive": tuple(massive),
            "run": result.run.model_copy(update={"settings": settings}),
        }
    )


def test_known_holds_a_run_against_the_row_of_its_own_kind(results):
    rows = known_models()["meta-llama/Llama-3.2-1B"]
    assert [row["bos"] for row in rows] == [True, False]
    name = "Llama-3.2-1B"
    assert known(name, _as_llama(results["single"], bos=True, value=205.0)).verdict == "match"
    assert known(name, _as_llama(results["single"], bos=True, value=411.0)).verdict == "mismatch"
    assert known(name, _as_llama(results["single"], bos=False, value=-390.0)).verdict == "match"
    without = known(name, _as_llama(results["single"], bos=False, value=205.0))
    held = {row.what: row.verdict for row in without.comparisons}
    assert without.verdict == "match"  # the size of another first token says nothing
    assert (held["dimension 400"], held["|x| in dimension 400"]) == ("match", "unknown")


def test_numbers_with_bos_say_nothing_against_a_run_without(results):
    """falcon-7b is on record with BOS only: ME Layer 3."""

    def verdicts(bos):
        check = known("falcon-7b", _as_llama(results["single"], bos=bos, value=205.0))
        return {row.what: row.verdict for row in check.comparisons}

    assert verdicts(bos=True)["ME Layer"] == verdicts(bos=True)["dimension 2002"] == "mismatch"
    assert set(verdicts(bos=False).values()) == {"unknown"}


def test_a_result_that_is_silent_about_bos_is_not_without_it(results):
    silent = _as_llama(results["single"], bos=None, value=205.0)
    del silent.run.settings["bos_first"]
    for name, says in (("Llama-3.2-1B", {"match"}), ("falcon-7b", {"unknown"})):
        check = known(name, silent)
        assert check.bos_first is None
        # no row is known to be of its kind, so that nothing speaks against it
        assert {row.verdict for row in check.comparisons} >= says
        assert "mismatch" not in {row.verdict for row in check.comparisons}
    elsewhere = known("Llama-3.2-1B", silent.model_copy(update={"me_layer": 2}))
    assert {row.what: row.verdict for row in elsewhere.comparisons}["ME Layer"] == "unknown"


def test_saved_checks_are_read_but_have_no_figure(results, tmp_path):
    check = known("smollm2-135m", results["single"])
    path = tmp_path / "known.json"
    write_atomically(path, check.to_json())
    assert load_result(path) == check
    with pytest.raises(ResultError, match="there is no figure for a KnownCheck"):
        check.plot()


def test_the_published_results_can_be_drawn():
    """That they are read and written byte for byte is for test_corpus.py."""
    paths = sorted((ROOT / "docs/results").glob("*.json"))
    assert len(paths) >= 38
    for path in paths:
        assert draw(load_result(path)).axes, path.name


def test_no_document_holds_a_placeholder():
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        assert "@@" not in path.read_text("utf-8"), path.name
