"""describe, collapse, sinks and attention as results: JSON, tables, figures, Jupyter."""

from __future__ import annotations

import io
import json
import math

import pytest
from matplotlib.text import Text
from planted import batch, plant

from melens.batches import Batch
from melens.cli.tables import TABLES
from melens.errors import ResultError, UnknownNameError
from melens.figures import FIGURES, save_figure
from melens.figures.draw import house_style
from melens.locating import locate
from melens.measuring import attention, measure_all
from melens.models import load
from melens.results import load_result
from melens.results.base import all_kinds
from melens.results.collapse import known_mean
from melens.store import write_atomically


@pytest.fixture(scope="module")
def results():
    """Of a model with one massive token, and of one without."""
    made = {}
    for name, kind in (("massive", "single"), ("none", "none")):
        planted = plant("llama", kind, 1)
        model = load(planted.model)
        ids = Batch.of(batch(planted))
        located = locate(model, ids)
        found = [*measure_all(model, located, ids), attention(model, located, ids)]
        made[name] = {result.kind: result for result in found}
    return made


KINDS = ("describe", "collapse", "sinks", "attention")


def contents(figure):
    """What is drawn, before it is laid out, which takes most of the time."""
    lines = [line.get_xydata().tolist() for axes in figure.axes for line in axes.lines]
    texts = [axes.get_ylabel() for axes in figure.axes]
    return repr((lines, texts, [text.get_text() for text in figure.findobj(Text)]))


def pixels(figure):
    made = io.BytesIO()
    with house_style():
        figure.savefig(made, format="raw", dpi=40)
    return made.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["massive", "none"])
def test_json_goes_there_and_back(results, which, kind, tmp_path):
    result = results[which][kind]
    text = result.to_json()
    assert type(result).from_json(text) == result
    assert json.loads(text)["schema"] == f"melens/{kind}/1"
    write_atomically(tmp_path / "x.json", text)
    assert load_result(tmp_path / "x.json") == result


def test_the_json_has_what_it_promises(results):
    made = {kind: result.to_dict() for kind, result in results["massive"].items()}
    portrait = made["describe"]
    assert set(portrait["energy"]) == {"1", "2", "4", "8"}
    n = portrait["n_layers"]
    assert len(portrait["cosine_layers"]) == len(portrait["cosine_inputs"]) == n
    assert {"token", "massive", "value"} <= set(portrait["first_tokens"][0])
    assert {"position", "token", "dim", "value"} <= set(portrait["massive"][0])
    rows = made["collapse"]["rows"]
    assert set(rows[0]) == {
        "layer",
        "site",
        "head",
        "definition",
        "with_token",
        "without_token",
    }
    sites = {row["site"] for row in rows}
    assert sites == {"resid_post", "ln1", "q", "k", "rot_q", "rot_k", "v"}
    assert all((row["head"] is None) == (row["site"] in ("resid_post", "ln1")) for row in rows)
    assert len({row["definition"] for row in rows}) == 10
    found = made["sinks"]
    assert set(found["sink_rate"]) == set(found["overall"]) == {"0.2", "0.3", "0.5"}
    assert all(len(curve) == n for curve in found["sink_rate"].values())
    assert len(found["attention_to_token"]) == n
    assert "onset_layer" in found
    rates = {"overall": {"0.2": 0.5, "0.3": 0.25, "0.5": 0.0}}
    assert results["massive"]["sinks"].model_copy(update=rates).usual_rate == 0.25
    assert {"layer", "head", "alpha"} <= set(found["heads"][0])


def test_lists_of_numbers_stay_on_one_line(results):
    text = results["massive"]["sinks"].to_json()
    (line,) = (line for line in text.splitlines() if '"attention_to_token"' in line)
    assert line.count(",") >= results["massive"]["sinks"].n_layers - 1
    hostile = results["massive"]["attention"]
    tokens = ("[\n 1,\n 2\n]", *hostile.tokens[1:])
    changed = hostile.model_copy(update={"tokens": tokens})
    assert type(hostile).from_json(changed.to_json()).tokens[0] == "[\n 1,\n 2\n]"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["massive", "none"])
