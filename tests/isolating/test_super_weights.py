"""Super weights: planted ones are found with their coordinates, and the damage is the real one."""

from __future__ import annotations

import copy
import json

import families
import pytest
import torch

from melens import locate, prompts
from melens.batches import Batch
from melens.errors import MetricError, ModelError, ResultError, UnknownNameError
from melens.figures.causes import draw_spikes
from melens.isolating.spikes import DownEntry
from melens.isolating.super_weight_search import Search, super_weights
from melens.isolating.weight_damage import places_of, removed, stand_ins
from melens.models import load
from melens.published import hold_super_weights, with_known
from melens.results import load_result
from melens.results.locate import MassiveToken
from melens.results.super_weights import SuperWeights

MARKED, MARK = 9, 5
"""A token id, and the embedding dimension that only it fills."""
ROW, COLUMN = 20, 33
VALUE = 40.0
CLOSE = {"rel": 1e-4, "abs": 1e-5}
"""float32; an edit multiplies the changed rows apart from the others."""


@pytest.fixture(scope="module")
def texts():
    """One marked token a row, at another position each."""
    made = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(7))
    made[made == MARKED] = MARKED + 1
    made[0, 3] = made[1, 7] = made[2, 5] = MARKED
    return Batch.of(made)


def plant(hf, layer, row, column, value=VALUE, *, fresh=True):
    """A neuron that only the marked token opens, and one huge entry behind it."""
    with torch.no_grad():
        if hf.config.model_type == "gpt2":
            hf.transformer.wte.weight[:, MARK] = 0.0
            hf.transformer.wte.weight[MARKED] = 0.0
            hf.transformer.wte.weight[MARKED, MARK] = 6.0
            hf.transformer.wpe.weight[:] *= 0.01
            block = hf.transformer.h[layer]
            block.ln_2.weight[MARK] = 4.0
            block.mlp.c_fc.weight[:, column] = 0.0
            block.mlp.c_fc.weight[MARK, column] = 40.0
            if fresh:
                block.mlp.c_proj.weight[column] = 0.0
            block.mlp.c_proj.weight[column, row] = value
            return
        hf.model.embed_tokens.weight[:, MARK] = 0.0
        hf.model.embed_tokens.weight[MARKED] = 0.0
        hf.model.embed_tokens.weight[MARKED, MARK] = 6.0
        block = hf.model.layers[layer]
        block.post_attention_layernorm.weight[MARK] = 4.0
        for matrix in (block.mlp.gate_proj, block.mlp.up_proj):
            matrix.weight[column] = 0.0
            matrix.weight[column, MARK] = 4.0
        if fresh:
            block.mlp.down_proj.weight[:, column] = 0.0
        block.mlp.down_proj.weight[row, column] = value


def coordinates(result):
    return {weight.at for weight in result.super_weights}


def down_of(hf, layer):
    if hf.config.model_type == "gpt2":
        return hf.transformer.h[layer].mlp.c_proj.weight.T
    return hf.model.layers[layer].mlp.down_proj.weight


