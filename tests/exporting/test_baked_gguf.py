"""Baked GGUFs: plain transformers reads the changed weights, and all else is the source's."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import gguf
import numpy as np
import planted_gguf as planted
import pytest
import torch
from processes import fresh

from melens import exporting
from melens.errors import InterventionError, ModelError, ResultError
from melens.exporting import bake, export, read_edit
from melens.exporting.baked_gguf import FIELD, GGUF_FILE, write_gguf
from melens.models import load
from melens.models.gguf_header import read_gguf_header
from melens.results.baked import WeightEdit, weight_edits
from melens.results.edit import Edit

IDS = [[1, 5, 9, 12, 7, 30, 41, 3]]
READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM
made = []
for folder in sys.argv[2:]:
    hf = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    made.append(hf.eval()(torch.tensor(json.loads(sys.argv[1]))).logits.tolist())
assert "melens" not in sys.modules
print(json.dumps(made))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MELENS_NO_CACHE", "")


CHANGES = {"qwen3-moe": {"moe_intermediate_size": 768}, "gpt2": {"n_positions": 1024}}
"""What transformers takes no field of a GGUF for."""


@pytest.fixture
def source(make_tiny, tmp_path):
    """A family's tiny GGUF; matrices so large that one of their entries is seen in the logits."""

    def make(family, *, name="m.gguf", writer=planted.write, instead=None, **options):
        hf = make_tiny(family)
        if changes := CHANGES.get(family):
            from transformers import AutoModelForCausalLM

            torch.manual_seed(0)
            config = type(hf.config)(**{**hf.config.to_dict(), **changes})
            hf = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for value in hf.parameters():
                if value.ndim > 1:
                    value.mul_(8)
        if family == "gemma3":  # transformers' tokenizer of it asks for one
            options["extra"] = {"tokenizer.ggml.unknown_token_id": 0}
        arch = planted.ARCH[family]
        folder = tmp_path / family
        folder.mkdir(exist_ok=True)
        place = folder / name if writer is planted.write else folder
        tensors = {**planted.tensors_of(hf, arch), **(instead or {})}
        return writer(place, arch, planted.fields_of(hf.config, arch), tensors, **options)

    return make


def dense(norm="ln2"):
    return weight_edits(["weight:1,4,7", "neuron:0,3,-2.5", f"gain:2,{norm},5,3", "gain:1,ln1,2"])


EDITS = {
    "llama": dense(),
    "gemma3": dense(),
    "gpt2": dense(),
    "qwen3-moe": (
        WeightEdit(change="weight", layer=1, expert=2, dim=4, neuron=7),
        WeightEdit(change="expert", layer=2, expert=1),
    ),
}


def test_a_fresh_process_reads_what_the_folder_of_safetensors_has(source, tmp_path):
    """Independent: the same edits baked into safetensors, and transformers' own GGUF reader."""
    wanted, clean, made = [], [], []
    for family, edits in EDITS.items():
        path = source(family)
        made.append(bake(path, edits, out=tmp_path / f"{family}-gguf", format="gguf"))
        hf = bake(path, edits, out=tmp_path / f"{family}-hf")
        for folder, into in ((hf, wanted), (path, clean)):
            with torch.no_grad():
                into.append(load(folder)(torch.tensor(IDS)))
    done = fresh(READ, json.dumps(IDS), *made)
    assert done.code == 0, done.stderr
    for family, found, want, was in zip(
        EDITS, map(torch.tensor, json.loads(done.stdout)), wanted, clean, strict=True
    ):
        moved, off = (want - was).abs().max(), (found - want).abs().max()
        assert moved > 0.01, family
        assert off < 1e-3 * moved, family


def contents(path):
    """Every field of a file, a vocabulary too, by the gguf package."""
    fields = gguf.GGUFReader(path).fields
    return {name: (field.types, field.contents()) for name, field in fields.items()}


def raw(path):
    """Format and bytes by tensor."""
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


def test_all_else_is_copied_and_a_quantised_tensor_becomes_float32(source, tmp_path):
    down = "blk.{}.ffn_down.weight"
    kinds = {down.format(0): "Q8_0", down.format(1): "Q8_0", down.format(2): "F16"}
    kinds |= {"blk.0.attn_q.weight": "Q4_0", "blk.1.ffn_up.weight": "BF16"}
    extra = {"general.name": "Tiny", "general.tags": ["a", "b"], "general.alignment": 64}
    path = source("llama", kinds=kinds, extra=extra)
    edits = weight_edits(["weight:1,4,7", "neuron:2,3"])
    out = bake(path, edits, out=tmp_path / "out", format="gguf")
    before, after = contents(path), contents(out / GGUF_FILE)
    (history,) = set(after) - set(before)
    assert history == FIELD
    counted = {"GGUF.kv_count"}  # the history is one more
    assert {k: v for k, v in before.items() if k not in counted} == {
        k: v for k, v in after.items() if k not in {*counted, FIELD}
    }
    old, new = raw(path), raw(out / GGUF_FILE)
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {down.format(1), down.format(2)}
    assert new[down.format(1)][0] == "F32"  # quantised again, all its values would change
    assert new[down.format(2)][0] == "F16"  # which holds a zero
    was, now = load(path), load(out / GGUF_FILE)
    for n, (row, column) in {1: (4, 7), 2: (slice(None), 3)}.items():
        want = was.original_model.model.layers[n].mlp.down_proj.weight.detach().clone()
        want[row, column] = 0
        assert torch.equal(now.original_model.model.layers[n].mlp.down_proj.weight, want)


