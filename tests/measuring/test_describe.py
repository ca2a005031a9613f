"""describe(): planted tokens, closed forms, and what varies between inputs."""

from __future__ import annotations

import itertools

import pytest
import torch
from planted import BOS_ID, batch, plant

from melens.batches import Batch
from melens.errors import PromptError, ResultError
from melens.intervals import wilson
from melens.locating import locate
from melens.locating.trajectory import trace
from melens.measuring import describe
from melens.measuring.first_tokens import sample_vocabulary
from melens.models import load


def portray(family, kind, seed, **options):
    planted = plant(family, kind, seed)
    model = load(planted.model)
    ids = Batch.of(batch(planted))
    located = locate(model, ids)
    return planted.truth, model, located, describe(model, located, ids, **options)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3"])
def test_a_planted_token_is_described_as_planted(family):
    truth, model, located, made = portray(family, "single", 3)
    assert made.me_layer == truth.me_layer == located.me_layer
    assert {entry.dim for entry in made.massive} == {truth.dim}
    assert made.massive[0].token_id == BOS_ID
    assert truth.me_layer in {step.layer for step in made.step_up}
    assert made.energy["1"] > 0.99
    assert made.coordinates[0].dim == truth.dim
    (path,) = trace(model, [[BOS_ID]])
    row = path.resid[made.peak_layer + 1]
    squares = row.square().sort(descending=True).values
    for top, share in made.energy.items():
        assert share == pytest.approx((squares[: int(top)].sum() / squares.sum()).item())
    assert made.coordinates[0].values == pytest.approx(path.resid[1:, truth.dim].tolist())
    end = path.resid[made.peak_layer + 1]
    for layer, cosine in enumerate(made.cosine_layers):
        here = path.resid[layer + 1]
        assert cosine == pytest.approx((here @ end / (here.norm() * end.norm())).item())


def test_only_the_planted_first_token_turns_massive():
    _, _, _, made = portray("llama", "single", 3, first_tokens=40)
    assert [row.token_id for row in made.first_tokens if row.massive] == [BOS_ID]
    by_name = {row.name: row for row in made.conditions}
    assert set(by_name) == {"texts' own, no BOS", "vocabulary sample"}  # no tokenizer here
    sample = by_name["vocabulary sample"]
    assert sample.first_tokens == 40
    assert sample.massive == (
        BOS_ID in [r.token_id for r in made.first_tokens if "vocabulary" in r.sources]
    )
    assert sample.interval == wilson(sample.massive, 40)
    assert made.inputs == 1
    assert set(made.cosine_inputs) == {None}  # one input has nothing to be compared with


def test_cosines_between_inputs_are_the_mean_over_pairs():
    """Every token of the vocabulary is planted: all first tokens are massive inputs."""
    planted = plant("llama", "final-growth", 1)
    assert len(planted.truth.token_ids) > 100
    from melens.inputs import prepare
    from melens.measuring.massive_token import RESID, Rigidity, observe

    model = load(planted.model)
    inputs = prepare(model, Batch.of(batch(planted)))
    rigidity, layers = Rigidity(model.cfg.n_layers, peak=model.cfg.n_layers - 1), {}
    for seen in observe(inputs, [[token] for token in range(10, 16)]):
        rigidity.add(seen)
        for site in (RESID, "ln1", "ln2"):
            for layer, row in seen.rows(site).items():
                layers.setdefault((site, layer), []).append(row)
    for site in (RESID, "ln1", "ln2"):
        for layer, found in enumerate(rigidity.between_inputs(site)):
            pairs = itertools.combinations(layers[site, layer], 2)
            expected = [torch.cosine_similarity(a, b, dim=0).item() for a, b in pairs]
            assert found == pytest.approx(sum(expected) / len(expected), abs=1e-9)


def test_what_the_norms_leave_is_what_the_hooks_show():
    truth, model, _, made = portray("llama", "single", 3)
    names = [f"blocks.{norm.layer}.{norm.site}.hook_out" for norm in made.norms]
    _, cache = model.run_with_cache(torch.tensor([[BOS_ID]]), names_filter=names)
    assert {norm.site for norm in made.norms} == {"ln1", "ln2"}
    for norm in made.norms:
        row = cache[f"blocks.{norm.layer}.{norm.site}.hook_out"][0, 0].double()
        share = row[truth.dim] ** 2 / row.square().sum()
        assert norm.after == pytest.approx(share.item(), rel=1e-5, abs=1e-12)
    later = [norm for norm in made.norms if norm.layer > truth.me_layer]
    assert all(norm.before > 0.98 for norm in later)


def test_a_stage_that_was_erased_shows_as_steps_up_and_down():
    truth, _, _, made = portray("llama", "re-emergent", 1)
    assert truth.erased_at in {step.layer for step in made.step_down}
    assert {truth.layers[0], truth.me_layer} <= {step.layer for step in made.step_up}


