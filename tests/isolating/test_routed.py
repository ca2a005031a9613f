"""Routed experts: the planted one is named, and shares are what a hand-written pass gives."""

from __future__ import annotations

import copy
import json

import families
import pytest
import torch
from torch.nn.functional import cross_entropy

from melens.batches import Batch
from melens.cli.render import show_listings
from melens.cli.tables import TABLES
from melens.errors import SiteError
from melens.interventions.experts import expert_ablate_neuron, expert_prune
from melens.isolating import isolate
from melens.isolating.routed import NEAR, RoutedWrites
from melens.models import load
from melens.models.experts import experts_of
from melens.results.isolate import Isolation, RoutedExpert
from melens.settings import Run

LAYER, DIM = 1, 7


def ids():
    rows = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(5))
    rows[:, 0] = 1
    return rows


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_the_planted_expert_and_neuron_are_named(name):
    plain = families.tiny(name)
    made = families.plant(plain, LAYER, DIM)
    found = isolate(load(plain), None, [Batch.of(ids())], ffn_edit="drop")
    top = next(row for row in found.experts if row.layer == LAYER)
    assert (top.expert, top.neuron) == (made.expert, made.neuron)
    assert top.neuron_share == pytest.approx(1.0, abs=0.05)
    assert (LAYER, made.expert) in found.experts_to_protect
    weights = [row.weight for row in found.experts if row.layer == LAYER]
    assert sum(weights) == pytest.approx(1.0, abs=1e-5)  # two experts share one
    assert any("neurons of layer" in line for line in found.missing)


def test_shares_are_those_of_a_pass_written_by_hand():
    plain = families.tiny("MixtralForCausalLM")
    families.plant(plain, LAYER, DIM)
    given = []
    moe = plain.model.layers[LAYER].mlp
    handle = moe.register_forward_hook(lambda m, args, out: given.append((args[0], out)))
    with torch.no_grad():
        plain(torch.tensor([[1]]), use_cache=False)
    handle.remove()
    x, out = given[0][0][0], given[0][1].reshape(-1)
    expected = {}
    with torch.no_grad():
        scores = (x @ moe.gate.weight.T).softmax(-1)[0]
        chosen = scores.topk(2)
        for weight, expert in zip(chosen.values / chosen.values.sum(), chosen.indices, strict=True):
            gate, up = (x @ moe.experts.gate_up_proj[expert].T).chunk(2, -1)
            product = torch.nn.functional.silu(gate) * up
            write = (product @ moe.experts.down_proj[expert].T)[0, DIM] * weight
            expected[int(expert)] = (write / out[DIM]).item()
    found = isolate(load(plain), None, [Batch.of(ids())], ffn_edit="drop")
    shares = {row.expert: row.share for row in found.experts if row.layer == LAYER}
    assert shares == pytest.approx(expected, rel=1e-4)


def test_shares_are_of_what_the_experts_make_and_not_of_what_the_block_scales():
    """Granite adds a quarter of what its FFN makes: the experts still make all of it."""
    plain = families.tiny("GraniteMoeSWAForCausalLM")
    for block in plain.model.layers:
        block.residual_multiplier = 0.25
    families.plant(plain, LAYER, DIM)
    found = isolate(load(plain), None, [Batch.of(ids())], ffn_edit="drop")
    shares = [row.share for row in found.experts if row.layer == LAYER]
    assert sum(shares) == pytest.approx(1.0, abs=1e-4)


@pytest.fixture(scope="module", params=["MixtralForCausalLM", "GptOssForCausalLM"])
def pruned(request):
    """The plain model, what was planted, its bits before, and the isolation with its progress."""
    plain = families.tiny(request.param)
    made = families.plant(plain, LAYER, DIM)
    copied = copy.deepcopy(plain)
    before = [(stored, stored.detach().clone()) for stored in plain.parameters()]
    ticks = []
    found = isolate(
        load(plain),
        None,
        [Batch.of(ids()[:2]), Batch.of(ids()[2:])],
        ffn_edit="drop",
        run=Run(progress=lambda done, total: ticks.append((done, total))),
    )
    return copied, made, before, found, ticks


def plain_run(hf, prune=None):
    """Each row's mean loss, and the massive coordinate behind LAYER, of a plain model."""
    hf = copy.deepcopy(hf)
    if prune is not None:
        layer, expert = prune
        experts = hf.model.layers[layer].mlp.experts
        experts.down_proj.data[expert] = 0.0
        if hasattr(experts, "down_proj_bias"):
            experts.down_proj_bias.data[expert] = 0.0
    with torch.no_grad():
        out = hf(ids(), use_cache=False, output_hidden_states=True)
    logits = out.logits.double()
    each = [cross_entropy(x[:-1], y[1:]) for x, y in zip(logits, ids(), strict=True)]
    return torch.stack(each), out.hidden_states[LAYER + 1][0, 0, DIM].item()


