"""Attention sinks: closed forms, the patterns TransformerLens caches, padding, spans."""

from __future__ import annotations

import math

import families
import pytest
import torch
from planted import BOS_ID, batch, plant

from melens.batches import Batch
from melens.errors import MetricError, PromptError
from melens.locating import locate
from melens.measuring import sinks
from melens.measuring.attention_sinks import LEAST_QUERIES, PatternSums, spans
from melens.metrics import attention_entropy, key_attention, uniform_alpha
from melens.models import load


def uniform(n):
    return torch.tril(torch.ones(n, n)) / torch.arange(1, n + 1)[:, None]


def test_uniform_attention_in_closed_form():
    alpha = key_attention(uniform(4))
    harmonic = [(1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, (1 / 2 + 1 / 3 + 1 / 4) / 3, (1 / 3 + 1 / 4) / 2]
    torch.testing.assert_close(alpha, torch.tensor([*harmonic, 1 / 4], dtype=torch.float64))
    assert uniform_alpha(4) == pytest.approx(harmonic[0])
    entropy = attention_entropy(uniform(4))
    torch.testing.assert_close(entropy, torch.tensor([1.0, 2, 3, 4]).log())


def test_a_perfect_sink_and_a_perfect_diagonal():
    sink = torch.zeros(5, 5)
    sink[:, 0] = 1
    torch.testing.assert_close(key_attention(sink), torch.tensor([1.0, 0, 0, 0, 0]).double())
    torch.testing.assert_close(
        key_attention(torch.eye(5)), torch.tensor([1 / 5, 1 / 4, 1 / 3, 1 / 2, 1]).double()
    )
    assert attention_entropy(sink).abs().max() == 0


def test_what_has_no_sink_rate_is_refused():
    with pytest.raises(MetricError, match="square"):
        key_attention(torch.ones(3, 4))


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.0, 0.6, 0.7, 0.2, 0.5], [(1, 2), (4, 4)]),
        ([0.6, None, 0.9, 0.1], [(0, 2)]),
        ([None, 0.1], []),
    ],
)
def test_spans_of_layers(rates, expected):
    assert [(span.first, span.last) for span in spans(rates)] == expected


def gu(patterns, eps, t):
    """Their formula with plain loops: [layer][sequence, head, query, key]."""
    over = []
    for layer in patterns:
        for sample in layer:
            for head in sample:
                head = head[:t, :t]
                n = len(head)
                over.append(sum(head[i, 0].item() for i in range(n)) / n > eps)
    return sum(over) / len(over)


