"""Models whose emergence was planted: the truth is known. 56 of them and more, four families."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from planted import BOS_ID, FAMILIES, KINDS, SECOND_ID, batch, plant

from melens.batches import Batch
from melens.errors import ContractError
from melens.locating import locate
from melens.models import anatomy, contract, load


def seeds_of(kind, family):
    """Two of four seeds, others in each family and for each kind; all with MELENS_ALL_PLANTED=1."""
    if os.environ.get("MELENS_ALL_PLANTED"):
        return tuple(range(4))
    first = KINDS.index(kind) + FAMILIES.index(family)
    return first % 4, (first + 2) % 4


VERDICT = {"several-tokens": "single", "final-growth": "none"}


BRIDGES = {}
"""Family and depth -> a bridge and its parameters by their names before it was one."""


def _bridged(planted):
    """Under the bridge of its shape: bridging costs more than locating. GPT-2's splits copies."""
    if planted.family == "gpt2":
        return load(planted.model)
    shape = (planted.family, planted.model.config.num_hidden_layers)
    given = dict(planted.model.named_parameters())
    if shape not in BRIDGES:
        BRIDGES[shape] = (load(planted.model), given)
    bridge, parameters = BRIDGES[shape]
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(given[name])
    return bridge


@functools.cache
def _locate(kind, family, seed):
    planted = plant(family, kind, seed)
    return locate(_bridged(planted), [Batch.of(batch(planted, seed=seed))]), planted.truth


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_planted_is_found(kind, family):
    for seed in seeds_of(kind, family):
        found, truth = _locate(kind, family, seed)
        where = f"{kind} {family} seed {seed}"
        assert found.verdict == VERDICT.get(kind, kind), where
        assert found.me_layer == truth.me_layer, where
        if found.me_layer is None:
            assert found.main_layer is None
            assert found.massive == ()
            continue
        assert found.main_layer == truth.main_layer, where
        assert found.massive[0].token_id == BOS_ID
        assert found.massive[0].dim == truth.dim
        assert found.writer.ffn > 0.9


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_and_other_tokens_are_named(family):
    for seed in seeds_of("re-emergent", family):
        found, truth = _locate("re-emergent", family, seed)
        assert [stage.layer for stage in found.stages] == [truth.layers[0], truth.me_layer]
        assert found.stages[0].erased_at == truth.erased_at
    for seed in seeds_of("several-tokens", family):
        several, _ = _locate("several-tokens", family, seed)
        assert {token.token_id for token in several.massive} == {BOS_ID, SECOND_ID}
        assert next(t for t in several.massive if t.token_id == SECOND_ID).position > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_growth_in_the_last_layer_is_told_apart(family):
    for seed in seeds_of("final-growth", family):
        found, truth = _locate("final-growth", family, seed)
        assert found.final_layer_growth.layer == truth.main_layer
        assert found.final_layer_growth.dim == truth.dim
        assert found.final_layer_growth.factor > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_confidence_falls_where_no_single_layer_explains_it(family):
    single, _ = _locate("single", family, 1)
    gradual, _ = _locate("gradual", family, 1)
    assert single.confidence > 0.5
    assert gradual.confidence < 0.4
    assert gradual.level == "low"
    assert gradual.cumulative.p10 < gradual.cumulative.p50 < gradual.cumulative.p90


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_token_that_is_massive_in_the_embedding_is_said_to_be(family):
    planted = plant(family, "none", 2)
    with torch.no_grad():
        planted.model.get_input_embeddings().weight[BOS_ID, 7] = 5000.0
    found = locate(planted.model, [Batch.of(batch(planted))])
    assert (found.me_layer, found.main_layer, found.writer) == (-1, -1, None)
    assert found.massive[0].dim == 7
    assert "already in the embedding" in found.summary()


def test_a_folded_model_is_marked_as_such():
    planted = plant("llama", "single", 1)
    bridge = load(planted.model)
    batches = [Batch.of(batch(planted))]
    assert locate(bridge, batches).run.settings["folded_norms"] is False
    bridge.enable_compatibility_mode()
    assert locate(bridge, batches).run.settings["folded_norms"] is True


