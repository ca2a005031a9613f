"""What `none` says: the coordinate that came nearest, and each threshold that it missed."""

from __future__ import annotations

import json

import pytest
import torch

from melens import locate
from melens.batches import Batch
from melens.errors import ResultError
from melens.isolating import isolate
from melens.locating.profile import summarise
from melens.models import load
from melens.results import MELayer

TOKEN, DIM, VALUE = 9, 5, 55.0


@pytest.fixture
def near(make_tiny, tokenizer):
    """A tiny Llama, its blocks nearly silent, in which one later token carries 55."""
    hf = make_tiny("llama")
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1e-3)
        hf.model.embed_tokens.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
        hf.model.embed_tokens.weight[TOKEN, DIM] = -VALUE
    return hf, load(hf, tokenizer=tokenizer)


@pytest.fixture
def rows(ids):
    ids = ids.clamp_min(10)
    ids[1, 7] = TOKEN
    return ids


def test_none_names_the_nearest_coordinate_and_what_it_missed(near, rows):
    hf, bridge = near
    found = locate(bridge, [Batch.of(rows)])
    with torch.no_grad():
        states = hf(rows, output_hidden_states=True, use_cache=False).hidden_states
    assert found.verdict == "none"
    miss = found.nearest
    x = states[miss.layer + 1][1]  # transformers' own, layer by layer
    norms = x.norm(dim=-1)
    assert (miss.position, miss.token_id, miss.dim) == (7, TOKEN, DIM)
    assert miss.value == pytest.approx(x[7, DIM].item(), rel=1e-5)
    assert miss.median_ratio == pytest.approx(abs(miss.value) / x.abs().median().item(), rel=1e-4)
    assert miss.norm_ratio == pytest.approx((norms[7] / norms.median()).item(), rel=1e-4)
    assert [(one.threshold, one.needed) for one in miss.missed] == [
        ("absolute", 100),
        ("median", 1000),
    ]
    assert [one.value for one in miss.missed] == [abs(miss.value), miss.median_ratio]
    closeness = min(abs(miss.value) / 100, miss.median_ratio / 1000)
    seen = found.stability
    sure = (1 - closeness) * (seen.agreeing + 1) / (seen.observations + 2)
    assert found.confidence == pytest.approx(sure, rel=1e-6)


def test_the_sentence_says_it_and_old_results_keep_theirs(near, rows):
    found = locate(near[1], [Batch.of(rows)])
    text = found.summary()
    assert "the nearest is -55" in text
    assert f"in dimension {DIM} at layer {found.nearest.layer} (token 'w9' at position 7)" in text
    assert "it misses |x| above 100 by 45" in text
    assert "it misses 1,000 x the median by " in text
    assert MELayer.from_json(found.to_json()) == found
    old = json.loads(found.to_json())
    del old["nearest"]
    before = MELayer.from_json(json.dumps(old)).summary()
    assert "no massive activations (confidence that there is none: " in before
    with pytest.raises(ResultError, match=r"no massive token.*the nearest is -55"):
        isolate(near[1], found, [Batch.of(rows)])


def test_the_nearest_is_not_just_the_heaviest():
    """A heavier token whose norm lies spread over all dimensions is farther away."""
    x = torch.full((20, 64), 0.1)
    x[3] = 20.0  # norm 160
    x[7, 5] = 90.0
    (row,) = summarise(x[None], Batch.of(torch.arange(20)[None]))
    assert (row.nearest.hit.position, row.nearest.hit.value) == (7, 90.0)
    assert row.norm_ratio == pytest.approx(200)
    assert row.nearest.closeness == pytest.approx(0.9)


def test_a_broad_dimension_is_named_as_what_it_missed(near, rows):
    hf, _ = near
    with torch.no_grad():
        hf.model.embed_tokens.weight[:, DIM] = 0.1
        hf.model.embed_tokens.weight[10:16, DIM] = 3000.0
    ids = torch.arange(20, 44)[None].repeat(2, 1)
    ids[:, 3:9] = torch.arange(10, 16)
    found = locate(load(hf, tokenizer=near[1].tokenizer), [Batch.of(ids)])
    assert found.verdict == "none"
    assert [(one.threshold, one.value, one.needed) for one in found.nearest.missed] == [
        ("sharing", 6, 4)
    ]
    assert "6 tokens share the dimension, at most 4 may" in found.summary()
