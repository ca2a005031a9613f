"""Reference values on the real Gemma-3-270M (docs/definitions.md). Run with: pytest -m gemma"""

from __future__ import annotations

import pytest
import torch

from melens.batches import prompts
from melens.locating import locate

pytestmark = pytest.mark.gemma

NORMS = [
    2987.4,
    5109.1,
    6252.3,
    13582.2,
    26159.8,
    42882.7,
    55294.6,
    68850.2,
    83037.8,
    88243.5,
    90912.9,
    98606.0,
    99568.3,
    102042.5,
    103827.0,
    101047.3,
    82960.3,
    67256.2,
]
SHARES = [
    0.0003,
    0.0012,
    -0.0001,
    0.0997,
    0.1375,
    0.166,
    0.1226,
    0.132,
    0.1388,
    0.0507,
    0.0262,
    0.0745,
    0.0095,
    0.0239,
    0.0172,
    -0.0269,
    -0.1759,
    -0.1594,
]


def test_emergence_is_gradual_and_the_criteria_disagree(gemma):
    result = locate(gemma, prompts())
    assert result.verdict == "gradual"
    assert (result.me_layer, result.main_layer, result.peak_layer) == (3, 5, 14)
    assert result.effective_layers == pytest.approx(9.52, abs=0.1)
    assert (result.cumulative.p10, result.cumulative.p50, result.cumulative.p90) == (3, 6, 11)
    assert result.erase_layer == 16
    assert result.level == "low"
    assert result.criteria.model_dump() == {
        "sun_layer": 0,
        "sun_token": 0,
        "ratio_jump": 0,
        "max_jump": 0,
        "difference": 5,
        "first_share": 3,
        "write_share": 5,
        "direction": 7,
    }
    assert (result.massive[0].token, result.massive[0].dim) == ("<bos>", 163)
    assert result.massive[0].value == pytest.approx(102014, rel=0.002)
    assert result.profile[0].dim == 400
    assert result.profile[0].max == pytest.approx(2984, rel=0.002)
    assert not any(token.massive for token in result.stability.first_tokens)


def test_norms_and_write_shares_of_bos(gemma):
    from melens.locating.trajectory import trace

    (path,) = trace(gemma, [[gemma.tokenizer.bos_token_id]])
    torch.testing.assert_close(
        path.norms[1:], torch.tensor(NORMS, dtype=torch.float64), rtol=0.002, atol=0.0
    )
    torch.testing.assert_close(
        path.shares, torch.tensor(SHARES, dtype=torch.float64), rtol=0, atol=0.003
    )


def test_without_bos_late_tokens_turn_massive_and_position_0_does_not(gemma):
    result = locate(gemma, prompts(bos=False))
    assert result.verdict != "single"
    assert all(token.position > 0 for token in result.massive)


SINK_HEADS = [
    0.5,
    0.75,
    0.25,
    0.75,
    0,
    1,
    1,
    0,
    0.25,
    0.75,
    0.75,
    1,
    1,
    1,
    1,
    0.75,
    1,
    0.75,
]


def test_what_bos_does_and_that_no_other_first_token_does_it(gemma):
    from melens.measuring import measure_all

    texts = prompts()
    made = measure_all(gemma, locate(gemma, texts), texts, t=128)
    assert made.describe.inputs == 1  # only <bos>: nothing to compare it with
    assert set(made.describe.cosine_inputs) == {None}
    assert made.describe.energy["1"] > 0.99
    for rate, expected in zip(made.sinks.head_rate["0.3"], SINK_HEADS, strict=True):
        assert rate == pytest.approx(expected, abs=0.26)  # one head is 0.25
    assert made.sinks.overall["0.3"] == pytest.approx(0.69, abs=0.06)
    assert made.sinks.onset_layer == 0
    kept = made.collapse.curve("resid_post")[0]
    assert min(kept) > 10
    assert max(kept) < 75
    for site, low, high in (("q", 43, 75), ("k", 40, 75)):
        kept = made.collapse.curve(site)[0]
        assert low - 6 < min(kept[1:])
        assert max(kept[1:]) < high + 6


def test_without_bos_the_first_token_is_no_sink(gemma):
    from melens.measuring import sinks

    texts = prompts(bos=False)
    made = sinks(gemma, locate(gemma, texts), texts, t=128)
    assert made.overall["0.3"] < 0.01
    assert made.onset_of == "others"
    assert made.others is not None
