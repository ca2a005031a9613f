"""Where queries, keys and values can be read, family by family; collapse on top of it."""

from __future__ import annotations

import pytest
import torch
from planted import batch, plant
from tiny import TINY

from melens.batches import Batch
from melens.errors import SiteError
from melens.locating import locate
from melens.measuring import attention, collapse
from melens.metrics import METRICS
from melens.models import load
from melens.models.attention import attention_sites

PLAIN = {"ln1", "q", "k", "v", "resid_post"}
ROTARY = PLAIN | {"rot_q", "rot_k"}
EXPECTED = {
    "qwen3": ROTARY | {"q_norm", "k_norm"},
    "qwen3-moe": ROTARY | {"q_norm", "k_norm"},
    "gemma3": ROTARY | {"q_norm", "k_norm"},
    "qwen3-next": (ROTARY | {"q_norm", "k_norm"}) - {"q"},
    "olmo2": (ROTARY | {"q_norm", "k_norm"}) - {"ln1"},
    "gpt2": PLAIN,
    "phi3": PLAIN,
    "neox": PLAIN,
}
QUERIES = {"q", "q_norm", "rot_q"}


@pytest.mark.parametrize("family", list(TINY))
def test_every_family_shows_what_it_has_and_says_what_it_lacks(bridged, family):
    model = bridged(family)
    sites = attention_sites(model)
    with_attention = list(sites.patterns)
    shown = {view.site for view in sites.layer(with_attention[0])}
    assert shown == EXPECTED.get(family, ROTARY)
    kv_heads = getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads
    for view in sites.views:
        wanted = model.cfg.n_heads if view.site in QUERIES else kv_heads
        assert view.heads == (None if view.site in ("ln1", "resid_post") else wanted)
    reasons = " ".join(sites.missing)
    assert ("never fires" in reasons) == (family in ("phi3", "neox"))
    assert ("a gate" in reasons) == (family == "qwen3-next")
    assert ("has no attention" in reasons) == (family == "qwen3-next")
    assert ("ln1: the model has no such hook" in reasons) == (family == "olmo2")


