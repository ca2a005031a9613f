"""Models that accelerate offloads or spreads over devices: the same numbers, or one line."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import dispatch_model
from planted import plant
from transformers import AutoModelForCausalLM
from two_devices import Devices, elsewhere

import melens
from melens.batches import Batch
from melens.errors import ModelError
from melens.interventions import INTERVENTIONS
from melens.interventions.experts import expert_prune
from melens.measuring.rank_collapse import solve
from melens.models import load, load_plain
from melens.models.decoder import layer_list
from melens.patching import SinkRate
from melens.placement import input_device, is_offloaded, memory_limits, placed, placement_options
from melens.settings import Items

FAMILIES = ("llama", "gemma2", "gpt2", "neox", "qwen3-moe", "mixtral")
EDITS = ("norm_flatten", "ffn_cap", "ffn_zero_weights", "qk_orthogonalise", "drop_key")
"""They read a gain, a matrix, single weights, another token's query, and the mask of attention."""
CLOSE = 1e-5
"""Of a number, where matrices on two devices are solved in other groups."""


def map_of(hf, first, last):
    """Embedding and the first half of the blocks on one device, the rest on another."""
    layers = layer_list(hf)
    root = next(path for path, module in hf.named_modules() if module is layers)
    half = (len(layers) + 1) // 2
    found = {f"{root}.{n}": first if n < half else last for n in range(len(layers))}
    for path, module in hf.named_modules():
        inside = path.startswith((*found, f"{root}.")) or root.startswith(path)
        if path and not inside:
            found[path] = last if len(found) > len(layers) + 1 and _is_norm(module) else first
    return found


def _is_norm(module):
    return "Norm" in type(module).__name__


