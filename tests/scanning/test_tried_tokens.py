"""What a scan's ceilings allow in size, and what first tokens reach of it."""

from __future__ import annotations

import families
import planted_gguf
import pytest
import torch
from planted import BOS_ID, batch, plant
from transformers import AutoModelForCausalLM, GPT2Config

import melens
from melens.batches import Batch
from melens.errors import ModelError, WeightsError
from melens.models.opening import by_range
from melens.results import WeightScan
from melens.scanning import firsts, reach, scan
from melens.scanning import predict as weights
from melens.scanning.predict import ALONE

WIDTH, DIM, NEURON = 32, 9, 17


def one_loud_neuron(folder, *, reads=1.0, bias=0.0, ceiling):
    """A tiny GPT-2 of four layers; one neuron of layer 0 has this ceiling, all others next to none.

    Args:    reads: the most that its input can be before the bias.
    """
    config = GPT2Config(
        vocab_size=64,
        n_embd=WIDTH,
        n_layer=4,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    mlp = model.transformer.h[0].mlp
    with torch.no_grad():
        row = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
        row -= row.mean()
        mlp.c_fc.weight[:, NEURON] = row / row.norm() * reads / WIDTH**0.5
        mlp.c_fc.bias[NEURON] = bias
        mlp.c_proj.weight[NEURON] = 0.0
        mlp.c_proj.weight[NEURON, DIM] = ceiling / (reads + bias)
    model.save_pretrained(folder)
    return model


def outputs(model, tokens):
    """Block outputs of single tokens by transformers itself: (layer, token, d_model)."""
    with torch.no_grad():
        made = model(torch.tensor(tokens)[:, None], output_hidden_states=True).hidden_states
    return torch.stack(made[1:-1])[:, :, 0]


@pytest.mark.parametrize("reach", ["no", 0, 2])
def test_reach_is_one_of_three(tmp_path, reach):
    with pytest.raises(ModelError, match="reach must be True, False or None"):
        scan(tmp_path, reach=reach)


def test_what_is_too_small_to_be_massive_names_no_layer(tmp_path):
    """Its ceiling is far above the median, and 62."""
    one_loud_neuron(tmp_path, reads=40.0, ceiling=62.0)
    for asked in (None, False, True):
        found = scan(tmp_path, reach=asked)
        assert found.profile[0].ratio_to_median > ALONE
        assert (found.me_layer, found.erase_layer, found.dims) == (None, None, ())
        assert found.confidence == 0.0
        assert found.seen is None
        assert (found.unseen is not None) == (asked is True)  # what was asked for is answered
        size = found.allowed
        assert (size.layer, size.dim, size.neuron, size.neurons) == (0, DIM, NEURON, 1)
        assert (size.size, size.together) == pytest.approx((62.0, 62.0), rel=1e-5)
        assert size.needed == 100.0
        assert not size.is_enough
        assert [c.at for c in found.candidates] == [(0, DIM, NEURON)]
        said = found.summary()
        assert "layer 0 (from 0), dim 9, but the largest that one neuron can write is 62" in said
        assert "too small to be massive" in said
        assert WeightScan.from_json(found.to_json()) == found
    one_loud_neuron(tmp_path, reads=40.0, ceiling=110.0)
    assert scan(tmp_path, reach=False).me_layer == 0


def test_what_no_first_token_reaches_is_not_predicted(tmp_path):
    model = one_loud_neuron(tmp_path, reads=40.0, ceiling=130.0)
    unrun = scan(tmp_path, reach=False)
    assert (unrun.me_layer, unrun.dims, unrun.seen) == (0, (DIM,), None)
    assert "Nothing was run: " in unrun.summary()
    found = scan(tmp_path)
    assert (found.me_layer, found.dims, found.confidence) == (None, (), 0.0)
    assert (found.allowed, found.candidates) == (unrun.allowed, unrun.candidates)
    seen = found.seen
    assert (seen.layer, seen.until, seen.reached, len(seen.tokens)) == (0, 0, 0, 17)
    here = outputs(model, [token.token_id for token in seen.tokens])[0]
    for token, x in zip(seen.tokens, here, strict=True):
        assert token.value == pytest.approx(x[DIM].item(), rel=1e-4, abs=1e-6)
        assert token.largest == pytest.approx(x.abs().max().item(), rel=1e-5)
        assert token.times == pytest.approx((abs(x[DIM]) / x.abs().median()).item(), rel=1e-4)
    top = here[:, DIM].abs().max().item()
    assert 20 < top < 100
    assert f"no first token of 17 tried gets above {top:.4g} there: no massive" in found.summary()
    assert WeightScan.from_json(found.to_json()) == found


def test_a_ceiling_far_above_leaves_room_for_other_tokens(tmp_path):
    """The neuron opens for next to one direction alone, which no token has."""
    one_loud_neuron(tmp_path, reads=400.0, bias=-360.0, ceiling=10_100.0)
    found = scan(tmp_path)
    assert (found.me_layer, found.seen.reached) == (0, 0)
    assert "another token may, the ceiling is far above" in found.summary()
    one_loud_neuron(tmp_path, reads=400.0, bias=-360.0, ceiling=9_900.0)
    assert scan(tmp_path).me_layer is None


def closed_form(family, model, size):
    """A planted neuron's ceiling by the table of foresee.md."""
    base = model.transformer.h if family == "gpt2" else model.model.layers
    block, n, k = base[size.layer], size.neuron, size.dim
    if family == "gpt2":
        row = block.mlp.c_fc.weight[:, n] * block.ln_2.weight
        reads = len(row) ** 0.5 * (row - row.mean()).norm() + block.mlp.c_fc.bias[n]
        return reads * block.mlp.c_proj.weight[n, k].abs()
    column = block.mlp.down_proj.weight[:, n]
    if family == "gemma2":
        gain = 1 + block.post_feedforward_layernorm.weight[k]
        return len(column) ** 0.5 * gain.abs() * column[k].abs() / column.norm()
    gain = block.post_attention_layernorm.weight
    w, u = block.mlp.gate_proj.weight[n] * gain, block.mlp.up_proj.weight[n] * gain
    return len(w) * (w.norm() * u.norm() + (w @ u).abs()) / 2 * column[k].abs()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_planted_tokens_reach_what_the_weights_predict(family, tmp_path):
    """Against a closed form, and transformers' own hidden states."""
    made = plant(family, "single", 3)
    made.model.save_pretrained(tmp_path)
    found, layer = scan(tmp_path), made.truth.me_layer
    assert (found.me_layer, found.dims[0]) == (layer, made.truth.dim)
    size, seen = found.allowed, found.seen
    assert size.size == pytest.approx(closed_form(family, made.model, size).item(), rel=1e-5)
    assert (size.highest, size.highest_layer) == (size.size, layer)
    assert (seen.reached, seen.farthest.token_id, seen.farthest.why) == (1, BOS_ID, "bos")
    there = outputs(made.model, [BOS_ID])[layer, 0, made.truth.dim].item()
    assert seen.farthest.value == pytest.approx(there, rel=1e-5)
    assert abs(there) <= size.together * 1.001
    assert f"1 reaches it (largest {there:,.0f} at layer {layer}, token '<1>')" in found.summary()


def test_a_ceiling_is_of_what_is_added_to_the_residual(tmp_path):
    """Granite multiplies what a block writes: a quarter of it is added, nothing else changes."""
    model = families.tiny("GraniteForCausalLM")
    planted = families.plant(model, 1, DIM)
    model.config.residual_multiplier = 1.0
    model.save_pretrained(tmp_path)
    whole = scan(tmp_path, reach=False)
    model.config.residual_multiplier = 0.25
    model.save_pretrained(tmp_path)
    found = scan(tmp_path)
    for one, other in zip(found.profile, whole.profile, strict=True):
        assert one.ceiling == pytest.approx(other.ceiling / 4, rel=1e-4)
        assert one.ratio_to_median == pytest.approx(other.ratio_to_median, rel=1e-4)
        assert (one.neuron, one.dim, one.sign) == (other.neuron, other.dim, other.sign)
    assert found.allowed.neuron == planted.neuron
    assert found.seen.farthest.why == "bos"
    assert 100 < abs(found.seen.farthest.value) <= found.allowed.together


def test_the_run_gives_what_reach_and_locate_give(tmp_path):
    made = plant("llama", "single", 3)
    made.model.save_pretrained(tmp_path)
    seen, layer = scan(tmp_path).seen, made.truth.me_layer
    tokens = [token.token_id for token in seen.tokens]
    for token, other in zip(seen.tokens, reach(tmp_path, tokens=tokens).tokens, strict=True):
        assert token.largest == pytest.approx(other.largest[layer], rel=1e-5)
    located = melens.locate(made.model, [Batch.of(batch(made))]).profile[layer]
    assert seen.farthest.largest == pytest.approx(located.max, rel=1e-5)


def test_a_scan_goes_on_where_nothing_can_be_run(tmp_path, monkeypatch):
    made = plant("llama", "single", 3)
    made.model.save_pretrained(tmp_path)
    unrun = scan(tmp_path, reach=False)

    def refused(says, error):
        found = scan(tmp_path)
        assert says in found.unseen
        assert f"({found.unseen}): a ceiling says what can happen" in found.summary()
        update = {"unseen": None, "run": unrun.run}
        assert found.model_copy(update=update) == unrun
        with pytest.raises(error, match=says):
            scan(tmp_path, reach=True)

    with monkeypatch.context() as large:
        large.setattr(firsts, "CHEAP", 1e5)
        assert "are read only when asked for" in scan(tmp_path).unseen
        assert scan(tmp_path, reach=True).seen.reached == 1
    with monkeypatch.context() as far:
        from fsspec.implementations.dirfs import DirFileSystem
        from fsspec.implementations.local import LocalFileSystem

        def opened(model, revision):
            files = DirFileSystem(str(tmp_path), LocalFileSystem())
            return by_range(unrun.run.model, revision, files)

        far.setattr(weights, "open_checkpoint", opened)
        refused("not all on this machine", ModelError)
    with torch.no_grad():
        made.model.model.layers[0].self_attn.o_proj.weight[3, 5] = torch.nan
    made.model.save_pretrained(tmp_path)
    unrun = scan(tmp_path, reach=False)
    refused("holds 1 NaN", WeightsError)


def test_a_gguf_is_run_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path / "cache"))
    made = families.tiny("LlamaForCausalLM")
    families.plant(made, 1, DIM)
    path = tmp_path / "a.gguf"
    tensors = planted_gguf.tensors_of(made, "llama")
    planted_gguf.write(path, "llama", planted_gguf.fields_of(made.config, "llama"), tensors)
    found = scan(path)
    assert (found.me_layer, found.seen) == (1, None)
    assert "a GGUF has to be converted before it is run" in found.unseen
    asked = scan(path, reach=True)
    assert (asked.me_layer, asked.seen.farthest.token_id, asked.seen.farthest.dim) == (1, 1, DIM)
    there = outputs(made, [1])[1, 0, DIM].item()
    assert asked.seen.farthest.value == pytest.approx(there, rel=1e-4)


def test_layers_that_are_kept_are_not_scanned_again_for_the_run(tmp_path, monkeypatch):
    made = plant("gpt2", "single", 3)
    made.model.save_pretrained(tmp_path / "model")
    keep = tmp_path / "layers.jsonl"
    whole = scan(tmp_path / "model")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(weights, "look", stop)
        with pytest.raises(KeyboardInterrupt):
            scan(tmp_path / "model", keep=keep)
    monkeypatch.setattr(weights, "scan_layer", stop)
    again = scan(tmp_path / "model", keep=keep)
    assert again.model_copy(update={"run": whole.run}) == whole
    assert again.seen.reached == 1