def test_nothing_massive_leaves_the_first_tokens():
    _, _, located, made = portray("llama", "none", 2)
    assert located.verdict == "none"
    assert made.massive == made.step_up == made.cosine_layers == ()
    assert made.energy is None
    assert made.first_tokens
    assert not any(row.massive for row in made.first_tokens)
    assert "no massive token to describe" in made.summary()
    assert made.rows()


def test_a_later_token_is_compared_with_its_other_occurrences():
    """BOS left out: the second planted token is massive wherever it stands."""
    planted = plant("llama", "several-tokens", 2)
    model = load(planted.model)
    ids = batch(planted)[:, 1:]
    located = locate(model, Batch.of(ids))
    assert located.massive[0].position > 0
    made = describe(model, located, Batch.of(ids), first_tokens=5)
    assert made.massive[0].token_id == planted.truth.token_ids[1]
    assert made.inputs >= 2
    assert min(value for value in made.cosine_inputs[made.peak_layer :]) > 0.99
    assert made.cosine_layers[made.peak_layer] == pytest.approx(1)


def test_a_bos_is_told_from_the_texts_own_first_tokens(tiny):
    made = describe(tiny, prompts=Batch.of(torch.tensor([[1, 5, 6, 7], [1, 8, 6, 7]])))
    by_name = {row.name: row for row in made.conditions}
    assert by_name["with BOS"].first_tokens == 1
    assert by_name["texts' own, no BOS"].first_tokens == 2
    assert "chat template" not in by_name
    starts = {row.token_id: row.sources for row in made.first_tokens}
    assert starts[1] == ("bos",)
    assert set(starts[5]) <= {"text", "vocabulary"}


def test_energy_in_the_top_direction_and_the_norm_ratio_in_closed_form():
    truth, model, _, made = portray("llama", "single", 3)
    assert made.energy_direction == pytest.approx(1)  # one input
    d = model.cfg.d_model
    (name,) = {f"blocks.{truth.me_layer}.ln2.hook_out"}
    _, cache = model.run_with_cache(torch.tensor([[BOS_ID]]), names_filter=[name])
    (seen,) = (n for n in made.norms if (n.layer, n.site) == (truth.me_layer, "ln2"))
    expected = (cache[name][0, 0].square().mean() ** 0.5).item()
    assert d == cache[name].shape[-1]
    assert seen.norm_ratio == pytest.approx(expected, rel=1e-5)


def test_a_token_alone_is_judged_as_locate_judges_it():
    """An erased stage does not count, and a broad outlier dimension makes nothing massive."""
    for kind, seed in (("re-emergent", 1), ("none", 1), ("several-tokens", 2)):
        _, _, located, made = portray("llama", kind, seed, first_tokens=127)
        tried = {row.token_id: row for row in made.first_tokens}
        for token in located.stability.first_tokens:
            assert tried[token.token_id].massive == token.massive
            assert tried[token.token_id].first_share == token.me_layer
        if located.massive:
            assert tried[BOS_ID].first_share == located.me_layer


def test_a_later_token_that_the_texts_lack_is_refused_in_words():
    planted = plant("llama", "several-tokens", 2)
    model = load(planted.model)
    located = locate(model, Batch.of(batch(planted)[:, 1:]))
    with pytest.raises(PromptError, match="is not massive in these; locate on the texts"):
        describe(model, located, Batch.of(torch.arange(20, 40)[None]))


def test_samples_are_seeded_distinct_and_ordinary(tiny):
    sample = sample_vocabulary(tiny, count=30, seed=4)
    assert sample == sample_vocabulary(tiny, count=30, seed=4)
    assert sample != sample_vocabulary(tiny, count=30, seed=5)
    assert len(set(sample)) == 30
    assert not set(sample) & set(tiny.tokenizer.all_special_ids)
    assert len(sample_vocabulary(tiny, count=10_000, seed=0)) == 60  # of 64, four are special


def test_wilson_interval():
    low, high = wilson(0, 64)
    z = 1.959964
    assert (low, high) == (0.0, pytest.approx(z**2 / (64 + z**2)))
    low, high = wilson(50, 100)
    assert low == pytest.approx(0.4038, abs=1e-4)  # textbook value
    assert high == pytest.approx(0.5962, abs=1e-4)


def test_a_result_of_another_model_is_refused(tiny, ids):
    planted = plant("llama", "single", 3)
    other = load(planted.model)
    located = locate(other, Batch.of(batch(planted)))
    with pytest.raises(ResultError, match="the model at hand has weights"):
        describe(tiny, located, Batch.of(ids))
    edited = located.model_copy(
        update={"massive": (located.massive[0].model_copy(update={"dim": 10**6}),)}
    )
    with pytest.raises(ResultError, match=r"dimensions \[1000000\], the model .* d_model 64"):
        describe(other, edited, Batch.of(batch(planted)))
    with pytest.raises(PromptError, match="from 0 on, got -1"):
        describe(other, first_tokens=-1)