def test_locating_leaves_the_mode_and_bridges_an_object_once():
    model = plant("llama", "single", 1).model
    batches = [Batch.of(batch(plant("llama", "single", 1)))]
    bridge = load(model)
    assert load(model) is bridge
    count = len(list(model.modules()))
    bridge.train()
    assert locate(model, batches).me_layer == locate(bridge, batches).me_layer
    assert bridge.training
    assert len(list(model.modules())) == count


def test_a_small_leak_is_not_hidden_by_the_massive_token():
    planted = plant("llama", "single", 1)
    bridge = load(planted.model)

    def leak(x, hook):
        x = x.clone()
        x[:, 3] += 0.02  # 20 000 in the first token must not buy the fourth an error of 0.2
        return x

    ids = torch.tensor([[BOS_ID, 20, 30, 40, 50, 60]])
    layer = planted.truth.me_layer
    seen = {}
    with bridge.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", leak)]):
        hooks = [(s, lambda x, hook, s=s: seen.update({s: x})) for s in _sites(bridge, layer)]
        with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
            bridge(ids)
    assert seen[f"blocks.{layer}.hook_resid_post"].abs().max() > 3000
    with pytest.raises(ContractError, match="misses resid_post"):
        contract._check_block(bridge, anatomy(bridge).blocks[layer], seen)


def _sites(bridge, layer):
    block = anatomy(bridge).blocks[layer]
    return [*contract._sites(bridge, block), f"blocks.{layer}.hook_resid_post"]


def _profile(found):
    return torch.tensor([[row.max, row.median, row.norm_ratio] for row in found.profile])


@pytest.mark.parametrize("family", FAMILIES)
def test_results_do_not_depend_on_batching_order_or_padding(family):
    planted = plant(family, "single", 2)
    rows = [row.tolist() for row in batch(planted, n=4, length=40)]
    rows = [rows[0], rows[1][:25], rows[2], rows[3][:33]]
    ways = {
        "together, right": [Batch.pad(rows)],
        "together, left": [Batch.pad(rows, side="left")],
        "one by one": [Batch.pad([row]) for row in rows],
        "reversed": [Batch.pad(rows[::-1])],
    }
    results = {name: locate(planted.model, batches) for name, batches in ways.items()}
    reference = results["one by one"]
    for name, found in results.items():
        assert (found.verdict, found.me_layer, found.criteria) == (
            reference.verdict,
            reference.me_layer,
            reference.criteria,
        ), name
        # float32 sums in another order: 1e-5 of values that are compared relatively
        torch.testing.assert_close(_profile(found), _profile(reference), rtol=2e-4, atol=1e-5)
        assert [t.token_id for t in found.massive] == [t.token_id for t in reference.massive]


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_finds_the_same(family):
    # A planted erasure is calibrated in float32: rounded to bf16 it is another model, so not here.
    for kind in ("single", "several-tokens"):
        planted = plant(family, kind, 3)
        batches = [Batch.of(batch(planted))]
        exact = locate(planted.model, batches)
        half = plant(family, kind, 3).model.to(torch.bfloat16)
        rough = locate(half, batches)
        assert (rough.verdict, rough.me_layer, rough.main_layer) == (
            exact.verdict,
            exact.me_layer,
            exact.main_layer,
        )
        assert rough.massive[0].dim == exact.massive[0].dim
        for near, row in zip(rough.profile, exact.profile, strict=True):
            # bf16 keeps 8 bits: 2^-8 a rounding, a few of them over the layers
            assert near.median == pytest.approx(row.median, rel=0.05)
            if row.max > 100:
                assert near.max == pytest.approx(row.max, rel=0.03)


def test_the_same_seed_gives_the_same_json_but_for_times():
    planted = plant("llama", "gradual", 0)
    batches = [Batch.of(batch(planted))]
    first, second = (locate(planted.model, batches, seed=5).to_dict() for _ in range(2))
    first["run"].pop("created"), second["run"].pop("created")
    assert first == second
    other = locate(planted.model, batches, seed=6)
    assert other.stability.first_tokens != locate(planted.model, batches).stability.first_tokens