def test_the_damage_of_an_expert_is_that_of_zeros_written_by_hand(pruned):
    plain, made, before, found, ticks = pruned
    base, whole = plain_run(plain)
    damage = found.pruned_experts[0]
    assert (damage.pruned.layer, damage.pruned.expert) == (LAYER, made.expert)
    assert len(found.pruned_experts) <= 3
    for row in [row for d in found.pruned_experts for row in (d.pruned, *d.controls)]:
        losses, left = plain_run(plain, (row.layer, row.expert))
        assert row.without.loss == pytest.approx(losses.mean().item(), rel=1e-5)
        change = (losses - base).mean().item()
        assert row.without.loss_delta == pytest.approx(change, rel=1e-4, abs=2e-6)
        if found.peak_layer == LAYER:
            assert row.without.left == pytest.approx(left / whole, abs=1e-4)
    assert abs(damage.pruned.without.left) < 0.01
    assert all(row.without.left > 0.9 for row in damage.controls)
    assert all(torch.equal(stored, kept) for stored, kept in before)
    assert ticks[-1][0] == ticks[-1][1]


def test_controls_have_the_nearest_shares_of_ordinary_tokens(pruned):
    plain, _, _, found, _ = pruned
    inputs = []
    mlp = plain.model.layers[LAYER].mlp
    handle = mlp.experts.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.extend(
            t for t in (*args, *kwargs.values()) if not t.is_floating_point()
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        plain(ids(), use_cache=False)
    handle.remove()
    index = inputs[0].view(*ids().shape, -1)[:, 1:]  # the first token of every row is massive
    shares = [(index == n).any(-1).double().mean().item() for n in range(4)]
    keep = {expert for layer, expert in found.experts_to_protect if layer == LAYER}
    damage = found.pruned_experts[0]
    own = shares[damage.pruned.expert]
    assert damage.pruned.others == pytest.approx(own)
    free = sorted(abs(shares[n] - own) for n in range(4) if n not in keep)
    free = [apart for apart in free if apart <= NEAR]
    assert free
    controls = [row.expert for row in damage.controls]
    assert [abs(shares[n] - own) for n in controls] == pytest.approx(free[:3])
    assert not set(controls) & keep
    assert [row.others for row in damage.controls] == pytest.approx([shares[n] for n in controls])


def test_the_damage_is_said_in_rows_the_sentence_and_the_table(pruned, capsys):
    _, made, _, found, _ = pruned
    name = f"expert {made.expert} of layer {LAYER}"
    assert f"Without {name} the loss changes by " in found.summary()
    assert " used by nearly as many (" in found.summary()
    labels = [row["ffn"] for row in found.rows()]
    assert f"without {name}" in labels
    assert sum(label.endswith("(control)") for label in labels) >= len(
        found.pruned_experts[0].controls
    )
    assert {tuple(row) for row in found.rows()} == {tuple(found.rows()[0])}
    show_listings(TABLES["isolate"](found))
    assert "One expert pruned at every token" in capsys.readouterr().out
    assert Isolation.from_json(found.to_json()) == found
    old = json.loads(found.to_json())
    del old["pruned_experts"]
    assert Isolation.from_json(json.dumps(old)).pruned_experts == ()


def test_controls_come_from_other_layers_where_a_layer_has_no_other_expert():
    used = {1: torch.tensor([0.2, 0.1]), 2: torch.tensor([0.5, 0.25, 0.0])}
    rows = [expert_row(1, 0, 0.6), expert_row(1, 1, 0.4), expert_row(2, 2, 0.9)]
    writes = RoutedWrites(rows=rows, used=used, written={1: 1000.0, 2: 0.5})
    trials = writes.trials
    assert [trial.at for trial in trials] == [(1, 0), (1, 1), (2, 2)]  # what they write counts
    assert [trial.controls for trial in trials] == [((2, 1),)] * 3  # 2, 0 is too far
    little = [row.model_copy(update={"of_peak": 0.01}) for row in rows]
    assert not RoutedWrites(rows=little, used=used, written={1: 1000.0, 2: 0.5}).trials
    alone = RoutedWrites(rows=rows[:2], used={1: used[1]}, written={1: 1.0})
    assert [trial.controls for trial in alone.trials] == [(), ()]


def expert_row(layer, expert, share):
    return RoutedExpert(
        layer=layer,
        expert=expert,
        weight=0.5,
        share=share,
        neuron=0,
        neuron_share=share,
        entry=1.0,
        others=0.0,
    )


def test_experts_that_do_more_than_their_weights_say_are_refused():
    model = load(families.tiny("MixtralForCausalLM"))
    experts = experts_of(model, LAYER)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert experts.route(x).index.shape == (5, 2)
    handle = experts.module.register_forward_hook(lambda module, args, out: out * 1.1)
    with pytest.raises(SiteError, match="more than their weights say"):
        experts.route(x)
    handle.remove()


def test_a_block_without_experts_has_none(tiny):
    with pytest.raises(SiteError, match="block 1 has no routed experts"):
        experts_of(tiny, 1)


def test_edits_of_experts_are_left_in_any_order():
    """Leaving one takes that one off and no other; the last leaves the bits as they were."""
    model = load(families.tiny("GptOssForCausalLM"))
    experts = experts_of(model, LAYER)
    before, bias = experts.down(0).clone(), experts.bias(0).clone()
    first, second = expert_prune(model, LAYER, 0), expert_ablate_neuron(model, LAYER, 0, neuron=3)
    first.__enter__()
    second.__enter__()
    assert not experts.down(0).any()
    first.__exit__(None, None, None)
    left = before.clone()
    left[3] = 0
    assert torch.equal(experts.down(0), left)
    assert torch.equal(experts.bias(0), bias)
    second.__exit__(None, None, None)
    assert torch.equal(experts.down(0), before)
