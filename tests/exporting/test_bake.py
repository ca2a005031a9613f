"""Baked exports: whatever loads the folder gives the logits of the edit on the running model."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch
from processes import fresh
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from melens import exporting
from melens.errors import InterventionError, ModelError, ResultError, SiteError
from melens.exporting import bake, export, read_edit
from melens.exporting.bake import opened, writes_of, written
from melens.interventions import ffn_ablate_neurons, ffn_zero_weights, norm_scale_dims, transplant
from melens.interventions.experts import expert_ablate_neuron, expert_prune, expert_zero_weights
from melens.models import load
from melens.results.baked import Baked, WeightEdit, baked_in, weight_edits
from melens.results.edit import Edit

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
IDS = [[1, 5, 9, 12, 7, 30, 41, 3]]
DENSE = ["phi3", "gemma3", "olmo2", "gpt2", "neox"]
EXPERTS = ["mixtral", "qwen3-next"]
READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM
made = []
for folder in sys.argv[2:]:
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    made.append(hf(torch.tensor(json.loads(sys.argv[1]))).logits.tolist())
assert "melens" not in sys.modules
print(json.dumps(made))
"""


def answers(*folders):
    """Logits by plain transformers in a process of its own."""
    done = fresh(READ, json.dumps(IDS), *folders)
    assert done.code == 0, done.stderr
    return [torch.tensor(made) for made in json.loads(done.stdout)]


@torch.no_grad()
def large(hf):
    """Matrices so large that one of their entries can be seen in the logits."""
    for value in hf.parameters():
        if value.ndim > 1:
            value.mul_(8)
    return hf


@pytest.fixture
def folder(make_tiny, tokenizer, tmp_path):
    def make(name, **options):
        made = tmp_path / f"{name}-plain"
        large(make_tiny(name, **options)).save_pretrained(made)
        tokenizer.save_pretrained(made)
        return made

    return make


def running(bridge, *open_edits):
    """Logits of a bridge under edits."""
    with torch.no_grad(), ExitStack() as stack:
        for enter in open_edits:
            stack.enter_context(enter(bridge))
        return bridge(torch.tensor(IDS))


EVERY = {"tokens": "all"}


def dense(norm, *, first):
    """Changes of a family without experts, as text and as melens enters them."""
    edits = {
        "weight:1,4,7": lambda b: ffn_zero_weights(b, 1, weights=[(4, 7)], **EVERY),
        "neuron:0,3,-2.5": lambda b: ffn_ablate_neurons(b, 0, neurons=[3], factor=-2.5, **EVERY),
        "neuron:1,9": lambda b: ffn_ablate_neurons(b, 1, neurons=[9], **EVERY),
        f"gain:2,{norm},5,3": lambda b: norm_scale_dims(
            b, 2, dims=[5], norm=norm, factor=3.0, **EVERY
        ),
    }
    if first:
        edits["gain:1,ln1,2"] = lambda b: norm_scale_dims(b, 1, dims=[2], norm="ln1", **EVERY)
    return edits


def routed():
    """Changes of single experts, and as melens enters them."""
    edits = [
        WeightEdit(change="weight", layer=1, expert=2, dim=4, neuron=7),
        WeightEdit(change="neuron", layer=1, expert=0, neuron=3),
        WeightEdit(change="expert", layer=2, expert=1),
    ]
    return edits, [
        lambda b: expert_zero_weights(b, 1, 2, weights=[(4, 7)]),
        lambda b: expert_ablate_neuron(b, 1, 0, neuron=3),
        lambda b: expert_prune(b, 2, 1),
    ]


def test_every_family_gives_the_edits_logits_in_plain_transformers(folder, tmp_path):
    wanted, baked, clean = [], [], []
    for name in (*DENSE, *EXPERTS):
        source = folder(name)
        edits, enter = routed()
        if name in DENSE:
            both = dense("ln2_post" if name == "olmo2" else "ln2", first=name != "olmo2")
            edits, enter = weight_edits(list(both)), list(both.values())
        baked.append(bake(source, edits, out=tmp_path / f"{name}-baked"))
        bridge = load(source)
        clean.append(running(bridge))
        wanted.append(running(bridge, *enter))
    rows = zip((*DENSE, *EXPERTS), answers(*baked), wanted, clean, strict=True)
    for name, found, want, was in rows:
        moved, off = (want - was).abs().max(), (found - want).abs().max()
        assert moved > 0.01, name
        assert off < 1e-3 * moved, name


def test_one_stored_number_is_changed_and_gemmas_gain_loses_its_offset(folder, tmp_path):
    source = folder("gemma3")
    made = bake(source, weight_edits(["gain:1,ln2,5,3"]), out=tmp_path / "baked")
    before, after = (load_file(f / "model.safetensors") for f in (source, made))
    name = "model.layers.1.pre_feedforward_layernorm.weight"
    changed = {key: (before[key] != after[key]).nonzero().tolist() for key in before}
    assert {key: where for key, where in changed.items() if where} == {name: [[5]]}
    assert after[name][5].item() == pytest.approx(3 * (1 + before[name][5].item()) - 1, rel=1e-6)


