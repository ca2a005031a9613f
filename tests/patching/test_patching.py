"""Patching equals a plain loop of full runs with one hook, cell by cell."""

from __future__ import annotations

import json
import math

import pytest
import torch

from melens.batches import Batch
from melens.errors import MetricError, PromptError, ResultError, SiteError, UnknownNameError
from melens.interventions.context import pass_of
from melens.locating import locate
from melens.metrics import key_attention
from melens.patching import (
    KL,
    METRICS_OF_PATCH,
    SITES,
    LogitDifference,
    MassiveCoordinate,
    SinkRate,
    patch,
)
from melens.patching import sweep as sweep_module
from melens.patching.waves import other_rows
from melens.results.patch import PatchGrid

GENERATOR = torch.Generator().manual_seed(11)
CLEAN = torch.randint(3, 64, (2, 7), generator=GENERATOR)
CORRUPTED = torch.randint(3, 64, (2, 7), generator=GENERATOR)
DIFFERENCE = LogitDifference(5, 9)


def _padded(side):
    lengths = (7, 5)
    return [
        Batch.pad([row[:n].tolist() for row, n in zip(ids, lengths, strict=True)], side=side)
        for ids in (CLEAN, CORRUPTED)
    ]


PAIRS = {
    "plain": [Batch.of(CLEAN), Batch.of(CORRUPTED)],
    "right": _padded("right"),
    "left": _padded("left"),
}


def _run(model, batch, hooks=()):
    mask = batch.mask.long() if batch.padded else None
    with torch.no_grad():
        return model.run_with_hooks(
            batch.ids, fwd_hooks=list(hooks), attention_mask=mask, use_cache=False
        )


def _cache(model, batch):
    kept = {}

    def keep(name):
        return lambda x, hook: kept.__setitem__(name, x.clone())

    ends = {*HOOKS.values(), "hook_resid_mid"}
    names = [name for name in model.hook_dict if name.split(".", 2)[-1] in ends]
    _run(model, batch, [(name, keep(name)) for name in names])
    return kept


def _difference(logits, batch):
    last = batch.positions.argmax(1)
    ends = logits[torch.arange(len(logits)), last]
    return (ends[:, 5] - ends[:, 9]).mean().item()


def _setting(value, position, head=None):
    def edit(x, hook):
        x = x.clone()
        at = (slice(None), position) if head is None else (slice(None), position, head)
        x[at] = value[at]
        return x

    return edit


HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "ln1": "ln1.hook_out",
    "ln2": "ln2.hook_out",
    "z": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
}


def _mid_hooks(layer, source, target, position):
    """The FFN sees the other run's stream, and the stream itself moves by as much."""
    name = f"blocks.{layer}.hook_resid_mid"
    moved = source[name] - target[name]

    def shift(x, hook):
        x = x.clone()
        x[:, position] += moved[:, position]
        return x

    return [(name, _setting(source[name], position)), (f"blocks.{layer}.hook_resid_post", shift)]