@pytest.fixture(scope="module")
def folders(make_tiny, tokenizer, tmp_path_factory):
    """A folder of every model that a test loads, made once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            hf = plant("llama", "single", 2).model if name == "planted" else make_tiny(name)
            hf.save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture
def offloaded(folders, tmp_path):
    """A model with half of its blocks on the disk."""

    def make(name):
        plain = AutoModelForCausalLM.from_pretrained(folders(name))
        where = map_of(plain, "cpu", "disk")
        return load(folders(name), device_map=where, offload_folder=tmp_path)

    return make


@pytest.fixture(scope="module")
def batches():
    ids = torch.randint(6, 64, (4, 16), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = 1
    return [Batch.of(ids[:2]), Batch.of(ids[2:])]


def said(result):
    return {**json.loads(result.to_json()), "run": None}


def measured(model, batches):
    found = melens.locate(model, batches)
    results = [f(model, found, batches) for f in (melens.describe, melens.collapse, melens.sinks)]
    return found, [said(result) for result in (found, *results)]


def caused(model, found, batches):
    small = Batch.of(batches[0].ids[:1, :4])  # isolate repeats a pass hundreds of times
    whole = [said(melens.isolate(model, found, [small]))]
    pair = batches[0].ids, batches[1].ids
    pair = [ids[:, :3] for ids in pair]
    for site, metric in (("resid_pre", "kl"), ("resid_mid", SinkRate(found))):
        whole.append(said(melens.patch(model, *pair, sites=(site,), metric=metric)))
    return whole


def logits_under_edits(model, found, batches):
    """Edits of a block of the second half, and the mask of all after the ME Layer."""
    made = {}
    ids = batches[0].ids[:, :8].to(input_device(model))
    with torch.no_grad():
        for name in EDITS:
            edit = INTERVENTIONS[name]
            with edit.make(model, found.n_layers - 2, **edit.strong):
                made[name] = model(ids).cpu()
        with melens.wemask(model, found, rate=0.5):
            made["located"] = model(ids).cpu()
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_models_are_measured_as_whole_ones(folders, offloaded, batches, family):
    whole, away = load(folders(family), device="cpu"), offloaded(family)
    assert is_offloaded(away.original_model)
    first, expected = measured(whole, batches)
    there, found = measured(away, batches)
    assert found == expected  # bit by bit
    assert there.run.weights == first.run.weights
    assert (first.run.device, there.run.device) == ("cpu", "cpu (offloaded)")


def test_offloaded_models_are_edited_patched_and_evaluated_as_whole_ones(
    folders, offloaded, batches
):
    whole, away = load(folders("planted"), device="cpu"), offloaded("planted")
    found = melens.locate(whole, batches)
    assert found.me_layer is not None
    expected = logits_under_edits(whole, found, batches)
    for name, logits in logits_under_edits(away, found, batches).items():
        assert torch.equal(logits, expected[name]), name
    assert caused(away, found, batches) == caused(whole, found, batches)
    how = {"me_layer": found, "items": Items(n=4, length=24, bos=True)}
    edit = melens.results.Edit(name="wemask", rate=0.5)
    scores = [melens.evaluate(model, "perplexity", edit, **how) for model in (whole, away)]
    assert said(scores[0]) == said(scores[1])


def test_an_object_that_its_owner_dispatched_stays_as_it_is(folders, tmp_path, batches):
    where = map_of(plant("llama", "single", 2).model, "cpu", "disk")
    hf = AutoModelForCausalLM.from_pretrained(
        folders("planted"), device_map=where, offload_folder=tmp_path
    ).eval()
    ids = batches[0].ids
    with torch.no_grad():
        before = hf(ids).logits
        bridge = load(hf)
        found = melens.locate(hf, batches)
        assert torch.equal(hf(ids).logits, before)
    assert load(hf) is bridge  # a pass of the object's own makes other tensors of the offloaded
    assert found.me_layer == plant("llama", "single", 2).truth.me_layer
    assert any(value.is_meta for value in hf.parameters())
    with melens.wemask(hf, found, rate=0.5), torch.no_grad():
        assert not torch.equal(hf(ids).logits, before)
    with pytest.raises(ModelError, match="export of weights needs every weight in memory"):
        melens.export(hf, melens.results.Edit(), out=tmp_path / "out", me_layer=found)


def test_two_devices_give_the_numbers_of_one(batches):
    plain = load(plant("llama", "single", 2).model)
    first, expected = measured(plain, batches[:1])
    with Devices() as devices, torch.no_grad():
        hf = plant("llama", "single", 2).model.requires_grad_(False)
        where = map_of(hf, str(elsewhere(0)), str(elsewhere(1)))
        away = load(dispatch_model(hf, device_map=where, force_hooks=True))
        devices.copies.clear()
        there, found = measured(away, batches[:1])
        copies = list(devices.copies)
        causes = caused(away, there, batches)
        edited = logits_under_edits(away, there, batches)
    assert placed(away) == "cuda:0 + cuda:1"
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
    for one, other in zip(causes, caused(plain, first, batches), strict=True):
        assert_close(one, other)
    for name, logits in logits_under_edits(plain, first, batches).items():
        assert torch.allclose(edited[name], logits, rtol=CLOSE, atol=CLOSE), name
    shape = (*batches[0].ids.shape, plain.cfg.d_model)
    moved = [(str(a), str(b)) for a, b, copied in copies if copied == shape]
    assert ("cuda:0", "cuda:1") in moved  # as the model itself does between its halves
    assert not [pair for pair in moved if pair[1] == "cpu"], "an activation went to the host"


def assert_close(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_close(a, b)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=CLOSE, abs=1e-6)
    else:
        assert one == other


def test_eigenvalues_are_solved_where_the_switch_says(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    roots = [torch.randn(3, n, n, generator=generator, dtype=torch.float64) for n in (4, 6, 4)]
    squares = [x @ x.mT for x in roots]
    expected = solve(squares)
    with Devices() as devices, torch.no_grad():
        there = [x.to(elsewhere(n % 2)) for n, x in enumerate(squares)]
        same = solve(there)
        assert [x.device for x in same] == [x.device for x in there]
        monkeypatch.setenv("MELENS_EIG_DEVICE", "cpu")
        devices.copies.clear()
        host = solve(there)
        assert len(devices.copies) == len(there)
        for a, b, c in zip(expected, same, host, strict=True):
            assert torch.allclose(a, b.cpu(), atol=1e-12)
            assert torch.equal(a, c)
    monkeypatch.setenv("MELENS_EIG_DEVICE", "tpu")
    with pytest.raises(ModelError, match="takes cpu or same"):
        melens.collapse("no model is read", None)


def test_what_would_write_to_offloaded_weights_is_refused(offloaded):
    with (
        pytest.raises(ModelError, match="an edit of experts needs every weight in memory"),
        expert_prune(offloaded("mixtral"), 2, 0),
    ):
        pass


def test_tensor_parallel_models_are_refused(make_tiny):
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        hf = make_tiny("llama")
        layer = hf.model.layers[1].mlp.up_proj
        split = distribute_tensor(layer.weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        layer.weight = torch.nn.Parameter(split)
        for use in (load, lambda model: melens.wemask(model, 0, rate=0.5).__enter__()):
            with pytest.raises(ModelError, match=r"up_proj.* is a DTensor .*device_map='auto'"):
                use(hf)
    finally:
        destroy_process_group()


def test_weights_that_were_never_loaded_are_refused():
    config = plant("llama", "single", 2).model.config
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=r"never loaded.*device_map='auto'"):
        load(hf)


def test_what_is_said_of_places_must_fit(folders):
    assert memory_limits("0=20GB, cpu=4.5GB") == {0: "20GB", "cpu": "4.5GB"}
    assert memory_limits(None) is None
    for text in ("20GB", "0=lots", "tpu=4GB", "0=-4GB", ""):
        with pytest.raises(ModelError, match="max_memory"):
            memory_limits(text)
    assert placement_options(None, None, None) == {}
    wrong = [
        ({"device_map": "auto", "device": "cpu"}, "give one"),
        ({"device_map": "cuda"}, "auto, balanced"),
        ({"device_map": {}}, "auto, balanced"),
        ({"max_memory": {"cpu": "1GB"}}, "are of device_map"),
        ({"offload_folder": "x"}, "are of device_map"),
    ]
    for options, why in wrong:
        for loading in (load, load_plain):
            with pytest.raises(ModelError, match=why):
                loading(folders("llama"), **options)
    with pytest.raises(ModelError, match="placed already"):
        load(plant("llama", "single", 2).model, device_map="auto")


def test_the_command_line_places_and_refuses(folders, capsys):
    from melens.cli.app import _run

    folder = str(folders("planted"))
    here = ["locate", folder, "--bos", "--n-seq", "2", "--length", "16"]
    where = ["--device-map", "auto", "--max-memory", "cpu=200KB"]
    assert _run([*here, "--json"], debug=False) == 0
    plain = json.loads(capsys.readouterr().out)
    assert _run([*here, *where, "--json"], debug=False) == 0
    shown = capsys.readouterr()
    away = json.loads(shown.out)
    assert away["run"]["device"] == "cpu (offloaded)"
    assert "offloaded and read in every pass" in shown.err
    assert {**away, "run": None} == {**plain, "run": None}
    for more, why in (
        (["--stream"], "drop --device-map"),
        (["--device", "cpu"], "give one"),
        (["--max-memory", "all"], "max_memory"),
    ):
        assert _run([*here, *where, *more], debug=False) == 2
        err = capsys.readouterr().err
        assert why in err
        assert err.count("\n") == 1
    for command in (["scan", folder], ["reach", folder], ["finetune", folder, "--data", "x"]):
        assert _run([*command, *where], debug=False) == 2
        assert "No such option: --device-map" in capsys.readouterr().err
