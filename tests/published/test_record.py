"""The published record: every row's source and place, and results held against it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
from pydantic import ValidationError

from melens.cli.app import main
from melens.errors import ResultError
from melens.locating.maxima import answer_of
from melens.published import (
    PublishedRow,
    known,
    known_models,
    known_scan,
    profiles,
    published_profile,
    published_rows,
    record,
)
from melens.published.record import PublishedProfile
from melens.results import load_result

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results"
KINDS = {"exact", "rounded", "plot"}


@pytest.fixture(scope="module")
def located():
    return load_result(RESULTS / "smollm2-135m-bos.locate.json")


def renamed(result, **update):
    """A located result with other numbers; ``bos`` is how its texts began."""
    settings = {**result.run.settings, "bos_first": update.pop("bos", True)}
    run = result.run.model_copy(update={"settings": settings})
    return result.model_copy(update={"run": run, **update})


def held(check):
    return {row.what: (row.verdict, row.off) for row in check.comparisons}


def test_every_row_says_whose_it_is_and_how_exact():
    raw = json.loads(
        (resources.files("melens") / "data" / "published" / "models.json").read_text("utf-8")
    )
    assert len(raw["models"]) == len(record().models) >= 45
    for row in raw["models"]:
        assert {"model", "source", "exactness", "bos", "layers", "n_layers", "d_model"} <= set(row)
        assert row["exactness"] in KINDS
        facts = set(row) - {"model", "source", "exactness", "bos", "layers", "n_layers", "d_model"}
        assert facts - {"doubt", "note"}, row["model"]  # a row says something
    sizes = {(row.model, row.n_layers, row.d_model) for row in record().models}
    assert len(sizes) == len(known_models())  # one size a model
    assert len(profiles().profiles) == 27
    assert "24 checkpoints" in profiles().about
    assert all(statement.source for statement in record().statements)


def test_rows_and_profiles_agree_on_what_a_model_is():
    for profile in profiles().profiles:
        for row in published_rows(profile.model):
            assert (row["n_layers"], row["d_model"]) == (profile.n_layers, profile.d_model)
            if "jump" in row:  # both of one source: the row's numbers are in the profile
                layer = row["me_layer"] if "me_layer" in row else row["steps"][0]
                curve = profile.block_output
                assert [round(curve[layer - 1]), round(curve[layer])] == row["jump"]
                assert profile.answer().me_layer == layer


@pytest.mark.parametrize(
    "change",
    [{"me_layer": 32}, {"dims": {"4096": 1.0}}, {"super_weights": [[32, 0, 0]]}, {"source": ""}],
)
def test_what_the_model_does_not_have_is_refused(change):
    row = published_rows("Llama-2-7b-hf")[0]
    with pytest.raises(ValidationError):
        PublishedRow.model_validate({**row, **change})


def test_a_curve_of_another_length_is_refused():
    profile = published_profile("Qwen3-8B")
    with pytest.raises(ValidationError, match="every curve needs 36"):
        PublishedProfile.model_validate({**profile.model_dump(), "median": (1.0,)})


def test_the_doubts_are_marked():
    first, without, signed = [r for r in published_rows("Llama-2-7b-hf") if "dims" in r]
    assert (first["bos"], without["bos"], signed["bos"]) == (True, False, None)
    assert "doubt" in signed
    for dim, value in signed["dims"].items():  # the signed values fit the averages without BOS
        assert abs(abs(value) / without["dims"][dim] - 1) < 0.011
        assert abs(abs(value) / first["dims"][dim] - 1) > 0.11
    assert published_rows("Llama-2-13b-hf")[0]["bos"] is None
    assert published_rows("Meta-Llama-3-8B")[0]["exactness"] == "plot"
    assert published_rows("Qwen2.5-1.5B")[0]["steps"] == [1, 2]
    assert published_rows("Qwen2.5-32B")[0]["steps"] == [4, 5]
    assert published_profile("gpt-oss-20b").largest == -145408


def test_a_contradiction_says_by_how_much(located):
    here = renamed(located, me_layer=3)
    check = known("Llama-3.2-1B", here)
    assert held(check)["ME Layer"] == ("mismatch", "2 layers later")
    assert "ME Layer (3, published 1: 2 layers later)" in check.summary()
    token = located.massive[0].model_copy(update={"dim": 400, "value": 300.0})
    check = known("Llama-3.2-1B", renamed(located, me_layer=1, massive=(token,)))
    assert held(check)["|x| in dimension 400"] == ("mismatch", "38 % larger")
    assert (
        held(known("llama-3.2-1b", renamed(here, me_layer=0)))["ME Layer"][1] == "1 layer earlier"
    )


def test_a_size_read_off_a_plot_is_never_a_mismatch(located):
    for value, verdict in ((420.0, "match"), (900.0, "unknown")):
        tokens = [
            located.massive[0].model_copy(update={"dim": dim, "value": value})
            for dim in (788, 1384, 4062)
        ]
        check = known("Meta-Llama-3-8B", renamed(located, me_layer=1, massive=tuple(tokens)))
        assert held(check)["|x| in dimension 788"][0] == verdict
        assert check.verdict == "match"


def test_a_size_in_doubt_is_never_a_mismatch(located):
    token = located.massive[0].model_copy(update={"dim": 4743, "value": 300.0})
    check = known("Llama-2-13b-hf", renamed(located, me_layer=3, massive=(token,)))
    assert held(check)["|x| in dimension 4743"] == ("unknown", "75 % smaller")
    assert held(check)["dimension 2100"][0] == "mismatch"  # its place is not in doubt


def test_a_doubt_counts_where_both_begin_with_bos(located, monkeypatch):
    row = published_rows("Llama-3.2-1B")[0]
    token = located.massive[0].model_copy(update={"dim": 400, "value": 900.0})
    here = renamed(located, me_layer=1, massive=(token,))
    for more, verdict in (({}, "mismatch"), ({"doubt": "one text"}, "unknown")):
        rows = [{**row, **more, "dims": {"400": 217}}]
        monkeypatch.setattr("melens.published.holding.published_rows", lambda _, rows=rows: rows)
        assert held(known("x", here))["|x| in dimension 400"] == (verdict, "4.1 x as large")


def test_a_layer_in_doubt_contradicts_nothing(located):
    scan = load_result(RESULTS / "smollm2-135m.scan.json")
    for result in (renamed(located, me_layer=4), scan):
        verdict, off = held(known("gemma-2-2b", result))["ME Layer"]
        assert verdict == "unknown"
        assert off.endswith("later")
    row = {**published_rows("falcon-7b")[0], "layer_in_doubt": True}
    with pytest.raises(ValidationError, match="says why"):
        PublishedRow.model_validate(row)


def test_a_profile_has_a_layer_and_an_order_of_size(located):
    check = known("Qwen3-8B", renamed(located, me_layer=6))
    by_profile = "ME Layer by the published profile (single)"
    size = "largest |x|, order of size (published: over 5,000 texts)"
    assert held(check)[by_profile] == held(check)[size] == ("match", None)
    assert "2605.15572" in check.source
    assert held(known("Qwen3-8B", renamed(located, me_layer=8)))[by_profile] == (
        "mismatch",
        "2 layers later",
    )
    # a second step of it, and a gradual one, contradict nothing; neither does another order of size
    assert known("Qwen2.5-VL-3B", renamed(located, me_layer=30)).verdict != "mismatch"
    gradual = known("gemma-3-4b-it", renamed(located, me_layer=9))
    assert "mismatch" not in {row.verdict for row in gradual.comparisons}
    small = known("Qwen3-30B-A3B", renamed(located, me_layer=1))
    assert held(small)[size] == ("unknown", "16.5 x as large")
    assert (
        known("Qwen/Qwen2.5-VL-3B-Instruct", located).source
        == known("Qwen2.5-VL-3B", located).source
    )


def test_a_model_of_another_size_is_another_model(located):
    assert known("gpt2", located).comparisons
    assert known("gpt2", located, d_model=576).source is None  # 30 layers are not its 12
    assert known("smollm2-135m", located, d_model=576).verdict == "match"


def test_all_kinds_of_results_are_held(located):
    scan = load_result(RESULTS / "smollm2-135m.scan.json")
    assert known("smollm2-135m", scan) == known_scan("smollm2-135m", scan)
    weights = load_result(RESULTS / "smollm2-135m-bos.super-weights.json")
    assert known("llama-30b", weights).comparisons[0].what == "super weight (3, 5633, 12817)"
    sinks = load_result(RESULTS / "smollm2-135m-bos.sinks.json")
    check = known("Qwen3-4B-Base", sinks)
    assert held(check)["first layer with sinks"][0] == "unknown"  # other texts contradict nothing
    assert held(known("Mistral-7B-v0.1", sinks)).popitem()[1][1].endswith(" points")
    report = load_result(RESULTS.parent / "reports" / "smollm2-135m.json")
    whole = known("Meta-Llama-3-8B", report)
    assert {"ME Layer", "super weight (1, 788, 2427)"} <= set(held(whole))
    assert whole.source.count("Gu et al.") == 1
    with pytest.raises(ResultError, match="got KnownCheck"):
        known("gpt2", check)


def test_one_number_of_two_sources_is_one_row(located):
    check = known("Llama-2-7b-hf", renamed(located, me_layer=1, bos=False))
    rows = [row for row in check.comparisons if row.what == "dimension 1415"]
    assert len(rows) == 1
    assert "locuslab" in rows[0].source
    assert "Add BOS Token: False" in rows[0].source


def test_the_command_takes_a_report_and_shows_sources(capsys):
    report = str(RESULTS.parent / "reports" / "smollm2-135m.json")
    with pytest.raises(SystemExit) as ended:
        main(["known", "smollm2-135m", report])
    assert not ended.value.code
    assert "[1] measured for this project" in capsys.readouterr().out


def test_criteria_on_a_profile_by_hand():
    """Closed form: 10 -> 1,000 at layer 2, half as much again at 4, and growth at the end."""
    maxima = [5.0, 10.0, 1000.0, 1000.0, 1500.0, 1500.0, 1500.0, 1500.0, 1500.0, 9000.0]
    found = answer_of(maxima, [0.1] * 10, d_model=64, passing=[0] * 3 + [7] * 7)
    assert (found.verdict, found.me_layer, found.main_layer) == ("multi-step", 2, 2)
    assert found.steps == (2, 4)
    assert found.share == pytest.approx(990 / 1500)
    assert (found.peak, found.peak_layer) == (1500.0, 4)  # the last layer is the final window
    assert found.criteria["sun_layer"] == 2
    assert found.criteria["sun_token"] == 3
    assert found.criteria["max_jump"] == 2
    assert found.criteria["difference"] == 9
    nothing = answer_of([5.0, 10.0, 99.0, 99.0], [0.01] * 4, d_model=64)
    assert (nothing.verdict, nothing.me_layer) == ("none", None)
    assert nothing.criteria["sun_token"] is None
    erased = [1.0, 500.0, 500.0, 100.0, 900.0, 900.0, 900.0, 900.0]
    again = answer_of(erased, [0.1] * 8, d_model=64)
    assert (again.verdict, again.me_layer) == ("re-emergent", 4)
    wide = answer_of([1.0, 200.0, 200.0], [0.1] * 3, d_model=10**6)  # 1.3 x the typical norm
    assert wide.verdict == "none"
    assert answer_of([1.0, 200.0, 200.0], [0.1] * 3, d_model=64).verdict == "single"
    with pytest.raises(ResultError, match="a maximum and a median"):
        answer_of([1.0], [1.0], d_model=64)
