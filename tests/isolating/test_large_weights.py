"""Which weights that spike are super weights: those whose removal hurts more than the control."""

from __future__ import annotations

from pathlib import Path

import pytest

from melens.checking.findings import RULES, Measured
from melens.cli.render import show_listings
from melens.cli.tables import TABLES
from melens.figures import draw
from melens.results import SuperWeights, load_result

DOCS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def found():
    return load_result(DOCS / "smollm2-135m-bos.super-weights.json")


def costing(found, *costs, control=(0.001, (-0.001, 0.003))):
    """The result with other costs: (change, interval) a weight."""
    weights = tuple(
        w.model_copy(
            update={
                "loss_delta": delta,
                "interval": inside,
                "loss_without": found.base_loss + delta,
            }
        )
        for w, (delta, inside) in zip(found.super_weights, costs, strict=False)
    )

    def group(of, delta, inside):
        return of.model_copy(
            update={
                "weights": of.weights[: len(weights)],
                "values": of.values[: len(weights)],
                "loss_delta": delta,
                "interval": inside,
                "loss_without": found.base_loss + delta,
            }
        )

    made = found.model_copy(
        update={
            "super_weights": weights,
            "together": group(found.together, 1.0, (0.9, 1.1)),
            "control": group(found.control, *control),
        }
    )
    return SuperWeights.from_json(made.to_json())


def test_the_name_is_for_those_that_hurt_beyond_the_control(found, capsys):
    made = costing(
        found,
        (-0.02, (-0.04, -0.01)),  # the loss falls
        (0.08, (0.05, 0.11)),
        (0.01, (-0.01, 0.03)),  # it may be nothing
        (0.006, (0.002, 0.01)),  # the control's interval reaches as far
    )
    assert [made.kind_of(w) for w in made.super_weights] == ["large", "super", "large", "large"]
    assert made.supers == made.super_weights[1:2]
    text = made.summary()
    assert "1 super weight and 3 large weights" in text
    assert [row.get("is") for row in made.rows()] == [
        "large",
        "super",
        "large",
        "large",
        None,
        None,
    ]
    show_listings(TABLES["super-weights"](made))
    assert sum(line.startswith("large ") for line in capsys.readouterr().out.splitlines()) == 3
    labels = {label.get_text() for label in draw(made).legends[0].get_texts()}
    assert {"super weight removed", "large weight removed"} <= labels


def test_none_is_super_where_none_hurts(found):
    made = costing(found, (-0.02, (-0.04, -0.01)), (0.2, (-0.1, 0.5)))
    assert made.supers == ()
    assert "no super weight, 2 large weights" in made.summary()
    judged = RULES["super-weight"].judge(Measured({"super_weights": made}, made.run), 0.1)
    assert not judged.found  # 0.2 > 0.1, but it may be nothing
    worse = costing(found, (-0.02, (-0.04, -0.01)), (0.2, (0.1, 0.3)))
    judged = RULES["super-weight"].judge(Measured({"super_weights": worse}, worse.run), 0.1)
    assert judged.found
    assert judged.value == 0.2


def test_without_intervals_the_changes_are_compared(found):
    made = costing(found, (0.5, None), (0.0005, None), control=(0.001, None))
    assert [made.kind_of(w) for w in made.super_weights] == ["super", "large"]


def test_the_published_result_has_seven(found):
    """The weight that erases at layer 28 costs 0.0016 at least, the eight controls up to 0.0019."""
    assert [w.at for w in found.large] == [(28, 507, 678)]
    assert "7 super weights and 1 large weight" in found.summary()