@pytest.mark.parametrize("t", [5, 64])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3-next", "neox"])
def test_the_cached_patterns_give_the_same_numbers(bridged, tokenizer, ids, family, t):
    model = bridged(family, tokenizer=tokenizer)
    found = sinks(model, prompts=Batch.of(ids), t=t)
    names = [name for name in model.hook_dict if name.endswith("attn.hook_pattern")]
    _, cache = model.run_with_cache(ids, names_filter=names, use_cache=False)
    patterns = {int(name.split(".")[1]): cache[name] for name in names}
    for eps, rate in found.overall.items():
        assert rate == pytest.approx(gu(patterns.values(), float(eps), t))
    for layer in range(model.cfg.n_layers):
        if layer not in patterns:
            assert found.attention_to_token[layer] is None
            continue
        pattern = patterns[layer][:, :, :t, :t]
        assert found.attention_to_token[layer] == pytest.approx(
            pattern[..., 0].mean().item(), rel=1e-5
        )
        entropy = torch.special.entr(pattern).sum(-1)[:, :, 1:].mean()
        assert found.entropy[layer] == pytest.approx(entropy.item(), rel=1e-4)
    alphas = {(head.layer, head.head): head.alpha for head in found.heads}
    for layer, pattern in patterns.items():
        for head, value in enumerate(pattern[:, :, :t, 0].mean(dim=(0, 2)).tolist()):
            assert alphas[layer, head] == pytest.approx(value, rel=1e-5)
    assert found.t == t
    length = min(t, ids.shape[1])
    shown = {(key.layer, key.head, key.position): key for key in found.keys}
    for layer, pattern in patterns.items():
        for position in range(length):
            alphas = pattern[:, :, position:length, position].mean(dim=-1)  # [sequence, head]
            for head in range(pattern.shape[1]):
                key = shown.get((layer, head, position))
                enough = position == 0 or length - position >= LEAST_QUERIES
                assert (key is not None) == (enough and bool((alphas[:, head] > 0.2).any()))
                if key is not None:
                    assert key.alpha == pytest.approx(alphas[:, head].mean().item(), rel=1e-5)
                    for eps, rate in key.rate.items():
                        over = (alphas[:, head] > float(eps)).float().mean().item()
                        assert rate == pytest.approx(over)
                    assert key.queries == len(ids) * (length - position)
    rates = {(head.layer, head.head): head.rate for head in found.heads}
    for (layer, head), rate in rates.items():
        assert (
            rate == shown[layer, head, 0].rate
            if (layer, head, 0) in shown
            else not any(rate.values())
        )
    for layer, pattern in patterns.items():
        means = pattern[:, :, :t, 0].mean(dim=(0, 2))
        assert found.head_rate["0.3"][layer] == (means > 0.3).float().mean().item()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batches_change_nothing(tiny, side):
    rows = [[5, 9, 11, 7, 8], [6, 10, 12, 20, 21, 22, 23, 9], [30, 31, 32, 33]]
    padded = sinks(tiny, prompts=Batch.pad(rows, side=side))
    alone = sinks(tiny, prompts=[Batch.of(torch.tensor([row])) for row in rows])
    assert padded.overall == pytest.approx(alone.overall)
    assert padded.sink_rate == alone.sink_rate
    assert padded.attention_to_token == pytest.approx(alone.attention_to_token, rel=1e-5)
    assert padded.entropy == pytest.approx(alone.entropy, rel=1e-5)
    assert (
        padded.uniform
        == alone.uniform
        == pytest.approx((uniform_alpha(5) + uniform_alpha(8) + uniform_alpha(4)) / 3)
    )


def test_first_and_later_massive_tokens_are_told_apart():
    planted = plant("llama", "several-tokens", 2)
    model = load(planted.model)
    ids = batch(planted)
    found = sinks(model, locate(model, Batch.of(ids)), Batch.of(ids))
    kinds = {token.token_id: token for token in found.tokens}
    assert set(kinds) == set(planted.truth.token_ids)
    assert kinds[BOS_ID].position == 0
    assert kinds[BOS_ID].count == len(ids)
    (later,) = (token for token in found.tokens if token.position)
    places = (ids == later.token_id).nonzero().tolist()
    places = [(i, k) for i, k in places if ids.shape[1] - k >= LEAST_QUERIES]
    assert later.count == len(places)
    assert found.others is not None
    assert found.onset_of == "first"
    _, cache = model.run_with_cache(ids, use_cache=False)
    layer = model.cfg.n_layers - 1
    pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
    expected = [pattern[i, :, k:, k].mean(dim=-1).mean().item() for i, k in places]
    assert found.others["0.3"][layer] == pytest.approx(
        torch.stack([(pattern[i, :, k:, k].mean(dim=-1) > 0.3).double().mean() for i, k in places])
        .mean()
        .item()
    )
    assert later.attention[layer] == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_longer_sequences_add_keys_not_errors():
    x = torch.stack([uniform(6)] * 2)[:, None]
    heavy = [torch.zeros(2, 6, dtype=torch.bool), torch.zeros(1, 9, dtype=torch.bool)]
    taps = PatternSums(heavy)
    taps.update(x, Batch.of(torch.ones(2, 6, dtype=torch.long)))
    taps.update(uniform(9)[None, None], Batch.of(torch.ones(1, 9, dtype=torch.long)))
    made = taps.result()
    assert made.alpha.shape == (1, 9)
    assert made.queries.tolist() == [2 * 6 + 9, 8, 0, 0, 0, 0, 0, 0, 0]  # fewer than 8 do not count
    assert made.alpha[0, 8].item() == 0
    first = (2 * uniform_alpha(6) + uniform_alpha(9)) / 3
    assert made.alpha[0, 0].item() == pytest.approx(first)
    spread = 2 * sum(math.log(i) for i in range(2, 7)) + sum(math.log(i) for i in range(2, 10))
    assert made.entropy.item() == pytest.approx(spread / (2 * 5 + 8), rel=1e-6)