def test_every_style_draws_and_equal_results_give_equal_bytes(results, which, kind, tmp_path):
    result = results[which][kind]
    again = type(result).from_json(result.to_json())
    for i, style in enumerate(FIGURES[type(result)]):
        drawn, same = result.plot(style), again.plot(style)
        assert contents(drawn) == contents(same)
        if i and (which == "none" or kind == "collapse"):  # one function draws its five styles
            continue
        if i:  # the writers are the same for all styles: small pixels tell as much
            assert pixels(drawn) == pixels(same)
            continue
        for ending in ("svg", "pdf") if kind == "describe" else ("svg",):
            first = save_figure(drawn, tmp_path / f"a.{ending}").read_bytes()
            assert first == save_figure(same, tmp_path / f"b.{ending}").read_bytes()
    with pytest.raises(UnknownNameError, match=f"unknown style of {kind} 'nonsense'"):
        result.plot("nonsense")


def test_every_kind_of_result_has_a_table(results):
    kinds = {schema.split("/")[1] for schema in all_kinds()}
    assert kinds == set(TABLES)


def test_the_figures_show_the_numbers(results):
    found = results["massive"]
    top, bottom = found["describe"].plot().axes
    assert list(top.lines[0].get_ydata()) == list(found["describe"].energy_layers["1"])
    assert list(bottom.lines[0].get_ydata()) == list(found["describe"].cosine_layers)
    panel = found["collapse"].plot().axes[0]
    assert list(panel.lines[0].get_ydata()) == found["collapse"].curve("resid_post")[0]
    assert list(panel.lines[1].get_ydata()) == found["collapse"].curve("resid_post")[1]
    image = found["sinks"].plot().axes[0].images[0].get_array()
    for head in found["sinks"].heads:
        assert image[head.layer, head.head] == head.alpha
    curves = found["sinks"].plot("curves").axes[0]
    assert list(curves.lines[1].get_ydata()) == list(found["sinks"].sink_rate["0.3"])
    square = found["attention"].plot().axes[0].images[0].get_array()
    assert square[3, 2] == found["attention"].heads[0].rows[3][2]
    assert math.isnan(square.data[2, 3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["massive", "none"])
def test_results_show_themselves_and_hostile_names_stay_text(results, which, kind):
    result = results[which][kind]
    run = result.run.model_copy(update={"model": "<script>alert(1)</script>"})
    shown = result.model_copy(update={"run": run})._repr_html_()
    assert "<script>alert" not in shown
    assert "alert(1)" in shown
    assert "data:image/png" in shown or kind == "attention"
    assert len(shown) < 400_000 or kind == "attention"
    assert result.summary() in repr(result)
    assert len(result.to_frame()) == len(result.rows()) > 0


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("describe", {"massive": []}, "must go together"),
        ("describe", {"cosine_layers": [1.0]}, "one entry a layer"),
        ("collapse", {"rows": []}, "rows must be there"),
        ("collapse", {"n_layers": 1}, "counted from 0"),
        ("sinks", {"attention_to_token": []}, "one entry a layer"),
        ("sinks", {"overall": {}}, "the same eps"),
        ("sinks", {"heads": []}, "heads must be there"),
        ("sinks", {"others": {"0.3": [1.0]}}, "one entry a layer"),
        ("describe", {"sites": []}, "sites must hold resid_post"),
        ("describe", {"energy": {}}, "must hold the tops"),
        ("describe", {"conditions": []}, "at least one first token"),
        ("attention", {"massive_positions": [99]}, "within the tokens"),
        ("attention", {"heads": []}, "a token and a head"),
        ("attention", {"tokens": ["a"]}, "one row a token"),
        ("attention", {"norms": [{"layer": 0, "norms": [1.0]}]}, "one number a token"),
    ],
)
def test_edited_results_are_refused(results, kind, changes, says):
    result = results["massive"][kind]
    with pytest.raises(ResultError, match=says):
        type(result).from_json(json.dumps({**result.to_dict(), **changes}))


def test_sentences_say_the_definition_and_the_convention(results):
    assert "exp(H(s / sum s))" in results["massive"]["collapse"].summary()
    assert "T = 64" in results["massive"]["sinks"].summary()
    assert "counted from 0" in results["massive"]["describe"].summary()
    assert "no massive token" in results["none"]["collapse"].summary()
    assert "no massive token to describe" in results["none"]["describe"].summary()


def test_a_mean_is_of_the_values_that_are_there():
    assert known_mean([1.0, None, 3.0]) == 2.0
    assert known_mean([None]) is None