def test_a_neuron_at_zero_is_bit_equal_to_the_running_edit(folder, tmp_path):
    source = folder("llama")
    made = bake(source, weight_edits(["neuron:1,9"]), out=tmp_path / "baked")
    wanted = running(load(source), lambda b: ffn_ablate_neurons(b, 1, neurons=[9], **EVERY))
    assert torch.equal(running(load(made)), wanted)


@pytest.mark.parametrize("name", ["phi3", "olmo2"])
def test_transplants(name, folder, make_tiny, tokenizer, tmp_path):
    source, parts = folder(name), ("ffn",) if name == "olmo2" else ("norm", "ffn")
    other = tmp_path / "other"
    large(make_tiny(name, seed=7)).save_pretrained(other)
    tokenizer.save_pretrained(other)
    own = WeightEdit(change="transplant", layer=0, donor_layer=2, parts=parts)
    foreign = WeightEdit(
        change="transplant", layer=1, donor_layer=1, donor=str(other), parts=("ffn",)
    )
    made = bake(source, [own, foreign], out=tmp_path / "baked")
    donor = load(other)
    wanted = running(
        load(source),
        lambda b: transplant(b, 0, donor=2, parts=parts, **EVERY),
        lambda b: transplant(b, 1, donor=donor, parts=("ffn",), **EVERY),
    )
    hf = AutoModelForCausalLM.from_pretrained(made)
    with torch.no_grad():
        torch.testing.assert_close(hf(torch.tensor(IDS)).logits, wanted, **CLOSE)


def test_half_precision_is_kept(folder, tmp_path):
    source = folder("gemma2", dtype=torch.bfloat16)
    made = bake(source, weight_edits(["gain:1,ln2,5,3", "neuron:1,2"]), out=tmp_path / "baked")
    after = load_file(made / "model.safetensors")
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    before = load_file(source / "model.safetensors")
    name = "model.layers.1.pre_feedforward_layernorm.weight"
    wanted = (3 * (1 + before[name][5].float()) - 1).bfloat16()
    assert after[name][5] == wanted
    assert read_edit(made).baked[0].dtype == "bfloat16"


def test_the_folder_says_what_was_changed_and_from_what(folder, tmp_path):
    from melens.models import fingerprint

    source = folder("llama")
    edits = weight_edits(["weight:1,4,7", "neuron:0,3,2"])
    made = bake(source, edits, out=tmp_path / "baked")
    record, config = read_edit(made), json.loads((made / "config.json").read_text())
    (kept,) = record.baked
    assert kept.edits == edits
    assert kept.weights == record.run.weights == fingerprint(load(source))
    assert kept.tensors == tuple(f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1))
    assert [Baked.model_validate(row) for row in config["melens_baked"]] == [kept]
    assert kept.logit_change > 1e-3 > kept.logit_difference
    assert "down projection [4, 7] x 0" in record.summary()
    assert "layer 0: neuron 3 x 2" in (made / "README.md").read_text()
    assert "melens_edit" not in config