# phi3 and neox join when TransformerLens fires their hook_rot_q and hook_rot_k
@pytest.mark.parametrize("family", [name for name in TINY if name not in ("phi3", "neox")])
def test_queries_and_keys_read_by_head_give_the_pattern(bridged, family, ids):
    """The layout is right if attention can be made from what was read: softmax(q k^T)."""
    model = bridged(family)
    sites = attention_sites(model)
    layer = next(iter(sites.patterns))
    views = {view.site: view for view in sites.layer(layer)}
    q, k = views.get("rot_q", views.get("q")), views.get("rot_k", views.get("k"))
    names = [q.hook, k.hook, sites.patterns[layer]]
    _, cache = model.run_with_cache(ids, names_filter=names, use_cache=False)
    queries, keys = q.by_head(cache[q.hook]), k.by_head(cache[k.hook])
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scale = 8**-0.5
    if family in ("gemma2", "gemma3"):
        scale = model.original_model.config.query_pre_attn_scalar**-0.5
    scores = queries @ keys.mT * scale
    if family == "gemma2":
        cap = model.original_model.config.attn_logit_softcapping
        scores = torch.tanh(scores / cap) * cap
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    made = scores.masked_fill(mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(made, cache[sites.patterns[layer]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3-next", "olmo2", "gpt2"])
def test_collapse_equals_the_metrics_on_stored_activations(bridged, family, ids):
    model = bridged(family)
    found = collapse(model, prompts=[Batch.of(ids[:1]), Batch.of(ids[1:])])
    sites = attention_sites(model)
    names = [view.hook for view in sites.views]
    _, cache = model.run_with_cache(ids, names_filter=names, use_cache=False)
    rows = {(r.layer, r.site, r.head, r.definition): r for r in found.rows_}
    assert len(rows) == len(found.rows_)
    for view in sites.views:
        heads = view.by_head(cache[view.hook])
        for head in range(heads.shape[1]):
            at = head if view.heads else None
            for name in ("effective_rank", "stable_rank_centred"):
                values = [METRICS[name].fn(heads[i, head]).item() for i in range(len(ids))]
                row = rows[view.layer, view.site, at, name]
                assert row.with_token == pytest.approx(sum(values) / len(values), rel=1e-5)
                assert row.without_token is None  # nothing massive in a random model
    assert found.missing == sites.missing
    assert found.run.settings["sequences"] == 3


def test_without_the_token_means_without_its_row():
    planted = plant("llama", "several-tokens", 2)
    model = load(planted.model)
    ids = batch(planted)
    located = locate(model, Batch.of(ids))
    found = collapse(model, located, Batch.of(ids))
    assert found.sequences_massive == len(ids)
    last = model.cfg.n_layers - 1
    hook = f"blocks.{last}.hook_resid_post"
    _, cache = model.run_with_cache(ids, names_filter=[hook], use_cache=False)
    massive = torch.isin(ids, torch.tensor(planted.truth.token_ids))
    fn = METRICS["effective_rank"].fn
    kept = [fn(row).item() for row in cache[hook]]
    left = [fn(row[~mask]).item() for row, mask in zip(cache[hook], massive, strict=True)]
    curve = found.curve("resid_post")
    assert curve[0][last] == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    assert curve[1][last] == pytest.approx(sum(left) / len(left), rel=1e-5)
    assert curve[0][last] < curve[1][last] / 3


def test_other_texts_than_the_located_ones_are_marked_by_running():
    planted = plant("llama", "several-tokens", 2)
    model = load(planted.model)
    located = locate(model, Batch.of(batch(planted)))
    other = batch(planted, n=3, length=30, seed=9)
    again = collapse(model, locate(model, Batch.of(other)), Batch.of(other))
    borrowed = collapse(model, located, Batch.of(other))
    assert borrowed.rows_ == again.rows_


def test_chosen_heads_are_shown_as_they_are(tiny, ids):
    found = attention(tiny, prompts=Batch.of(ids), layers=[2, 1], heads=[3, 0])
    assert [(head.layer, head.head) for head in found.heads] == [(1, 0), (1, 3), (2, 0), (2, 3)]
    names = [
        f"blocks.{layer}.{site}"
        for layer in (1, 2)
        for site in ("attn.hook_pattern", "hook_resid_post")
    ]
    _, cache = tiny.run_with_cache(ids[:1], names_filter=names, use_cache=False)
    for head in found.heads:
        pattern = cache[f"blocks.{head.layer}.attn.hook_pattern"][0, head.head]
        for i, row in enumerate(head.rows):
            assert row == pytest.approx(pattern[i, : i + 1].tolist(), abs=5.1e-5)
    for layer in found.norms:
        expected = cache[f"blocks.{layer.layer}.hook_resid_post"][0].norm(dim=-1)
        assert layer.norms == pytest.approx(expected.tolist(), rel=1e-5)
    assert len(found.tokens) == ids.shape[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": [3]}, r"layer 3 is outside 0\.\.2"),
        ({"heads": [4]}, r"head 4 is outside 0\.\.3"),
        ({"heads": [-1]}, r"head -1 is outside 0\.\.3"),
        ({"heads": []}, "leave the argument out"),
    ],
)
def test_heads_that_are_not_there_are_refused(tiny, ids, options, says):
    with pytest.raises(SiteError, match=says):
        attention(tiny, prompts=Batch.of(ids), **options)


def test_a_layer_without_attention_cannot_be_shown(bridged, ids):
    model = bridged("qwen3-next")
    with pytest.raises(SiteError, match=r"layer 0 has no attention; these have: \[1, 3\]"):
        attention(model, prompts=Batch.of(ids), layers=[0])