def plain_losses(hf, ids):
    """Each row's mean next-token loss by the model itself, without melens."""
    with torch.no_grad():
        return [
            float(hf(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in ids
        ]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_planted_weight_is_found_with_its_coordinates(family, layer, make_tiny, texts):
    hf = make_tiny(family)
    plant(hf, layer, ROW, COLUMN)
    found = super_weights(load(hf), texts)
    assert coordinates(found) == {(layer, ROW, COLUMN)}
    weight = found.super_weights[0]
    assert weight.value == VALUE
    assert weight.token_id == MARKED
    assert texts.ids[weight.sequence, weight.position] == MARKED
    assert (weight.site, weight.found_in, weight.role) == ("output", 1, None)
    assert weight.share == pytest.approx(1.0, abs=0.02)
    assert weight.share == pytest.approx(VALUE * weight.input_spike / weight.output_spike)
    assert (found.passes, found.stopped) == (2, "no spike left")
    verdicts = {row.layer: row.verdict for row in found.profile}
    assert [at for at, verdict in verdicts.items() if verdict == "candidate"] == [layer]


def test_two_in_one_neuron_are_found_one_after_the_other(make_tiny, texts):
    """A pruned weight leaves its neuron as loud as before; it must not hide the next one."""
    hf = make_tiny("llama")
    plant(hf, 1, ROW, COLUMN)
    plant(hf, 1, ROW + 3, COLUMN, value=-VALUE / 2, fresh=False)
    found = super_weights(load(hf), texts)
    assert [weight.at for weight in found.super_weights] == [(1, ROW, COLUMN), (1, ROW + 3, COLUMN)]
    assert [weight.found_in for weight in found.super_weights] == [1, 2]
    first = super_weights(load(hf), texts, search=Search(most=1))
    assert (coordinates(first), first.stopped) == ({(1, ROW, COLUMN)}, "most")


def test_two_behind_one_row_share_its_spike(make_tiny, texts):
    """The second neuron comes up once the first is pruned."""
    hf = make_tiny("llama")
    plant(hf, 1, ROW, COLUMN)
    plant(hf, 1, ROW, COLUMN + 1, value=VALUE / 3)
    hf.model.layers[1].mlp.up_proj.weight.data[COLUMN + 1] *= 0.9
    found = super_weights(load(hf), texts)
    assert [weight.at for weight in found.super_weights] == [(1, ROW, COLUMN), (1, ROW, COLUMN + 1)]
    assert found.super_weights[0].share == pytest.approx(1 / 1.3, abs=0.02)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3"])
def test_a_random_model_has_none(family, make_tiny, texts):
    found = super_weights(load(make_tiny(family)), texts)
    assert (found.super_weights, found.together, found.control) == ((), None, None)
    assert (found.passes, found.stopped) == (1, "no spike left")
    assert "no super weight (the FFN's product" in found.summary()
    assert found.base_loss == pytest.approx(
        sum(plain_losses(make_tiny(family), texts.ids)) / 3, rel=1e-5
    )


def test_a_spike_that_many_neurons_make_is_no_super_weight(make_tiny, texts):
    hf = make_tiny("llama")
    for column in range(COLUMN, COLUMN + 8):
        plant(hf, 1, ROW, column)
    found = super_weights(load(hf), texts)
    assert found.super_weights == ()
    assert found.profile[1].share == pytest.approx(1 / 8, abs=0.02)
    assert found.profile[1].verdict.startswith("share 0.12")


def test_a_norm_behind_the_ffn_is_looked_behind(make_tiny, texts):
    """The entry is small, its row's gain huge: only after the norm is there a spike."""
    hf = make_tiny("gemma2")
    with torch.no_grad():
        block = hf.model.layers[1]
        for matrix in (block.mlp.gate_proj, block.mlp.up_proj):
            matrix.weight[COLUMN] *= 10.0
        block.mlp.down_proj.weight[ROW] = 0.0
        block.mlp.down_proj.weight[ROW, COLUMN] = 0.05
        block.post_feedforward_layernorm.weight[ROW] = 1e5
    found = super_weights(load(hf), texts)
    assert coordinates(found) == {(1, ROW, COLUMN)}
    weight = found.super_weights[0]
    assert weight.site == "write"
    assert weight.share == pytest.approx(1.0, abs=1e-4)
    assert abs(weight.output_spike) < found.profile[1].output
    assert abs(weight.write_spike) > 500 * found.profile[1].write_median
    assert "1 of 1 only spike after the norm behind the FFN" in found.summary()
    assert "or, as a norm follows the FFN" in found.rule


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_damage_is_that_of_a_model_without_the_weight(family, make_tiny, texts):
    hf = make_tiny(family)
    plant(hf, 0, ROW, COLUMN, value=0.01)
    plant(hf, 1, ROW + 1, COLUMN + 2, value=-0.02)
    clean = torch.tensor(plain_losses(hf, texts.ids))
    found = super_weights(load(hf), texts)
    assert coordinates(found) == {(0, ROW, COLUMN), (1, ROW + 1, COLUMN + 2)}
    assert found.base_loss == pytest.approx(clean.mean().item(), rel=1e-5)

    def zeroed(places):
        other = copy.deepcopy(hf)
        with torch.no_grad():
            for layer, row, column in places:
                down_of(other, layer)[row, column] = 0.0
        return torch.tensor(plain_losses(other, texts.ids))

    for weight in found.super_weights:
        without = zeroed([weight.at])
        assert weight.loss_without == pytest.approx(without.mean().item(), **CLOSE)
        assert weight.loss_delta == pytest.approx((without - clean).mean().item(), **CLOSE)
        assert weight.interval is None  # too few sequences to resample
        whole = zeroed([(weight.layer, row, weight.column) for row in range(32)])
        assert weight.neuron_loss_delta == pytest.approx((whole - clean).mean().item(), **CLOSE)
    for group in (found.together, found.control):
        without = zeroed(group.weights)
        assert group.loss_without == pytest.approx(without.mean().item(), **CLOSE)
    assert set(found.together.weights) == coordinates(found)


def test_batches_and_padding_change_nothing(make_tiny, texts):
    hf = make_tiny("llama")
    plant(hf, 1, ROW, COLUMN)
    rows = [texts.ids[0].tolist(), texts.ids[1, :9].tolist(), texts.ids[2, :7].tolist()]
    model = load(hf)
    alone = super_weights(model, [Batch.of(torch.tensor([row])) for row in rows])
    for side in ("left", "right"):
        padded = super_weights(model, Batch.pad(rows, side=side))
        assert coordinates(padded) == coordinates(alone) == {(1, ROW, COLUMN)}
        here, there = padded.super_weights[0], alone.super_weights[0]
        assert (here.sequence, here.position) == (there.sequence, there.position)
        assert padded.base_loss == pytest.approx(alone.base_loss, **CLOSE)
        assert here.loss_delta == pytest.approx(there.loss_delta, **CLOSE)
        assert padded.profile[1].output == pytest.approx(alone.profile[1].output, rel=1e-4)
        assert padded.profile[1].input_median == pytest.approx(
            alone.profile[1].input_median, rel=1e-4
        )


def test_controls_are_near_in_size_and_elsewhere(make_tiny):
    hf = make_tiny("llama")
    places, _ = places_of(load(hf))
    down = hf.model.layers[1].mlp.down_proj.weight.detach()
    found = [DownEntry(1, 4, 10), DownEntry(1, 5, 11), DownEntry(1, 6, 12)]
    others = stand_ins(places, found, seed=3)
    assert others == stand_ins(places, found, seed=3) != stand_ins(places, found, seed=4)
    assert len(set(others)) == 3
    for (_, row, column, _), (layer, r, c, expert) in zip(found, others, strict=True):
        assert (layer, expert) == (1, None)
        assert r not in (4, 5, 6)
        assert c not in (10, 11, 12)
        assert abs(down[r, c]).item() == pytest.approx(abs(down[row, column]).item(), abs=0.002)


def test_the_role_is_told_from_the_residual(make_tiny, tokenizer, texts):
    hf = make_tiny("llama")
    plant(hf, 0, ROW, COLUMN, value=-300.0)  # so that a sign alone tells nothing
    plant(hf, 1, ROW, COLUMN, value=100.0)
    with torch.no_grad():  # layer 1 reads what layer 0 wrote
        for matrix in (hf.model.layers[1].mlp.gate_proj, hf.model.layers[1].mlp.up_proj):
            matrix.weight[COLUMN] = 0.0
            matrix.weight[COLUMN, ROW] = -4.0
        hf.model.layers[1].post_attention_layernorm.weight[ROW] = 4.0
        for block in hf.model.layers:  # else the mark spreads to other tokens
            block.self_attn.o_proj.weight.zero_()
    model = load(hf, tokenizer=tokenizer)
    massive = MassiveToken(
        position=0, token_id=MARKED, token="w9", dim=ROW, value=-1e6, frequency=1.0
    )
    located = locate(model, texts).model_copy(update={"massive": (massive,)})
    found = super_weights(model, texts, me_layer=located)
    roles = {weight.at: weight.role for weight in found.super_weights}
    assert roles[0, ROW, COLUMN] == "writes"
    assert roles[1, ROW, COLUMN] == "erases"
    elsewhere = located.model_copy(
        update={"massive": (massive.model_copy(update={"dim": ROW + 1}),)}
    )
    found = super_weights(model, texts, me_layer=elsewhere, search=Search(most=1))
    assert found.super_weights[0].role == "elsewhere"
    other = load(make_tiny("llama", seed=5))
    with pytest.raises(ResultError, match="locate it again"):
        super_weights(other, texts, me_layer=located)


def test_unreadable_experts_are_refused_and_hybrids_say_what_is_missing(bridged, texts):
    with pytest.raises(ModelError, match="no layer of this model has an FFN with neurons"):
        super_weights(load(families.tiny("DbrxForCausalLM")), texts)
    model = bridged("llama")
    places, missing = places_of(model)
    assert (list(places), missing) == ([0, 1, 2], ())


def test_a_layer_without_neurons_is_skipped_by_name(make_tiny, texts, monkeypatch):
    from melens.errors import SiteError
    from melens.isolating import weight_damage
    from melens.models.ffn import ffn_of

    def none_in_one(model, layer):
        if layer == 1:
            raise SiteError("block 1 has no FFN with neurons of its own.")
        return ffn_of(model, layer)

    monkeypatch.setattr(weight_damage, "ffn_of", none_in_one)
    hf = make_tiny("llama")
    plant(hf, 2, ROW, COLUMN)
    found = super_weights(load(hf), texts)
    assert coordinates(found) == {(2, ROW, COLUMN)}
    assert [row.layer for row in found.profile] == [0, 2]
    assert found.missing == ("layer 1: block 1 has no FFN with neurons of its own.",)
    assert draw_spikes(found)


@pytest.mark.parametrize(
    ("search", "says"),
    [
        (Search(most=0), "most must be a whole number of at least 1, got 0"),
        (Search(against_median=-1.0), "against_median must be a number above 0, got -1.0"),
        (Search(least_share=1.5), "least_share is a share, at most 1, got 1.5"),
    ],
)
def test_searches_that_cannot_be_meant(search, says, tiny, texts):
    with pytest.raises(MetricError, match=says):
        super_weights(tiny, texts, search=search)


def test_the_model_is_the_same_bit_for_bit_afterwards(make_tiny, texts):
    hf = make_tiny("llama").train()
    plant(hf, 1, ROW, COLUMN)
    model = load(hf)
    before = {name: value.clone() for name, value in hf.state_dict().items()}
    training = {name: module.training for name, module in model.named_modules()}
    with torch.no_grad():
        clean = model(texts.ids, return_type="logits")
    found = super_weights(model, [texts])
    passes = found.passes + 1 + 2 * len(found.super_weights) + 2
    seen = []
    for stop in (1, 3, passes):  # in the search, among the losses, at the end

        def tick(done, total, stop=stop):
            seen.append((done, total))
            if done == 3 * stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            super_weights(model, [texts], progress=tick)
        assert all(not point.fwd_hooks for point in model.hook_dict.values())
        assert not model.original_model._forward_pre_hooks
    assert seen[-1] == (3 * passes, 3 * passes)
    with torch.no_grad():
        assert torch.equal(model(texts.ids, return_type="logits"), clean)
    assert {name: module.training for name, module in model.named_modules()} == training
    assert all(torch.equal(value, before[name]) for name, value in hf.state_dict().items())


def test_several_layers_are_removed_together(make_tiny, texts):
    hf = make_tiny("llama")
    model, other = load(hf), copy.deepcopy(hf)
    weights = [DownEntry(0, 3, 5), DownEntry(2, 4, 6), DownEntry(0, 3, 9)]
    with torch.no_grad():
        for layer, row, column, _ in weights:
            other.model.layers[layer].mlp.down_proj.weight[row, column] = 0.0
        with removed(model, weights):
            edited = model(texts.ids, return_type="logits")
        expected = other(input_ids=texts.ids).logits
    torch.testing.assert_close(edited, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def planted(make_tiny, texts):
    hf = make_tiny("llama")
    plant(hf, 1, ROW, COLUMN)
    return super_weights(load(hf), texts)


def test_json_goes_there_and_back(planted, tmp_path):
    path = tmp_path / "super-weights.json"
    path.write_text(planted.to_json(), "utf-8")
    assert load_result(path) == planted == SuperWeights.from_json(planted.to_json())
    data = json.loads(planted.to_json())
    assert data["schema"] == "melens/super-weights/1"
    assert "expert" not in planted.to_json()  # so that older results stay what they are
    assert (
        data["super_weights"][0].items()
        >= {
            "layer": 1,
            "row": ROW,
            "column": COLUMN,
            "value": VALUE,
            "loss_without": planted.super_weights[0].loss_without,
        }.items()
    )
    assert [row["weights"] for row in planted.rows()] == ["one", "together", "control"]
    assert len(planted.to_frame()) == len(planted.shown()) == 3
    assert f"row {ROW} column {COLUMN}" in planted.summary()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data["super_weights"][0].update(layer=7), "super weights must differ"),
        (lambda data: data.update(control=None), "together and control must be there"),
        (lambda data: data.update(base_loss=0.0), "loss_delta must be loss_without"),
        (lambda data: data["profile"][0].update(layer=2), "layers in order"),
    ],
)
def test_edited_results_are_refused(planted, change, says):
    data = json.loads(planted.to_json())
    change(data)
    with pytest.raises(ResultError, match=says):
        SuperWeights.from_json(json.dumps(data))