def test_a_baked_folder_is_loaded_baked_again_and_exported_with_a_mask(folder, tmp_path):
    source = folder("llama")
    once = bake(source, weight_edits(["neuron:1,9"]), out=tmp_path / "once")
    twice = bake(once, weight_edits(["neuron:0,3"]), out=tmp_path / "twice")
    assert [len(made.edits) for made in read_edit(twice).baked] == [1, 1]
    both = bake(source, weight_edits(["neuron:0,3", "neuron:1,9"]), out=tmp_path / "both")
    files = [load_file(path / "model.safetensors") for path in (twice, both)]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    bridge = exporting.load(twice)
    assert bridge.melens_edit.edit == Edit(name="none")
    mask = Edit(rate=0.5, select="product", layers=(1, 2))
    masked = export(twice, mask, out=tmp_path / "masked")
    assert read_edit(masked).baked == read_edit(twice).baked
    config = json.loads((masked / "config.json").read_text())
    assert len(config["melens_baked"]) == 2
    assert config["melens_edit"]["applied"] is False
    with pytest.raises(ResultError, match="bake the model that it was made of"):
        bake(masked, weight_edits(["neuron:1,2"]), out=tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    again = export(masked, Edit(name="none"), out=tmp_path / "again")  # no mask any more
    assert "melens_edit" not in json.loads((again / "config.json").read_text())
    bake(source, weight_edits(["neuron:1,9"]), out=twice)  # an earlier export is replaced
    assert len(read_edit(twice).baked) == 1


def test_a_model_object_is_left_as_it_was(make_tiny, tokenizer, tmp_path):
    hf = make_tiny("gpt2").train()
    before = {key: value.clone() for key, value in hf.state_dict().items()}
    bake(hf, weight_edits(["neuron:1,9"]), out=tmp_path / "baked", tokenizer=tokenizer)
    assert all(torch.equal(before[key], value) for key, value in hf.state_dict().items())
    assert hf.training
    assert not hasattr(hf.config, "melens_baked")
    assert not baked_in(hf.config)
    made = load_file(tmp_path / "baked" / "model.safetensors")
    assert made["transformer.h.1.mlp.c_proj.weight"][9].abs().max() == 0  # [neuron, d_model]


def test_layers_that_share_a_tensor_are_refused(make_tiny, tokenizer, tmp_path):
    hf = make_tiny("llama")
    layers = hf.model.layers
    layers[2].mlp.down_proj.weight = layers[1].mlp.down_proj.weight
    with pytest.raises(ModelError, match="one tensor"):
        bake(hf, weight_edits(["neuron:1,9"]), out=tmp_path / "baked", tokenizer=tokenizer)
    assert not (tmp_path / "baked").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing:1", "neither a JSON file here nor one of weight:LAYER,DIM,NEURON"),
        ("weight:1,2", r"must be weight:LAYER,DIM,NEURON\[,FACTOR\]"),
        ("neuron:1,x", "neuron: Input should be a valid integer"),
        ("neuron:1,-2", "greater than or equal to 0"),
        ("neuron:1,2,1", "factor 1 changes nothing"),
        ("neuron:1,2,nan", "factor: Input should be a finite number"),
        ("gain:1,ln9,2,0", "norm: Input should be 'ln1'"),
        ("transplant:1,1", "in its own place"),
    ],
)
def test_what_was_typed_wrong_is_said(text, message):
    with pytest.raises(InterventionError, match=message):
        weight_edits([text])


def test_files_of_edits(tmp_path):
    path = tmp_path / "edits.json"
    edits = weight_edits(["weight:1,4,7", "gain:1,ln1,3,2", "transplant:2,0"])
    path.write_text(json.dumps([edit.model_dump(mode="json") for edit in edits]))
    assert weight_edits([str(path)]) == edits
    assert json.loads(path.read_text())[2] == {
        "change": "transplant",
        "layer": 2,
        "donor_layer": 0,
    }
    with pytest.raises(InterventionError, match="named twice"):
        weight_edits([str(path), "weight:1,4,7,3"])
    with pytest.raises(InterventionError, match="bake one after the other"):
        weight_edits([str(path), "neuron:2,3"])
    for text, message in (("[{}]", "0.change: Field required"), ("{", "is not JSON")):
        path.write_text(text)
        with pytest.raises(ResultError, match=message):
            weight_edits([str(path)])
    path.write_text('[{"change": "neuron", "layer": 1, "neuron": 2, "dim": 3}]')
    with pytest.raises(ResultError, match="neuron has no dim"):
        weight_edits([str(path)])


LACKING = [
    ("neuron:1,64", InterventionError, "neuron must be .* 0 to 63"),
    ("weight:1,32,4", InterventionError, "dim must be .* 0 to 31"),
    ("gain:1,ln2_post,4", SiteError, "no norm 'ln2_post'"),
    ("expert:1,0", SiteError, "no routed experts"),
    ("transplant:1,99", SiteError, r"layer 99 is outside 0\.\.2"),
    ("transplant:99,1", SiteError, r"layer 99 is outside 0\.\.2"),
]


def test_what_a_model_lacks_is_refused_before_anything_is_written(folder, make_tiny, tmp_path):
    model = opened(make_tiny("llama"), None)
    for text, kind, message in LACKING:
        with pytest.raises(kind, match=message):
            writes_of(model, weight_edits([text])[0])
    half = opened(make_tiny("llama", dtype=torch.float16), None)
    writes = writes_of(half, weight_edits(["neuron:1,2,1e38"])[0])
    before = half.hf.model.layers[1].mlp.down_proj.weight.clone()
    with pytest.raises(InterventionError, match="cannot hold"), written(half.hf, writes):
        pass
    assert torch.equal(half.hf.model.layers[1].mlp.down_proj.weight, before)
    with pytest.raises(SiteError, match=r"layer 9 is outside 0\.\.2"):
        bake(folder("llama"), weight_edits(["neuron:9,2"]), out=tmp_path / "baked")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-plain"]


def test_a_history_that_somebody_else_wrote_is_refused(folder, tmp_path):
    source = folder("llama")
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "melens_baked": ["x"]}))
    with pytest.raises(ResultError, match=r"melens_baked in the model's config\.json"):
        bake(source, weight_edits(["neuron:1,9"]), out=tmp_path / "baked")


def test_torn_weights_are_noticed_at_loading(folder, tmp_path):
    made = bake(folder("llama"), weight_edits(["neuron:1,9"]), out=tmp_path / "baked")
    tensors = load_file(made / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 2
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResultError, match="other weights"):
        exporting.load(made)
