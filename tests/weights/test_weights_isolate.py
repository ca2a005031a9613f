"""Reference values of the cause, on the real weights: fp32, CPU, BOS first."""

from __future__ import annotations

import pytest

from melens.batches import prompts
from melens.inputs import prepare
from melens.interventions import residual_set
from melens.isolating import isolate, mean_coordinates
from melens.isolating import runs as edits
from melens.isolating.neurons import written_at
from melens.isolating.runs import Prefixes, RunChange
from melens.locating import locate
from melens.measuring.located import settle

NECESSITY_S = {
    0: 0.0021,
    1: 1.2334,
    2: 0.9223,
    3: 0.9759,
    4: 0.9883,
    5: 0.9796,
    6: 0.9815,
    7: 0.8717,
    8: 0.175,
    9: 0.2295,
    10: 0.549,
    11: 0.0018,
}
SHUFFLED_S = [0.931, 0.970, 1.001, 0.959, 0.955, 0.983, 0.976, 0.958, 0.907, 0.885]
NECESSITY_G = {0: 0.9993, 1: 0.1339, 2: 0.9965, 3: 0.1158, 4: 0.8396, 5: 0.8019, 8: 0.8355}
SHARES_G = {3: (1414, 0.9731), 4: (84, 0.9607), 5: (584, 0.9906), 7: (1455, 0.9648)}


@pytest.mark.weights
def test_the_cause_in_smollm2(smol):
    texts = prompts("bundled", bos=True, n=1, length=8)
    me = locate(smol, texts)
    found = isolate(smol, me, texts)
    assert (found.layer, found.dim, found.observations) == (11, 507, 1)
    assert found.coordinate == pytest.approx(24926.2, rel=0.002)
    f = found.factorial
    assert f.flat_kept.left == pytest.approx(0.9477, abs=0.02)
    assert f.kept_edited.left == pytest.approx(0.0053, abs=0.02)
    left = {write.layer: write.left for write in found.necessity if write.part == "ffn"}
    assert left == pytest.approx(NECESSITY_S, abs=0.02)
    alone = {(w.layer, w.part): w.left for w in found.sufficiency}
    assert alone[11, "ffn"] == pytest.approx(1, abs=0.02)
    assert max(v for at, v in alone.items() if at != (11, "ffn")) < 0.15
    (norm,) = found.norms
    assert norm.half == pytest.approx(0.9737, abs=0.02)
    assert norm.ones == pytest.approx(16.0, rel=0.02)
    assert norm.shuffled == pytest.approx(SHUFFLED_S, abs=0.02)
    rows = {(n.layer, n.neuron): n for n in found.neurons}
    for at, share in {
        (11, 1229): 0.7238,
        (11, 1487): 0.2728,
        (2, 90): 0.5426,
        (2, 430): 0.4221,
        (28, 678): 0.9617,
    }.items():
        assert rows[at].share == pytest.approx(share, abs=0.01)
    top = rows[11, 1229]
    assert (top.gate, top.up, top.weight) == pytest.approx((49.5, 61.9, 5.88), abs=0.1)
    assert top.left == pytest.approx(0.2775, abs=0.02)
    assert found.neurons_for == {"0.5": 1, "0.9": 2, "0.99": 2}
    ratios = {step.site: step.ratio for step in found.path}
    for site, ratio in {"resid_mid": 1.4, "norm": 1.7, "gate": 2.7, "up": 3.8}.items():
        assert ratios[site] == pytest.approx(ratio, rel=0.15)
    assert ratios["product"] > 300
    assert ratios["down"] > 500
    assert found.direction.massive > 5 * found.direction.others_median
    assert found.direction.explained == pytest.approx(1, abs=0.05)
    assert found.gains.at_dim == pytest.approx(0, abs=1e-3)


@pytest.mark.weights
def test_layer_2_of_smollm2_is_no_cause_of_the_peak(smol):
    texts = prompts("bundled", bos=True, n=1, length=16)
    me = locate(smol, texts)
    inputs = prepare(smol, texts)
    prefixes = Prefixes(inputs, settle(inputs, me), 507)
    assert prefixes.left(RunChange(2, (edits.flatten(2, "ln2"),))) == pytest.approx(
        0.9046, abs=0.02
    )
    assert prefixes.left(RunChange(2, (edits.ablate(2, [90]),))) == pytest.approx(1.0194, abs=0.02)
    means = mean_coordinates(smol, me, texts)
    assert means[507] == pytest.approx(24926, rel=0.002)
    with residual_set(smol, me, dims=list(means), values=list(means.values())):
        again = Prefixes(inputs, settle(inputs, me), 507)
    assert again.clean.mean().item() == pytest.approx(prefixes.clean.mean().item(), rel=1e-4)


@pytest.mark.gemma
def test_the_cause_in_gemma(gemma):
    """The references were taken at layer 13 (102 014), one before the peak of the norm."""
    texts = prompts("bundled", bos=True, n=1, length=16)
    me = locate(gemma, texts).model_copy(update={"peak_layer": 13})
    inputs = prepare(gemma, texts)
    prefixes = Prefixes(inputs, settle(inputs, me), 163)
    assert prefixes.clean.mean().item() == pytest.approx(102014, rel=0.002)
    for layer, left in NECESSITY_G.items():
        change = RunChange(layer, (edits.drop(layer, "ffn"),))
        assert prefixes.left(change) == pytest.approx(left, abs=0.02)
    for edit, left in (
        (edits.flatten(3, "ln2"), 0.66),
        (edits.flatten(3, "ln2_post"), 0.6959),
        (edits.all_ones(3, "ln2_post"), 0.1416),
        (edits.shuffle(3, "ln2", 0), 0.459),
        (edits.ablate(3, [1414]), 0.2039),
    ):
        assert prefixes.left(RunChange(3, (edit,))) == pytest.approx(left, abs=0.02)
    assert prefixes.left(RunChange(8, (edits.ablate(8, [188]),))) > 0.85
    for layer, (neuron, share) in SHARES_G.items():
        found = written_at(gemma, layer, prefixes)
        assert found.strongest(1) == [neuron]
        assert found.shares[neuron].item() == pytest.approx(share, abs=0.01)
        assert found.summed == pytest.approx(found.made, rel=1e-4)