def test_the_file_says_what_was_changed_and_is_baked_again(source, tmp_path):
    path = source("llama")
    once = bake(path, weight_edits(["neuron:1,9"]), out=tmp_path / "once", format="gguf")
    twice = bake(
        once / GGUF_FILE, weight_edits(["neuron:0,3,2"]), out=tmp_path / "twice", format="gguf"
    )
    record = read_edit(twice)
    assert [made.edits[0].layer for made in record.baked] == [1, 0]
    assert json.loads(read_gguf_header(twice / GGUF_FILE).fields[FIELD]) == [
        made.model_dump(mode="json") for made in record.baked
    ]
    assert record.files == ("README.md", GGUF_FILE)
    assert "layer 0: neuron 3 x 2" in (twice / "README.md").read_text()
    assert "changed weights" in record.summary()
    with pytest.raises(ResultError, match=r"give its file, .*model\.gguf"):
        exporting.load(twice)
    bake(path, weight_edits(["neuron:1,9"]), out=twice, format="gguf")  # replaces an export
    assert len(read_edit(twice).baked) == 1


def test_a_split_file_becomes_one(source, tmp_path):
    parts = source("llama", writer=planted.write_split)
    out = bake(parts[0], weight_edits(["neuron:1,9"]), out=tmp_path / "out", format="gguf")
    fields = read_gguf_header(out / GGUF_FILE).fields
    assert not [name for name in fields if name.startswith("split.")]
    with torch.no_grad():
        found = load(out / GGUF_FILE)(torch.tensor(IDS))
    hf = load(bake(parts[0], weight_edits(["neuron:1,9"]), out=tmp_path / "hf"))
    assert torch.equal(found, hf(torch.tensor(IDS)))


def test_gains_keep_every_value_that_was_not_changed(source, tmp_path):
    """Gemma's gains lose a 1 on the way in, and get it back on the way out, rounded."""
    name = "blk.1.ffn_norm.weight"
    path = source("gemma3", instead={name: np.linspace(0.01, 0.3, 32, dtype=np.float32)})
    out = bake(path, weight_edits(["gain:1,ln2,5,3"]), out=tmp_path / "out", format="gguf")
    before, after = (
        np.frombuffer(raw(file)[name][1], dtype=np.float32) for file in (path, out / GGUF_FILE)
    )
    assert ((before - 1) + 1 != before).sum() > 5
    assert (before != after).nonzero()[0].tolist() == [5]
    assert after[5] == pytest.approx(3 * before[5], rel=1e-6)


def test_what_cannot_be_written_is_refused(source, make_tiny, tokenizer, tmp_path):
    neuron, out = weight_edits(["neuron:1,9"]), tmp_path / "out"
    folder = tmp_path / "plain"
    make_tiny("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for model in (folder, make_tiny("llama")):
        with pytest.raises(ModelError, match=r"is no GGUF file.*convert_hf_to_gguf\.py"):
            bake(model, neuron, out=out, format="gguf")
    with pytest.raises(InterventionError, match="written as hf or gguf, not 'peft'"):
        bake(folder, neuron, out=out, format="peft")
    with pytest.raises(InterventionError, match="changes of weights alone"):
        export(folder, Edit(layers=(1,)), format="gguf", out=out)
    assert not out.exists()
    experts = read_gguf_header(source("qwen3-moe"))
    both = {"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(4, 1536, 32)}
    with pytest.raises(ModelError, match=r"gate_up_proj is 2 tensors of m\.gguf"):
        write_gguf(experts, both, (), tmp_path)
    query = {"model.layers.1.self_attn.q_proj.weight": torch.zeros(32, 32)}
    with pytest.raises(ModelError, match=r"keeps blk\.1\.attn_q\.weight in another order"):
        write_gguf(read_gguf_header(source("llama")), query, (), tmp_path)
    assert not (tmp_path / GGUF_FILE).exists()


def test_a_damaged_copy_is_noticed(source, tmp_path, monkeypatch):
    """The check after writing, made to fail: a writer that loses a bit of an unchanged tensor."""
    from melens.exporting import baked_gguf

    path, whole = source("llama"), baked_gguf._data

    def torn(tensor, changed):
        name, data, kind = whole(tensor, changed)
        return name, data * 2 if name == "blk.2.ffn_up.weight" else data, kind

    monkeypatch.setattr(baked_gguf, "_data", torn)
    with pytest.raises(ModelError, match=r"blk\.2\.ffn_up\.weight of m\.gguf could not be copied"):
        bake(path, weight_edits(["neuron:1,9"]), out=tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


LLAMA_CPP = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = sys.argv[2], 256, False
asked = {"prompt": json.loads(sys.argv[1]), "max_tokens": 1, "temperature": 0, "logprobs": 20}
made = xllamacpp.Server(params).handle_completions(asked)
(token,) = made["choices"][0]["logprobs"]["content"]
print("\\n" + json.dumps({one["id"]: one["logprob"] for one in token["top_logprobs"]}))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="runs where xllamacpp (llama.cpp) is installed",
)
def test_llama_cpp_has_the_changed_weights(source, tmp_path):
    """Independent: llama.cpp itself, whose keys and values are kept in float16."""
    path, edits = source("llama"), weight_edits(["neuron:1,9,-6", "gain:2,ln2,5,4"])
    out = bake(path, edits, out=tmp_path / "out", format="gguf")
    logits = {}
    for file in (path, out / GGUF_FILE):
        with torch.no_grad():
            logits[file] = load(file)(torch.tensor(IDS))[0, -1].log_softmax(-1)
    done = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP, json.dumps(IDS[0]), str(out / GGUF_FILE)],
        capture_output=True,
        check=True,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    wanted, clean = (
        torch.tensor([float(logits[file][int(name)]) for name in found])
        for file in (out / GGUF_FILE, path)
    )
    off = (torch.tensor(list(found.values())) - wanted).abs().max()
    assert off < 0.01 < 0.1 * (wanted - clean).abs().max()
