"""Criteria, stages and verdicts on hand-made trajectories: every answer can be checked by eye."""

from __future__ import annotations

import pytest
import torch

from melens.emergence.criteria import CRITERIA, Evidence, counted_shares, cumulative_layer
from melens.emergence.profile import Entry, summarise
from melens.emergence.stages import Span, counted_from, spans
from melens.emergence.thresholds import last_body_layer
from melens.emergence.trajectory import Path
from melens.emergence.verdict import shape_of, stability

D = 8


def path(writes, dims=None):
    """A token that starts at 1 in dim 0; layer l's FFN adds ``writes[l]`` in ``dims[l]``."""
    dims = dims or [1] * len(writes)
    ffn = torch.zeros(len(writes), D, dtype=torch.float64)
    for layer, (write, dim) in enumerate(zip(writes, dims, strict=True)):
        ffn[layer, dim] = write
    start = torch.zeros(D, dtype=torch.float64)
    start[0] = 1.0
    resid = torch.cat([start[None], start + ffn.cumsum(0)])
    return Path(1, 0, resid, torch.zeros_like(ffn), ffn)


def evidence(made):
    """One sequence: the token and seven ordinary ones, whose entries are 0.1 up to 1."""
    ordinary = torch.linspace(0.1, 1.0, 7 * D).reshape(7, D)
    steps = [
        [summarise(torch.cat([row[None].float(), ordinary]), torch.arange(8))] for row in made.resid
    ]
    return Evidence(steps, made)


SINGLE = [0, 0, 5000, 1, 0, 0, 0, 0, -3000, 0]
TWO = [0, 3000, 0, 4000, 0, 0, 0, 0, 0, 0]
SLOW = [0, 100, 2000, 2000, 2500, 2000, 2000, 0, 0, 0]
BACK = [0, 800, 0, -795, 0, 9000, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("writes", "expected"),
    [
        (SINGLE, {"sun_layer": 2, "sun_token": 2, "ratio_jump": 2, "max_jump": 2, "difference": 2,
                  "first_share": 2, "write_share": 2, "direction": 2}),
        (TWO, {"sun_layer": 1, "ratio_jump": 1, "difference": 3, "first_share": 1,
               "write_share": 3, "direction": 1}),
        (SLOW, {"sun_layer": 2, "ratio_jump": 1, "difference": 4, "first_share": 2,
                "write_share": 4, "direction": 1}),
        (BACK, {"sun_layer": 1, "difference": 5, "first_share": 5, "write_share": 5}),
    ],
)  # fmt: skip
def test_criteria(writes, expected):
    seen = evidence(path(writes))
    assert {name: CRITERIA[name](seen) for name in expected} == expected


def test_criteria_say_nothing_without_a_massive_token():
    seen = Evidence(evidence(path([0.0] * 10)).steps, None)
    answers = {name: rule(seen) for name, rule in CRITERIA.items()}
    assert answers.pop("max_jump") is not None
    assert set(answers.values()) == {None}


@pytest.mark.parametrize(
    ("writes", "verdict"),
    [(SINGLE, "single"), (TWO, "multi-step"), (SLOW, "gradual"), (BACK, "re-emergent")],
)
def test_verdicts(writes, verdict):
    made = path(writes)
    seen = evidence(made)
    ratios = seen.norm_ratios(made)
    _, counted = counted_shares(seen, made)
    assert shape_of(counted, spans(made, ratios), made.peak) == verdict


def test_an_erased_stage_counts_only_towards_itself():
    made = path(BACK)
    ratios = evidence(made).norm_ratios(made)
    assert spans(made, ratios) == [Span(0, 1, 3), Span(3, 5, None)]
    assert counted_from(made, ratios) == 4


def test_a_large_earlier_stage_is_not_the_me_layer():
    made = path([0, 4000, 0, -3999, 0, 9000, 0, 0, 0, 0])  # 0.44 of the peak, but erased
    assert CRITERIA["first_share"](evidence(made)) == 5


def test_a_stage_in_another_dimension_is_erased_all_the_same():
    made = path(BACK, dims=[1, 2, 1, 2, 1, 1, 1, 1, 1, 1])
    assert CRITERIA["first_share"](evidence(made)) == 5


def test_growth_in_the_final_window_is_neither_peak_nor_stage():
    made = path([0, 0, 500, 0, 0, 0, 0, 0, 0, 9000], dims=[1] * 9 + [2])
    assert last_body_layer(10) == 8
    assert made.peak == 2
    assert spans(made, evidence(made).norm_ratios(made)) == [Span(0, 2, None)]


def test_shares_of_all_writes_and_the_embedding_sum_to_one():
    made = path(SLOW)
    end = made.resid[made.peak + 1]
    embedding = (made.resid[0] @ end / (end @ end)).item()
    assert made.shares[: made.peak + 1].sum().item() + embedding == pytest.approx(1)


def test_cumulative_layers():
    made = path(SLOW)
    seen = evidence(made)
    assert [cumulative_layer(seen, made, part) for part in (0.1, 0.5, 0.9)] == [2, 4, 6]


def test_the_final_window_leaves_a_body_in_any_model():
    assert [last_body_layer(n) for n in (1, 2, 3, 10, 18, 30)] == [0, 0, 1, 8, 15, 26]


def test_stability_is_modest_about_one_observation():
    assert stability(1, 1) == pytest.approx(2 / 3)
    assert stability(16, 16) == pytest.approx(17 / 18)
    assert stability(0, 4) == pytest.approx(1 / 6)


def test_summary_of_a_sequence_by_hand():
    x = torch.full((10, 6), 0.1)
    x[3, 2] = -400.0
    x[:, 5] = 300.0  # a dimension that all tokens share is broad, not massive
    row = summarise(x, torch.arange(20, 30))
    assert (row.max, row.top) == (400.0, Entry(3, 2, -400.0))
    assert row.median == pytest.approx(0.1)
    assert row.sun
    assert row.sun_own
    assert row.norm_ratio == pytest.approx(500 / 300, rel=1e-3)
    assert row.hits == ()  # 500/300 is too light for a massive token
    x[:, 5] = 0.1
    (hit,) = summarise(x, torch.arange(20, 30)).hits
    assert (hit.position, hit.token_id, hit.dim, hit.value) == (3, 23, 2, -400.0)
