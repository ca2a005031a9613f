"""A config becomes cells: lists are axes, names are those of the command line."""

from __future__ import annotations

import itertools

import pytest


def cells(given):
    from melens.sweeping.cells import cells_of
    from melens.sweeping.config import read_config

    return cells_of(read_config(given))


def test_cells_are_the_product_of_the_lists():
    seeds, rates = [0, 1], [0.25, 0.5, 1.0]
    run = {"command": "eval", "mask-rate": rates, "bos": [True, False], "edit": "wemask"}
    found = cells({"model": ["b", "a"], "seed": seeds, "run": [run]})
    expected = {
        ("eval", model, f"--seed={seed}", f"--mask-rate={rate}", bos, "--edit=wemask")
        for model, seed, rate, bos in itertools.product("ab", seeds, rates, ("--bos", "--no-bos"))
    }
    assert {cell.argv for cell in found} == expected
    assert len(found) == len(expected) == len({cell.id for cell in found})
    assert [cell.model for cell in found] == ["b"] * 12 + ["a"] * 12  # one model's together


def test_an_option_at_the_top_goes_to_the_commands_that_have_it():
    run = [{"command": "locate"}, {"command": "scan"}]
    found = cells({"model": "a", "seed": 3, "run": run})
    assert [cell.argv for cell in found] == [("locate", "a", "--seed=3"), ("scan", "a")]


def test_an_option_that_may_be_given_often_takes_a_list_as_one_value():
    one = cells({"model": "a", "run": [{"command": "locate", "prompt": ["x", "y"]}]})
    two = cells({"model": "a", "run": [{"command": "locate", "prompt": [["x", "y"], ["z"]]}]})
    assert [cell.argv[2:] for cell in one] == [("--prompt=x", "--prompt=y")]
    assert [cell.argv[2:] for cell in two] == [("--prompt=x", "--prompt=y"), ("--prompt=z",)]


def test_an_argument_stands_before_the_options():
    found = cells({"model": "a", "run": [{"command": "metric", "name": "stable_rank", "n-seq": 1}]})
    assert found[0].argv == ("metric", "a", "stable_rank", "--n-seq=1")


def test_a_cell_is_the_same_however_it_is_said_and_another_where_its_text_changed(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three", "utf-8")

    def made(**more):
        return cells({"model": "a", "run": [{"command": "locate", "text": str(text), **more}]})[0]

    assert made().id == made(seed=0).id  # the default
    assert made().id != made(seed=1).id
    before = made().id
    text.write_text("one two four", "utf-8")
    assert made().id != before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"run": [{"command": "lokate"}]}, r"unknown command 'lokate'. Did you mean 'locate'"),
        ({"run": [{"command": "export"}]}, r"unknown command 'export'"),
        ({"run": [{"command": "census"}]}, r"unknown command 'census'"),
        ({"run": [{"command": "locate", "n-sek": 1}]}, r"run 1 .*'n-sek'. Did you mean 'n-seq'"),
        ({"run": [{"command": "locate", "n-seq": -1}]}, r"run 1 .*'--n-seq'"),
        ({"run": [{"command": "locate", "out": "x"}]}, r"out is the sweep's own"),
        ({"run": [{"command": "locate", "chat": "yes"}]}, r"chat must be true or false"),
        ({"run": [{"command": "locate", "seed": True}]}, r"seed takes a value, got true"),
        ({"run": [{"command": "locate", "seed": []}]}, r"seed is an empty list"),
        ({"run": [{"command": "locate", "seed": [{}]}]}, r"seed must be text, a number"),
        ({"run": [{"command": "eval", "edit": "wemsk"}]}, r"'wemsk' is not one of"),
        ({"run": [{"command": "locate"}], "sead": 1}, r"top: unknown key 'sead'.*'seed'"),
        ({"run": [{"command": "locate"}], "engin": {}}, r"unknown table 'engin'. .*'engine'"),
        ({"run": [{"command": "locate"}], "engine": {"worker": 2}}, r"Did you mean 'workers'"),
        ({"run": [{"command": "locate"}], "engine": {"workers": 0}}, r"engine.workers: "),
        ({"run": [{"command": "locate"}], "engine": {"name": "dask"}}, r"engine.name: "),
        ({"run": [{}]}, r"run 1 names no command"),
        ({"run": []}, r"at least one \[\[run\]\]"),
        ({}, r"at least one \[\[run\]\]"),
        ({"run": [{"command": "locate", "model": []}]}, r"needs a model"),
        ({"run": [{"command": "locate"}], "out": 3}, r"out must be a folder's name"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(given, said):
    from melens.errors import SweepError

    with pytest.raises(SweepError, match=said) as found:
        cells({"model": "a", **given})
    assert "\n" not in str(found.value)


def test_a_file_that_is_not_toml_is_refused(tmp_path):
    from melens.errors import SweepError
    from melens.sweeping.config import read_config

    path = tmp_path / "sweep.toml"
    path.write_text("[[run]\n", "utf-8")
    with pytest.raises(SweepError, match="is not valid TOML"):
        read_config(path)
    with pytest.raises(SweepError, match="cannot read the config"):
        read_config(tmp_path / "none.toml")


def test_a_named_model_is_meant_where_a_folder_has_its_name_and_a_folder_by_its_whole_path(
    tmp_path, monkeypatch
):
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    found = cells({"model": ["smollm2-135m", "mine"], "run": [{"command": "locate"}]})
    assert [cell.argv[1] for cell in found] == ["smollm2-135m", str(tmp_path / "mine")]
    assert [cell.model for cell in found] == ["smollm2-135m", "mine"]
    (tmp_path / "mine" / "config.json").write_text("{}", "utf-8")
    assert cells({"model": "mine", "run": [{"command": "locate"}]})[0].id != found[1].id