def _plain(model, site, source, target, batch):
    """{(layer, position, head): logit difference}: one full run a cell.

    Of every layer; of the positions the ends, the second and one between, of the heads the ends.
    """
    found, width = {}, batch.ids.shape[1]
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.{HOOKS.get(site, 'hook_resid_mid')}"
        last = source[name].shape[2] - 1 if site in "zqkv" else 0
        heads = sorted({0, last // 2, last}) if site in "zqkv" else (None,)
        for position in (0, 1, width // 2, width - 1):
            for head in heads:
                hooks = [(name, _setting(source[name], position, head))]
                if site == "resid_mid":
                    hooks = _mid_hooks(layer, source, target, position)
                logits = _run(model, batch, hooks)
                found[layer, position, head] = _difference(logits, batch)
    return found


FAMILY_SITES = {
    "llama": list(SITES),  # grouped queries
    "gemma2": ["resid_pre", "resid_mid", "attn_out", "mlp_out", "ln2", "k"],  # sandwich norms
    "olmo2": ["resid_mid", "attn_out", "q"],  # norms behind attention and FFN alone
    "gpt2": ["resid_pre", "resid_mid", "mlp_out", "z"],
    "neox": ["resid_pre", "resid_post", "attn_out", "mlp_out", "v"],  # parallel
    "qwen3-next": ["resid_pre", "mlp_out"],  # no suffixes
}


@pytest.mark.parametrize("family", list(FAMILY_SITES))
def test_every_cell_equals_a_plain_run_with_a_hook(family, bridged, tokenizer):
    model = bridged(family, tokenizer=tokenizer)
    for kind in PAIRS if family in ("llama", "gpt2") else ("plain",):
        clean, corrupted = PAIRS[kind]
        caches = _cache(model, clean), _cache(model, corrupted)
        sites = FAMILY_SITES[family] if kind == "plain" else ["resid_pre", "resid_mid", "z"]
        made = patch(model, clean, corrupted, sites=sites, metric=DIFFERENCE)
        for found, batch in ((made.clean, clean), (made.corrupted, corrupted)):
            expected = _difference(_run(model, batch), batch)
            assert found == pytest.approx(expected, rel=1e-5, abs=2e-6)
        rows = made.rows()
        for site in sites:
            plain = _plain(model, site, *caches, corrupted)
            mine = [row for row in rows if row["site"] == site]
            made_at = {(row["layer"], row["position"], row["head"]): row["value"] for row in mine}
            assert len(made_at) == len(mine) == math.prod(torch.tensor(made.values[site]).shape)
            for at, expected in plain.items():
                assert made_at[at] == pytest.approx(expected, rel=1e-5, abs=2e-6), at


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out"])
def test_equal_to_the_patching_of_transformer_lens(site, tiny):
    from transformer_lens import patching

    clean, corrupted = PAIRS["plain"]
    with torch.no_grad():
        _, cache = tiny.run_with_cache(clean.ids)
        theirs = getattr(patching, f"get_act_patch_{site}")(
            tiny, corrupted.ids, cache, lambda logits: (logits[:, -1, 5] - logits[:, -1, 9]).mean()
        )
    made = patch(tiny, clean, corrupted, sites=site, metric=DIFFERENCE)
    ours = torch.tensor(made.values[site])
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=2e-6)


def test_a_mid_patch_moves_the_stream_itself(tiny):
    """Both what the FFN reads and what it is added to hold the clean value."""
    clean, corrupted = PAIRS["plain"]
    name = "blocks.1.hook_resid_mid"
    wanted = _cache(tiny, clean)[name]
    seen = {}

    def keep(key):
        return lambda x, hook: seen.__setitem__(key, x[-2:].clone())

    keys = [name, "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"]
    taken = [(key, keep(key)) for key in keys]
    with tiny.hooks(fwd_hooks=taken):
        patch(
            tiny, clean, corrupted, sites="resid_mid", metric=DIFFERENCE, layers=[1], positions=[3]
        )
    torch.testing.assert_close(seen[keys[0]][:, 0], wanted[:, 3], rtol=1e-5, atol=1e-6)
    stream = seen[keys[1]] - seen[keys[2]]
    torch.testing.assert_close(stream[:, 0], wanted[:, 3], rtol=1e-5, atol=1e-6)


def test_whole_rows_at_layer_0_give_the_other_run_and_ones_own_give_no_change(tiny):
    clean, corrupted = PAIRS["right"]
    for mode, end in (("denoising", "clean"), ("noising", "corrupted")):
        made = patch(
            tiny,
            clean,
            corrupted,
            sites=["resid_pre", "v"],
            by="layer",
            mode=mode,
            metric=DIFFERENCE,
        )
        assert made.values["resid_pre"][0] == pytest.approx(getattr(made, end), rel=1e-6)
        assert made.normalised(made.clean) == 1.0
        assert made.normalised(made.corrupted) == 0.0
        assert len(made.values["v"]) == 3
    with pytest.raises(PromptError, match="the same tokens"):
        patch(tiny, clean, clean, sites=["resid_pre", "z"], metric=DIFFERENCE)
    with pytest.raises(MetricError, match="cannot differ"):
        LogitDifference(5, 5)


def test_a_sequence_that_ends_before_a_position_counts_there_as_unpatched(tiny):
    rows = Batch.pad([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]])
    found = patch(tiny, rows, mode="mean", sites="mlp_out", metric="loss", layers=[1])
    short = found.by_sequence[1]["mlp_out"][0]
    assert short[4] == short[5]
    assert len({short[i] for i in range(4)}) > 1
    assert found.axes["mlp_out"][1].label[4] == "w9"
    assert found.axes["mlp_out"][1].label[0].endswith(" ...")


def test_a_function_of_ones_own_takes_no_checkpoint(tiny, tmp_path):
    clean, corrupted = PAIRS["right"]
    with pytest.raises(MetricError, match="cannot be told from another"):
        patch(tiny, clean, corrupted, metric=lambda lo: lo[:, -1, 3], checkpoint=tmp_path / "c")


def test_positions_before_the_first_difference_are_not_run_and_do_not_change(tiny, monkeypatch):
    ran = []
    real = sweep_module.run_wave

    def watched(wave, *rest):
        ran.extend(cell.position for cell in wave)
        return real(wave, *rest)

    monkeypatch.setattr(sweep_module, "run_wave", watched)
    other = CLEAN.clone()
    other[:, 4] = 3
    made = patch(tiny, Batch.of(CLEAN), Batch.of(other), metric=DIFFERENCE)
    assert set(ran) == {4, 5, 6}
    caches = _cache(tiny, Batch.of(CLEAN)), _cache(tiny, Batch.of(other))
    plain = _plain(tiny, "resid_pre", *caches, Batch.of(other))
    for row in made.rows():
        if (cell := (row["layer"], row["position"], None)) in plain:
            assert row["value"] == pytest.approx(plain[cell], rel=1e-5)


def test_ablation_by_the_mean_and_by_another_sequence(tiny):
    batch, name = Batch.of(torch.cat([CLEAN, CORRUPTED])), "blocks.1.hook_mlp_out"
    cache = _cache(tiny, batch)[name]
    order = other_rows(4, seed=3)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert all(i != row for i, row in enumerate(order.tolist()))
    values = {"mean": cache.mean((0, 1)).expand_as(cache), "resample": cache[order]}
    for mode, value in values.items():
        made = patch(tiny, batch, sites="mlp_out", mode=mode, metric=DIFFERENCE, layers=[1], seed=3)
        assert made.corrupted is None
        for row in made.rows():
            logits = _run(tiny, batch, [(name, _setting(value, row["position"]))])
            assert row["value"] == pytest.approx(_difference(logits, batch), rel=1e-5)
            assert row["effect"] is None
    with pytest.raises(PromptError, match="got 1 sequence; give at least 2, or use mode='mean'"):
        patch(tiny, Batch.of(CLEAN[:1]), mode="resample")


def _mean_loss(logits, batch):
    logs = logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    pairs = batch.mask[:, :-1] & batch.mask[:, 1:]
    return (-(logs * pairs).sum(-1) / pairs.sum(-1)).mean().item()


@pytest.mark.parametrize("kind", list(PAIRS))
def test_loss_kl_and_a_function_of_logits_equal_plain_runs(kind, tiny):
    clean, corrupted = PAIRS[kind]
    source = _cache(tiny, clean)
    ends = torch.arange(2), corrupted.positions.argmax(1)
    before = _run(tiny, corrupted)[ends].log_softmax(-1)

    def divergence(logits, batch):
        logs = logits[ends].log_softmax(-1)
        return (
            torch.nn.functional.kl_div(logs, before, log_target=True, reduction="none")
            .sum(-1)
            .mean()
            .item()
        )

    def spread(logits):
        return logits[:, 2:5].std(dim=(1, 2))  # real tokens, whatever the side of padding

    def at_the_end(logits):
        return logits[ends].std(dim=-1)  # a patch of the last position is felt

    plain = {
        at_the_end: lambda logits, _: at_the_end(logits).mean().item(),
        "loss": _mean_loss,
        "kl": divergence,
        spread: lambda logits, _: spread(logits).mean().item(),
    }
    for metric, expected in plain.items():
        made = patch(tiny, clean, corrupted, metric=metric)
        for row in made.rows():
            name = f"blocks.{row['layer']}.hook_resid_pre"
            logits = _run(tiny, corrupted, [(name, _setting(source[name], row["position"]))])
            assert row["value"] == pytest.approx(expected(logits, corrupted), rel=1e-5, abs=1e-7), (
                metric,
                row,
            )
        if metric == "kl":
            assert made.corrupted == pytest.approx(0, abs=1e-6)
        if metric == "loss":
            assert made.clean == pytest.approx(_mean_loss(_run(tiny, clean), clean), rel=1e-5)


@pytest.fixture
def located(tiny):
    """A MELayer of the tiny model, its numbers chosen: layer 0, peak 1, dimension 4."""
    found = locate(tiny, [Batch.of(CLEAN)])
    token = {"token_id": 1, "token": "<s>", "position": 0, "dim": 4, "value": 9.0, "frequency": 1.0}
    fields = type(found).model_fields["massive"].annotation.__args__[0].model_fields
    token |= {name: 1.0 for name in fields if name not in token}
    made = [type(found).model_fields["massive"].annotation.__args__[0].model_construct(**token)]
    return found.model_copy(
        update={"me_layer": 0, "peak_layer": 1, "massive": tuple(made), "verdict": "single"}
    )


@pytest.mark.parametrize("kind", list(PAIRS))
def test_massive_coordinate_and_sink_rate_equal_plain_runs(kind, tiny, located):
    clean, corrupted = PAIRS[kind]
    source = _cache(tiny, clean)
    first = corrupted.mask.long().argmax(1)
    sites = {"resid_pre": "hook_resid_pre", "q": "attn.hook_q", "resid_post": "hook_resid_post"}
    coordinate = patch(
        tiny,
        clean,
        corrupted,
        sites=list(sites),
        by="layer position",
        metric=MassiveCoordinate(located),
    )
    eps = 0.37  # near uniform attention over seven keys, so that patches matter
    sinks = patch(
        tiny,
        clean,
        corrupted,
        sites=list(sites),
        by="layer position",
        metric=SinkRate(located, eps=eps),
    )
    rates = set()
    for row, rate in zip(coordinate.rows(), sinks.rows(), strict=True):
        name = f"blocks.{row['layer']}.{sites[row['site']]}"
        kept = {}

        def keep(key, kept=kept):
            return lambda x, hook: kept.__setitem__(key, x.clone())

        reads = ["blocks.1.hook_resid_post"] + [f"blocks.{i}.attn.hook_pattern" for i in (1, 2)]
        hooks = [(name, _setting(source[name], row["position"]))]
        _run(tiny, corrupted, hooks + [(read, keep(read)) for read in reads])
        value = kept[reads[0]][torch.arange(2), first, 4].mean().item()
        assert row["value"] == pytest.approx(value, rel=1e-5), row
        shares = []
        for i in range(2):
            real = corrupted.mask[i].nonzero().flatten()
            for read in reads[1:]:
                alpha = key_attention(kept[read][i][:, real][:, :, real])[:, 0]
                shares += (alpha > eps).double().tolist()
        assert rate["value"] == pytest.approx(sum(shares) / len(shares))
        rates.add(rate["value"])
    assert len(rates) > 1


def test_interventions_outside_act_on_every_run_and_know_their_positions(tiny):
    clean, corrupted = PAIRS["plain"]

    def first_token(x, hook):
        return torch.where((pass_of(tiny).positions == 0)[..., None], 2.0 * x, x)

    from melens.interventions.context import watching

    edit = ("blocks.1.hook_mlp_out", first_token)
    with watching(tiny), tiny.hooks(fwd_hooks=[edit]):
        source = _cache(tiny, clean)
        made = patch(tiny, clean, corrupted, metric=DIFFERENCE)
        for row in made.rows():
            name = f"blocks.{row['layer']}.hook_resid_pre"
            logits = _run(tiny, corrupted, [(name, _setting(source[name], row["position"]))])
            assert row["value"] == pytest.approx(_difference(logits, corrupted), rel=1e-5, abs=2e-6)
    assert made.clean != patch(tiny, clean, corrupted, metric=DIFFERENCE).clean


def test_results_come_back_from_json_and_refuse_other_shapes(tiny):
    clean, corrupted = PAIRS["plain"]
    made = patch(tiny, clean, corrupted, sites=["z", "k", "resid_pre"], metric=DIFFERENCE)
    assert PatchGrid.from_json(made.to_json()) == made
    assert [axis.name for axis in made.axes["z"]] == ["layer", "position", "head"]
    assert len(made.axes["k"][2].index) == 2  # key-value heads
    means = [
        [(a + b) / 2 for a, b in zip(*rows, strict=True)]
        for rows in zip(*(part["resid_pre"] for part in made.by_sequence), strict=True)
    ]
    assert torch.tensor(means).allclose(torch.tensor(made.values["resid_pre"]))
    assert "changes most at" in made.summary()
    data = made.to_dict()
    data["values"]["z"][0].pop()
    with pytest.raises(ResultError, match="the shape of their axes"):
        PatchGrid.from_json(json.dumps(data))
    top = made.strongest()[0]
    assert abs(top["change"]) == max(abs(row["value"] - made.corrupted) for row in made.rows())


def test_an_interrupted_sweep_goes_on_and_a_stale_checkpoint_is_refused(
    tiny, tmp_path, monkeypatch
):
    clean, corrupted = PAIRS["plain"]
    path = tmp_path / "cells.json"
    options = {"sites": ["resid_pre", "mlp_out"], "metric": DIFFERENCE}
    whole = patch(tiny, clean, corrupted, **options)
    monkeypatch.setattr(sweep_module, "tokens_at_once", lambda run: 40)
    monkeypatch.setattr(sweep_module, "LEAST_TOKENS", 1)
    steps = []

    def stop(done, total):
        steps.append((done, total))
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patch(tiny, clean, corrupted, **options, progress=stop, checkpoint=path)
    saved = json.loads(path.read_text())["cells"]
    assert 0 < len(saved) == steps[-1][0] < steps[-1][1] == 42
    ran = []
    real = sweep_module.run_wave
    monkeypatch.setattr(
        sweep_module, "run_wave", lambda wave, *rest: ran.extend(wave) or real(wave, *rest)
    )
    again = patch(tiny, clean, corrupted, **options, checkpoint=path)
    assert len(ran) == 42 - len(saved)
    for site in options["sites"]:
        assert torch.tensor(again.values[site]).allclose(torch.tensor(whole.values[site]))
    with pytest.raises(ResultError, match=r"is of another sweep .* delete it to start again"):
        patch(tiny, clean, corrupted, sites="resid_pre", metric=DIFFERENCE, checkpoint=path)
    path.write_text("{}")
    with pytest.raises(ResultError, match="is no patching checkpoint"):
        patch(tiny, clean, corrupted, **options, checkpoint=path)


def test_memory_running_out_halves_the_waves_and_loses_nothing(tiny, monkeypatch):
    clean, corrupted = PAIRS["plain"]
    whole = patch(tiny, clean, corrupted, metric=DIFFERENCE)
    real, sizes = sweep_module.run_wave, []

    def small(wave, *rest):
        sizes.append(len(wave))
        if len(wave) > 2:
            raise torch.OutOfMemoryError("no")
        return real(wave, *rest)

    monkeypatch.setattr(sweep_module, "run_wave", small)
    made = patch(tiny, clean, corrupted, metric=DIFFERENCE)
    assert max(sizes) > 2
    assert torch.tensor(made.values["resid_pre"]).allclose(torch.tensor(whole.values["resid_pre"]))

    def never(wave, *rest):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(sweep_module, "run_wave", never)
    with pytest.raises(Exception, match="out of memory on one patched run of 14 tokens"):
        patch(tiny, clean, corrupted, metric=DIFFERENCE)


def test_no_hook_stays_and_the_mode_of_modules_is_kept(tiny):
    tiny.train()
    patch(tiny, *PAIRS["plain"], sites="z", metric="loss")
    assert all(not point.fwd_hooks for point in tiny.hook_dict.values())
    assert tiny.training


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"sites": "resid_middle"}, UnknownNameError, "Did you mean 'resid_mid'"),
        ({"sites": "resid_pre", "by": "layer head"}, SiteError, "'resid_pre' has no heads"),
        ({"sites": "z", "by": "head"}, SiteError, "cannot sweep by 'head'; choose 'layer'"),
        ({"layers": [3]}, SiteError, r"layer 3 is outside 0\.\.2"),
        ({"positions": [7]}, SiteError, r"position 7 is outside 0\.\.6"),
        ({"layers": []}, SiteError, "layers is empty"),
        ({"mode": "mean"}, PromptError, "mode 'mean' takes no corrupted run"),
        ({"mode": "denoise"}, UnknownNameError, "Did you mean 'denoising'"),
        ({"metric": "logit_difference"}, MetricError, "needs to know more"),
        ({"metric": 3}, MetricError, "a function of logits, got int"),
        ({"metric": LogitDifference(64, 1)}, MetricError, "outside the vocabulary, 0 to 63"),
        ({"metric": LogitDifference("w5 w6", 1)}, MetricError, "is 2 tokens"),
        ({"metric": LogitDifference([1, 2, 3], 1)}, MetricError, "3 tokens for 2 sequences"),
        ({"metric": lambda logits: logits.mean()}, MetricError, r"one number a row, \[2\]"),
        ({"metric": lambda logits: logits[:, 0, 0] / 0}, MetricError, "NaN or Inf"),
    ],
)
def test_what_cannot_be_patched_is_said(tiny, options, error, text):
    with pytest.raises(error, match=text):
        patch(tiny, *PAIRS["plain"], **{"metric": DIFFERENCE, **options})


