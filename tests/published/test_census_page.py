"""docs/census.md: its study is what the record gives, its sentences are what the study says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from melens.published import profiles, published_profile, record
from melens.results import load_result

ROOT = Path(__file__).parent.parent.parent
PAGE = " ".join((ROOT / "docs" / "census.md").read_text("utf-8").split())


@pytest.fixture(scope="module")
def experiment():
    name = "census_experiment"
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / "09_census.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def study(experiment):
    return json.loads(json.dumps(experiment.study()))


def test_the_saved_study_is_what_the_record_gives(study):
    saved = json.loads((ROOT / "docs" / "studies" / "census.json").read_text("utf-8"))
    assert {key: saved[key] for key in study} == study, "run: python experiments/09_census.py"


def same(study, question, key="same ME Layer"):
    rows = [row for row in study["questions"] if row["question"].startswith(question)]
    return f"{sum(row[key] for row in rows)} of {len(rows)}"


def test_the_verdicts_are_the_studys(study):
    depth, count = study["depths"]["depth"], study["verdicts"]
    (inside, across) = study["pairs"]
    late = [r for r in study["profiles"] if r["depth"] is not None and r["depth"] > study["early"]]
    assert [row["model"] for row in late] == ["gpt-oss-20b"]
    for sentence in (
        f"{depth['early']} of {depth['models']} within the first quarter",
        f"the other at {late[0]['depth']:.2f} (gpt-oss-20b)",
        f"median relative depth {depth['median']:.2f}",
        f"{count['single']} of {len(study['profiles'])} profiles are single; "
        f"{count['multi-step']} are multi-step, {count['gradual']} gradual, "
        f"{count['none']} have none",
        f"the same layer in {same(study, 'base against instruct')} sizes of Qwen2.5",
        f"the same layer in {same(study, 'text against vision')} sizes of Qwen2.5",
        f"{same(study, 'over sizes')} families have one index",
        f"{inside['same ME Layer']} of {inside['pairs']} pairs of a family share it, and "
        f"{across['same ME Layer']} of {across['pairs']} pairs of different families",
        f"over the {inside['models']} models",
        f"{study['shuffled']['at least as many']:.0%}".replace("%", " %")
        + f" of {study['shuffled']['shuffles']:,} shuffles",
        f"the profile's is the same in {sum(r['same'] for r in study['agree'])} of "
        f"{len(study['agree'])}",
        f"{sum(r['same'] for r in study['others'])} of {len(study['others'])} families have one",
    ):
        assert sentence in PAGE, sentence


def test_the_sentences_on_families_are_the_studys(study):
    rows = study["profiles"]

    def of(family):
        return [row for row in rows if row["family"] == family]

    ling = next(r for r in study["questions"] if r["group"] == "Ling-mini")
    assert set(ling["ME Layers"].values()) == {1}
    assert list(ling["main steps"].values()) == [5, 5, 1, 1]
    gemma = [row for row in rows if row["family"].startswith("Gemma")]
    assert [row["verdict"] for row in gemma] == ["gradual"] * 5
    assert len(of("Qwen2.5")) == 9
    for row in of("Qwen2.5"):
        assert (row["verdict"], row["main_layer"]) == ("multi-step", row["me_layer"])
    assert [row["verdict"] for row in of("Qwen3.5")].count("none") == 3
    assert len(of("Qwen3.5")) == 4
    experts = {row["model"]: row["me_layer"] for row in of("Qwen3")}
    assert experts.pop("Qwen3-30B-A3B") == 1
    assert set(experts.values()) == {2, 6}
    counted = [round(row["passing_a_text"]) for row in of("Ling-mini")]
    assert f"{min(counted)} to {max(counted)} of Ling-mini" in PAGE
    assert all(row["passing_a_text"] > 1000 for row in of("Gemma 3"))
    small = next(row for row in rows if row["model"] == "Qwen2.5-1.5B")
    assert (small["peak"], small["criteria"]["sun_token"]) == (7968, None)


def test_the_page_counts_the_record():
    rows = record().models
    models = len({row.model for row in rows})
    assert f"has {len(rows)} rows of {models} models beside the {len(profiles().profiles)}" in PAGE


def test_the_weak_case_and_the_profile_without_bos():
    weak = published_profile("Qwen3.5-27B")
    assert (weak.block_output[4], weak.block_output[54]) == (112, 940)
    assert weak.answer().criteria["sun_layer"] == 4
    gemma = published_profile("gemma-2-9b")
    assert 87 < gemma.block_output[0] < 88
    assert "no BOS" in gemma.note
    assert len(profiles().profiles) == 27


def test_the_real_models_are_the_saved_census(study):
    census = load_result(ROOT / "docs" / "results" / "small-models.census.json")
    assert census.run.command.endswith("--locate --out runs/census")
    first = census.models[0]
    assert f"relative depth of {first.depth:.2f}" in PAGE
    assert first.depth > study["depths"]["depth"]["most"]
    located = load_result(ROOT / "docs" / "results" / "smollm2-135m.locate.json")
    assert (first.me_layer, first.verdict) == (located.me_layer, located.verdict)
    assert located.stages[0].layer == 2
    assert located.stages[0].erased_at is not None
