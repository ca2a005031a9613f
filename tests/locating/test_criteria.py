"""Criteria, stages and verdicts on hand-made trajectories: every answer can be checked by eye."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from melens.batches import Batch
from melens.errors import ModelError
from melens.locating.assemble import _writer, agreement, final_growth, shape_of, stability
from melens.locating.criteria import (
    CRITERIA,
    Evidence,
    StageSpan,
    counted_from,
    counted_shares,
    cumulative_layer,
    spans,
)
from melens.locating.profile import Entry, LayerProfile, summarise
from melens.locating.thresholds import last_body_layer
from melens.locating.trajectory import Path
from melens.metrics import METRICS
from melens.metrics.magnitude import NORM_RATIO
from melens.results import Criteria

D = 8


def _summary(x, ids):
    """The row of one sequence without padding."""
    return summarise(x[None], Batch.of(ids[None]))[0]


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
        [_summary(torch.cat([row[None].float(), ordinary]), torch.arange(8))] for row in made.resid
    ]
    return Evidence(steps, made)


SINGLE = [0, 0, 5000, 1, 0, 0, 0, 0, -3000, 0]
TWO = [0, 3000, 0, 4000, 0, 0, 0, 0, 0, 0]
SLOW = [0, 100, 2000, 2000, 2500, 2000, 2000, 0, 0, 0]
BACK = [0, 800, 0, -795, 0, 9000, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("writes", "expected"),
    [
        (
            SINGLE,
            {
                "sun_layer": 2,
                "sun_token": 2,
                "ratio_jump": 2,
                "max_jump": 2,
                "difference": 2,
                "first_share": 2,
                "write_share": 2,
                "direction": 2,
            },
        ),
        (
            TWO,
            {
                "sun_layer": 1,
                "ratio_jump": 1,
                "difference": 3,
                "first_share": 1,
                "write_share": 3,
                "direction": 1,
            },
        ),
        (
            SLOW,
            {
                "sun_layer": 2,
                "ratio_jump": 1,
                "difference": 4,
                "first_share": 2,
                "write_share": 4,
                "direction": 1,
            },
        ),
        (BACK, {"sun_layer": 1, "difference": 5, "first_share": 5, "write_share": 5}),
    ],
)
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
    assert spans(made, ratios) == [StageSpan(0, 1, 3), StageSpan(3, 5, None)]
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
    assert spans(made, evidence(made).norm_ratios(made)) == [StageSpan(0, 2, None)]


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


def test_the_writer_is_split_and_left_out_where_it_was_embedded():
    made = path([0, 0, 1000, 0, 0, 0, 0, 0, 0, 0])
    made = dataclasses.replace(made, mixer=3 * made.ffn, resid=made.resid * 1.0)
    resid = made.resid[:1] + torch.cat([torch.zeros(1, D), (made.mixer + made.ffn).cumsum(0)])
    writer = _writer(dataclasses.replace(made, resid=resid), 0)
    assert (writer.attention, writer.ffn) == pytest.approx((0.75, 0.25), abs=1e-3)
    embedded = path([0.0] * 10)
    assert _writer(embedded, 0) is None
    assert CRITERIA["first_share"](evidence(embedded)) == -1


def test_agreement_counts_the_criteria_that_answer():
    answers = dict.fromkeys(Criteria.model_fields)
    assert agreement(Criteria(**{**answers, "sun_layer": 3, "ratio_jump": 4}), 4) == 0.5
    assert agreement(Criteria(**{**answers, "sun_layer": 3, "ratio_jump": 3}), 3) == 1.0


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [
        ([0.76, 0.24], "multi-step"),  # effective number 1.74: the rest is no crumb
        ([0.90, 0.10], "single"),
        ([0.76, 0.08, 0.08, 0.08], "gradual"),  # 76 % alone is not single: effective number 2.2
        ([0.40, 0.35, 0.25], "multi-step"),
        ([0.25, 0.25, 0.25, 0.25], "gradual"),
        ([0.74, 0.09, 0.09, 0.08], "gradual"),
    ],
)
def test_the_boundaries_between_shapes(shares, verdict):
    assert shape_of(torch.tensor(shares), [StageSpan(0, 3, None)], 3) == verdict


def test_what_an_erasure_leaves_is_no_stage():
    made = path([0, 5000, 0, -3000, 0, -1500, 0, -450, 0, 0])
    assert spans(made, evidence(made).norm_ratios(made)) == [StageSpan(0, 1, 3)]
    late = path([0, 5000, 0, 0, -4999.5, 0, 0, 0, 0, 60])
    assert spans(late, evidence(late).norm_ratios(late)) == [StageSpan(0, 1, 4)]


def test_the_main_step_is_counted_after_an_erasure_too():
    made = path([0, 8000, 0, -7990, 0, 3000, 3000, 3000, 0, 0])
    seen = evidence(made)
    assert (CRITERIA["first_share"](seen), CRITERIA["write_share"](seen)) == (5, 5)


def test_final_growth_is_seen_beside_a_massive_token():
    made = path([0, 0, 5000, 0, 0, 0, 0, 0, 0, 0])
    seen = evidence(made)
    assert final_growth(seen.steps, made) is None
    row = seen.steps[-1][0]
    grown = dataclasses.replace(row, ordinary=Entry(4, 6, -2.1 * abs(row.ordinary.value)))
    found = final_growth([*seen.steps[:-1], [grown]], made)
    assert (found.layer, found.position, found.dim) == (9, 4, 6)
    assert found.factor == pytest.approx(2.1)
    little = dataclasses.replace(row, ordinary=Entry(4, 6, 1.9 * abs(row.ordinary.value)))
    assert final_growth([*seen.steps[:-1], [little]], made) is None


@pytest.mark.parametrize(("tokens", "sparse"), [(1, True), (4, True), (5, False)])
def test_a_dimension_shared_by_more_than_four_tokens_is_broad(tokens, sparse):
    x = torch.full((100, 6), 0.1)
    x[:tokens, 2] = 500.0
    hits = _summary(x, torch.arange(100)).hits
    assert [hit.position for hit in hits] == (list(range(tokens)) if sparse else [])


def test_the_summary_agrees_with_the_registered_metrics():
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(2))
    row = _summary(x, torch.arange(50))
    for name, value in (
        ("max_magnitude", row.max),
        ("layer_median", row.median),
        ("massive_ratio", row.max / row.median),
        ("heaviest_norm_ratio", row.norm_ratio),
    ):
        assert METRICS[name].fn(x).item() == pytest.approx(value, rel=1e-6)


def test_non_finite_activations_are_named():
    x = torch.ones(1, 5, 4, dtype=torch.float16)
    x[0, 2, 1] = float("inf")
    with pytest.raises(ModelError, match=r"blocks\.3\.x holds 1 NaN or Inf activations in float16"):
        LayerProfile("blocks.3.x").update(x, Batch.of(torch.zeros(1, 5, dtype=torch.long)))


def test_summary_of_a_sequence_by_hand():
    x = torch.full((10, 6), 0.1)
    x[3, 2] = -400.0
    x[:, 5] = 300.0  # a dimension that all tokens share is broad, not massive
    row = _summary(x, torch.arange(20, 30))
    assert (row.max, row.top) == (400.0, Entry(3, 2, -400.0))
    assert row.median == pytest.approx(0.1)
    assert row.sun
    assert row.sun_own
    assert row.norm_ratio == pytest.approx(500 / 300, rel=1e-3)
    assert row.hits == ()  # 500/300 is too light for a massive token
    x[:, 5] = 0.1
    (hit,) = _summary(x, torch.arange(20, 30)).hits
    assert (hit.position, hit.token_id, hit.dim, hit.value) == (3, 23, 2, -400.0)


def test_a_stage_begins_at_the_threshold_of_the_norm_and_not_below():
    made = path([0, 0, 500, 0, 0, 0, 0, 0, 0, 0])
    ratios = torch.ones(11, dtype=torch.float64)
    ratios[3] = NORM_RATIO
    assert spans(made, ratios) == [StageSpan(0, 2, None)]
    ratios[3] = NORM_RATIO - 0.01
    assert spans(made, ratios) == []