def test_pairs_that_do_not_fit_are_refused(tiny, bridged, tokenizer):
    with pytest.raises(PromptError, match=r"clean is \(2, 7\) tokens, corrupted \(2, 6\)"):
        patch(tiny, Batch.of(CLEAN), Batch.of(CORRUPTED[:, :6]), metric="kl")
    with pytest.raises(PromptError, match=r"sequences \[1\] have other lengths"):
        patch(tiny, Batch.of(CLEAN), PAIRS["right"][1], metric="kl")
    with pytest.raises(PromptError, match=r"clean is \(1, 5\) tokens, corrupted \(1, 6\)"):
        patch(tiny, "w1 w2 w3 w4 w5", "w1 w2 w3 w4 w5 w6", metric="kl")
    neox = bridged("neox", tokenizer=tokenizer)
    with pytest.raises(SiteError, match="'resid_mid' cannot be patched at layer 0: attention and"):
        patch(neox, *PAIRS["plain"], sites="resid_mid")
    olmo = bridged("olmo2", tokenizer=tokenizer)
    with pytest.raises(SiteError, match="'ln1' cannot be patched at layer 0: there is no such"):
        patch(olmo, *PAIRS["plain"], sites="ln1")
    with pytest.raises(MetricError, match="needs a MELayer with a massive token"):
        MassiveCoordinate(locate(tiny, [Batch.of(CLEAN)]))


def test_texts_keep_their_whole_length_and_name_both_tokens(tiny):
    made = patch(tiny, "w5 w6 w7 w8", "w5 w9 w7 w8", metric=LogitDifference("w10", "w11"))
    labels = made.axes["resid_pre"][1].label
    assert [" | " in label for label in labels] == [False, True, False, False]
    assert made.metric_about == "logit of 'w10' minus logit of 'w11' after the last token"
    assert all(math.isfinite(row["effect"]) for row in made.rows())


def test_hybrid_layers_without_a_site_are_left_out_and_named(bridged, tokenizer):
    model = bridged("qwen3-next", tokenizer=tokenizer)
    made = patch(model, *PAIRS["plain"], sites="z", metric=KL(), by="layer")
    assert made.axes["z"][0].index == (1, 3)
    assert made.missing[0] == "z, layer 0: the layer has no attention"


def test_every_metric_has_a_docstring_and_is_bound_by_name():
    assert list(METRICS_OF_PATCH) == [
        "massive_coordinate",
        "sink_rate",
        "logit_difference",
        "kl",
        "loss",
    ]