def test_published_coordinates_are_held_against(planted):
    name = "HuggingFaceTB/SmolLM2-1.7B"
    published = hold_super_weights("smollm2-1.7b", planted)
    assert (published.verdict, len(published.comparisons)) == ("mismatch", 2)
    assert published.comparisons[0].what == "super weight (1, 749, 4987)"
    assert published.comparisons[0].measured == "not found"
    assert published.comparisons[1].verdict == "unknown"
    moved = planted.super_weights[0].model_copy(update={"row": 749, "column": 4987})
    hit = with_known(planted.model_copy(update={"super_weights": (moved,)}), name)
    assert hit.known.verdict == "match"
    assert "Published coordinates: HuggingFaceTB/SmolLM2-1.7B: match" in hit.summary()
    assert SuperWeights.from_json(hit.to_json()) == hit
    nothing = hold_super_weights("no/such-model", planted)
    assert (nothing.verdict, nothing.source) == ("unknown", None)
    assert "0-based block" in nothing.convention


def test_the_figure_shows_the_numbers(planted):
    spikes, costs = planted.plot().axes
    assert list(spikes.lines[0].get_ydata()) == [row.input for row in planted.profile]
    assert list(spikes.lines[1].get_ydata()) == [row.output for row in planted.profile]
    assert spikes.collections[0].get_offsets().tolist() == [[1.0, planted.profile[1].output]]
    assert costs.lines[0].get_xdata()[0] == planted.super_weights[0].loss_delta
    labels = [label.get_text() for label in costs.get_yticklabels()]
    assert labels[0] == f"(1, {ROW}, {COLUMN})"
    with pytest.raises(UnknownNameError, match="Did you mean 'spikes'"):
        planted.plot("spike")