def test_a_key_that_only_sees_itself_is_no_sink():
    """A diagonal head gives key 14 of 16 an alpha of 0.5, from two queries."""
    heavy = torch.zeros(1, 16, dtype=torch.bool)
    heavy[0, [2, 14]] = True
    taps = PatternSums([heavy])
    taps.update(torch.eye(16)[None, None], Batch.of(torch.arange(16)[None] + 3))
    made = taps.result()
    assert set(made.tokens) == {(False, 5)}
    assert made.rates[0].nonzero().tolist() == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_t_cuts_padded_rows_as_it_cuts_others(tiny, side):
    rows = [list(range(5, 25)), list(range(6, 18))]
    padded = sinks(tiny, prompts=Batch.pad(rows, side=side), t=8)
    alone = sinks(tiny, prompts=[Batch.of(torch.tensor([row])) for row in rows], t=8)
    assert padded.attention_to_token == pytest.approx(alone.attention_to_token, rel=1e-5)
    assert padded.uniform == pytest.approx(uniform_alpha(8))
    assert padded.t == 8


def test_what_is_massive_in_the_texts_decides_whose_onset_it_is():
    planted = plant("llama", "several-tokens", 2)
    model = load(planted.model)
    ids = batch(planted)
    located = locate(model, Batch.of(ids))
    headless = sinks(model, located, Batch.of(ids[:, 1:]))
    assert headless.onset_of == "others"
    assert {token.token_id for token in headless.tokens} == {planted.truth.token_ids[1]}
    assert min(token.position for token in headless.tokens) > 0


def test_short_texts_say_what_uniform_attention_gives(tiny):
    found = sinks(tiny, prompts=Batch.of(torch.tensor([[5, 6, 7, 8]])))
    assert "short texts: uniform attention alone gives 0.52" in found.summary()


def test_a_t_over_all_texts_is_said(tiny, ids, monkeypatch):
    said = []
    monkeypatch.setattr("melens.measuring.attention_sinks.say_once", said.append)
    longest, rows = ids.shape[1], [ids[0].tolist(), ids[1, :4].tolist()]
    for t in (longest, longest + 1):
        sinks(tiny, prompts=rows, t=t)
    assert len(said) == 1
    assert f"T = {longest + 1} exceeds the longest text ({longest} tokens)" in said[0]


def test_a_t_that_no_query_fills_is_refused(tiny, ids):
    with pytest.raises(
        PromptError, match="t must be a whole number of at least 2, got 1; the paper takes 64"
    ):
        sinks(tiny, prompts=Batch.of(ids), t=1)


def test_a_learned_sink_takes_what_its_logit_says():
    """Zero queries make every score zero: of n keys a sink logit s leaves n / (n + e^s)."""
    plain = families.tiny("GptOssForCausalLM")
    logits = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    with torch.no_grad():
        for block in plain.model.layers:
            block.self_attn.q_proj.weight.zero_()
            block.self_attn.q_proj.bias.zero_()
            block.self_attn.sinks.copy_(logits)
    ids = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(2))
    found = sinks(load(plain), None, [Batch.of(ids)])
    keys = torch.arange(1, 11)[:, None]
    taken = (logits.exp() / (keys + logits.exp())).mean(0)
    full = [row for layer, row in enumerate(found.learned_sink) if layer % 2]  # others see a window
    for row in full:
        torch.testing.assert_close(torch.tensor(row), taken, rtol=1e-5, atol=1e-6)
    assert found.rows()[1]["learned_sink"] == pytest.approx(taken.mean().item(), rel=1e-5)


def test_a_model_without_a_learned_sink_says_nothing_of_one(tiny, ids):
    found = sinks(tiny, None, [Batch.of(ids)])
    assert found.learned_sink == ()
    assert "learned_sink" not in found.rows()[0]