def test_the_command_is_thin_and_its_table_is_there(planted, monkeypatch, capsys):
    from melens.cli import output
    from melens.cli.tables import TABLES
    from melens.cli.tables import causes as super_weights_table

    assert "super-weights" in TABLES
    output.show(with_known(planted, "smollm2-1.7b"), as_json=False)
    text = capsys.readouterr().out
    for part in (str(COLUMN), "candidate", "Control removed instead", "Published coordinates"):
        assert part in text
    assert super_weights_table.SITES.keys() == {"output", "write"}


@pytest.mark.weights
def test_smollm2(smol):
    texts = prompts("bundled", bos=True, n=2, length=64)
    found = super_weights(smol, texts, search=Search(most=6))
    by_place = {weight.at: weight for weight in found.super_weights}
    assert set(by_place) >= {(11, 507, 1229), (11, 507, 1487), (28, 507, 678), (9, 507, 200)}
    first = {weight.at[:2] for weight in found.super_weights if weight.found_in == 1}
    assert first == {(1, 507), (2, 507), (9, 507), (11, 507), (28, 507)}
    main = by_place[11, 507, 1229]
    assert (main.position, main.found_in) == (0, 1)
    assert main.value == pytest.approx(5.876, abs=0.01)
    assert main.share == pytest.approx(0.724, abs=0.01)
    # More is removed with the whole neuron, and yet it costs less.
    assert main.loss_delta > 1.0 > 0.3 > main.neuron_loss_delta
    assert found.together.loss_delta > 5.0
    assert abs(found.control.loss_delta) < 0.02
