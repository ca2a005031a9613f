"""GGUF files: what is loaded is what the file holds, and what it lacks is named."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import planted_gguf as planted
import pytest
import torch

from melens.errors import FetchError, ModelError, WeightsError
from melens.models import gguf, load
from melens.models.gguf_header import read_gguf_header
from melens.models.gguf_tensors import narrowest
from melens.models.loading import load_plain
from melens.streaming.streamed import load_streamed


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MELENS_NO_CACHE", "")  # put back after a command set it
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def parts_of(make_tiny):
    """Model, architecture, fields and tensors of a family's tiny model."""

    def make(family, **changes):
        hf = make_tiny(family)
        if changes:
            from transformers import AutoModelForCausalLM

            config = type(hf.config)(**{**hf.config.to_dict(), **changes})
            torch.manual_seed(0)
            hf = AutoModelForCausalLM.from_config(config).eval()
        arch = planted.ARCH[family]
        return hf, arch, planted.fields_of(hf.config, arch), planted.tensors_of(hf, arch)

    return make


@pytest.fixture
def llama(parts_of):
    return parts_of("llama")


CHANGES = {"qwen3-moe": {"moe_intermediate_size": 768}, "gpt2": {"n_positions": 1024}}
"""What transformers takes no field of a GGUF for."""


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2", "phi3", "qwen3-moe"])
def test_every_value_is_the_models_own_and_what_transformers_reads(family, parts_of, tmp_path):
    """Independent: the model that the file was written from, and transformers' own reading."""
    from transformers import AutoModelForCausalLM

    hf, arch, fields, tensors = parts_of(family, **CHANGES.get(family, {}))
    path = planted.write(tmp_path / "m.gguf", arch, fields, tensors)
    made = load_plain(path, device="cpu")[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    state = made.state_dict()
    for other in (hf, theirs):
        assert set(state) == set(other.state_dict())
        for name, value in other.state_dict().items():
            assert torch.allclose(state[name], value, atol=1e-6), name
    for name, value in theirs.state_dict().items():
        assert torch.equal(state[name], value), name
    left = {"architectures", "_name_or_path", "dtype", "quantization_config"}
    for key, value in theirs.config.to_dict().items():
        if key not in left:
            assert made.config.to_dict()[key] == value, key


def test_every_tensor_is_needed_and_named_when_missing(llama, tmp_path):
    _, arch, fields, tensors = llama
    for name in tensors:
        if name.startswith("blk.") and not name.startswith("blk.1."):
            continue  # blocks are alike
        path = tmp_path / "m.gguf"
        rest = {key: value for key, value in tensors.items() if key != name}
        planted.write(path, arch, fields, rest)
        if name == "output.weight":
            continue  # without it the embedding unembeds, in every reader
        with pytest.raises(WeightsError, match="lacks") as said:
            load_plain(path)
        assert name in str(said.value)
        assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_experts_need_gate_and_up(parts_of, tmp_path):
    _, arch, fields, tensors = parts_of("qwen3-moe", **CHANGES["qwen3-moe"])
    del tensors["blk.1.ffn_up_exps.weight"]
    planted.write(tmp_path / "m.gguf", arch, fields, tensors)
    with pytest.raises(WeightsError, match=r"blk\.1\.ffn_up_exps"):
        load_plain(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "name",
    ["block_count", "embedding_length", "attention.head_count", "attention.layer_norm_rms_epsilon"],
)
def test_a_field_that_makes_another_model_is_needed(name, llama, tmp_path):
    from melens.scanning import scan

    _, arch, fields, tensors = llama
    rest = {key: value for key, value in fields.items() if key != name}
    path = planted.write(tmp_path / "m.gguf", arch, rest, tensors)
    with pytest.raises(WeightsError, match=name):
        load_plain(path)
    if name in ("block_count", "embedding_length"):  # the others say nothing of what a scan reads
        with pytest.raises(ModelError, match=r"block_count|no d_model"):
            scan(path)


def test_no_fields_no_tensors_no_architecture(llama, tmp_path):
    _, arch, _, tensors = llama
    for path in (
        planted.write(tmp_path / "a.gguf", arch, {}, tensors, vocabulary=False),
        planted.write(tmp_path / "b.gguf", arch, {}, {}),
    ):
        with pytest.raises(WeightsError, match=r"has no llama\.block_count|holds no tensors"):
            load_plain(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block_count": 10**9}, "block 3 has none"),
        ({"block_count": 2}, "tensors of block 2, but its block_count is 2"),
        ({"embedding_length": 10**9}, "embedding_length is 1000000000, and the longest side"),
        ({"attention.head_count": 10**9}, "head_count is 1000000000"),
        ({"attention.head_count": 3}, "cannot read|fields ask for"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000"),
        ({"feed_forward_length": 63}, r"has shape \[64, 32\]; its fields ask for \[63, 32\]"),
        ({"context_length": 2**31}, None),
    ],
)
def test_fields_are_held_against_the_tensors_before_anything_is_built(
    change, said, llama, tmp_path
):
    _, arch, fields, tensors = llama
    path = planted.write(tmp_path / "m.gguf", arch, {**fields, **change}, tensors)
    if said is None:
        load_plain(path)
        return
    with pytest.raises(WeightsError, match=said):
        load_plain(path)


@pytest.mark.parametrize("name", ["blk.1.attn_q.bias", "rope_factors_long.weight"])
def test_a_tensor_that_would_be_left_out_is_refused(name, llama, tmp_path):
    _, arch, fields, tensors = llama
    more = {**tensors, name: np.ones(32, dtype=np.float32)}
    with pytest.raises(WeightsError, match=f"leave out of its model: {name}"):
        load_plain(planted.write(tmp_path / "m.gguf", arch, fields, more))


def test_scaled_positions_are_not_passed_over(llama, tmp_path):
    _, arch, fields, tensors = llama
    name = "rope_freqs.weight"
    same = {**tensors, name: np.ones(4, dtype=np.float32)}
    load_plain(planted.write(tmp_path / "m.gguf", arch, fields, same))
    other = {**tensors, name: np.full(4, 8, dtype=np.float32)}
    with pytest.raises(WeightsError, match="scales its positions"):
        load_plain(planted.write(tmp_path / "n.gguf", arch, fields, other))


def test_the_scaled_positions_of_llama_3_are_the_models_own(llama, make_tiny, tmp_path):
    """Closed form of the table, as llama.cpp's converter writes it; the model's own logits."""
    from transformers import AutoModelForCausalLM

    hf, arch, fields, _ = llama
    hf = copy.deepcopy(hf)
    for name, value in hf.named_parameters():
        if "proj" in name:
            value.data.mul_(8)  # attention that is not uniform
    table = []
    for i in range(4):
        wave = 2 * math.pi * 500000.0 ** (2 * i / 8)
        mix = min(1.0, max(0.0, (8192 / wave - 1) / 3))  # 1 = as it was, 0 = 32 times as slow
        table.append(1 / ((1 - mix) / 32 + mix))
    assert table[0] == 1 < table[2] < table[3] == 32
    fields = {**fields, "rope.freq_base": 500000.0}
    tensors = {
        **planted.tensors_of(hf, arch),
        "rope_freqs.weight": np.array(table, dtype=np.float32),
    }
    made = load_plain(planted.write(tmp_path / "m.gguf", arch, fields, tensors), device="cpu")[0]
    right = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = type(hf.config)(**{**hf.config.to_dict(), "rope_parameters": right})
    other = AutoModelForCausalLM.from_config(config).eval()
    other.load_state_dict(hf.state_dict())
    hf.config.rope_parameters["rope_theta"] = 500000.0
    plain = AutoModelForCausalLM.from_config(hf.config).eval()
    plain.load_state_dict(hf.state_dict())
    ids = torch.arange(1, 60)[None]
    with torch.no_grad():
        ours, theirs, unscaled = (m(ids).logits for m in (made, other, plain))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, unscaled, atol=1e-4)


def lfm2():
    """Model, architecture, fields and tensors of an architecture that transformers reads whole."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    hf = Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
            max_position_embeddings=64,
        )
    ).eval()
    fields = planted.fields_of(hf.config, "llama")
    del fields["rope.dimension_count"]
    fields |= {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3}
    fields |= {"rope.freq_base": hf.config.rope_parameters["rope_theta"]}
    tensors = planted.tensors_of(hf, "lfm2")
    return (
        hf,
        "lfm2",
        fields,
        {n: v.squeeze(1) if "conv.conv" in n else v for n, v in tensors.items()},
    )


def test_an_architecture_that_asks_for_the_vocabulary(tmp_path):
    hf, arch, fields, tensors = lfm2()
    made = load_plain(planted.write(tmp_path / "m.gguf", arch, fields, tensors), device="cpu")[0]
    assert made.config.vocab_size == 64
    for name, value in hf.state_dict().items():
        assert torch.equal(made.state_dict()[name], value), name
    more = {**tensors, "blk.1.extra.weight": np.zeros(4, dtype=np.float32)}
    with pytest.raises(WeightsError, match=r"does not use, first .*1\.extra"):
        load_plain(planted.write(tmp_path / "n.gguf", arch, fields, more), device="cpu")


@pytest.mark.parametrize("record", ["", "[]", "[" * 100_000, '{"names": 5}', '{"files": 5}'])
def test_a_damaged_record_says_nothing(record, tmp_path):
    (tmp_path / gguf.RECORD).write_text(record)
    assert gguf.given_names(tmp_path) == ()
    assert not gguf.is_whole(tmp_path)


@pytest.mark.parametrize(("said", "means"), [("0", False), ("no", False), ("1", True)])
def test_the_switch_reads_as_the_others_do(said, means, monkeypatch):
    monkeypatch.setenv("MELENS_NO_CACHE", said)
    assert gguf.no_cache() is means


@pytest.mark.parametrize("first_empty", [False, True])
def test_any_part_of_a_split_file_stands_for_all(first_empty, llama, tmp_path):
    from melens.scanning import scan

    hf, arch, fields, tensors = llama
    whole = scan(planted.write(tmp_path / "whole.gguf", arch, fields, tensors))
    parts = planted.write_split(tmp_path, arch, fields, tensors, first_empty=first_empty)
    for part in (parts[0], parts[2]):
        made = load_plain(part, device="cpu")[0]
        assert torch.allclose(made.lm_head.weight, hf.lm_head.weight)
        assert not made.config.tie_word_embeddings
        for name, value in made.state_dict().items():
            assert torch.allclose(value, hf.state_dict()[name], atol=1e-6), name
        assert scan(part).profile == whole.profile
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1
    parts[1].unlink()
    for read in (load_plain, scan, load_streamed):
        with pytest.raises(WeightsError, match=r"part 1 of 3 .* m-00002-of-00003\.gguf"):
            read(parts[0])
    parts[0].rename(tmp_path / "other.gguf")
    with pytest.raises(WeightsError, match="its name does not say which"):
        load_plain(tmp_path / "other.gguf")


def test_a_part_of_another_model_is_refused(llama, tmp_path):
    _, arch, fields, tensors = llama
    parts = planted.write_split(tmp_path, arch, fields, tensors)
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(WeightsError, match=r"says that it is part 2 .* its name says part 1"):
        load_plain(parts[0])


def test_load_scan_and_stream_refuse_the_same_files(llama, tmp_path):
    from melens.scanning import scan

    _, arch, fields, tensors = llama
    path = tmp_path / "m.gguf"
    del tensors["blk.1.ffn_down.weight"]
    planted.write(path, arch, fields, tensors)
    for read in (load_plain, load_streamed, scan):
        with pytest.raises(WeightsError, match=r"blk\.1\.ffn_down\.weight"):
            read(path)
    path.write_bytes(path.read_bytes()[:-100])
    for read in (load_plain, load_streamed, scan):
        with pytest.raises(WeightsError, match="is truncated"):
            read(path)


def test_a_streamed_gguf_is_the_loaded_one(llama, tmp_path):
    from melens.models.origin import fingerprint

    _, arch, fields, tensors = llama
    path = planted.write(tmp_path / "m.gguf", arch, fields, tensors)
    assert fingerprint(load_streamed(path, device="cpu")) == fingerprint(load(path, device="cpu"))


# --- what is kept on the disk ---------------------------------------------------------------------


def kept(cache):
    from safetensors.torch import load_file

    (file,) = cache.rglob("*.safetensors")
    return load_file(file), json.loads((file.parent / "config.json").read_text())["dtype"]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "F32"])
def test_the_fewest_bits_that_lose_nothing(kind, llama, tmp_path, cache):
    _, arch, fields, tensors = llama
    matrices = {name: kind for name, value in tensors.items() if value.ndim == 2}
    path = planted.write(tmp_path / "m.gguf", arch, fields, tensors, kinds=matrices)
    made = load_plain(path, device="cpu", dtype="float32")[0]
    found, dtype = kept(cache)
    wanted = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    name = "model.layers.1.mlp.down_proj.weight"
    assert found[name].dtype == wanted
    assert dtype == str(wanted).removeprefix("torch.")
    stored = read_gguf_header(path).tensors["blk.1.ffn_down.weight"]
    import gguf as package

    raw = np.frombuffer(path.read_bytes()[stored.start :][: stored.n_bytes], dtype=np.uint8)
    rows = raw.reshape(stored.shape[0], -1)
    exact = package.quants.dequantize(rows, package.GGMLQuantizationType[kind])
    assert torch.equal(made.state_dict()[name], torch.from_numpy(exact.copy()))


def test_narrowest_changes_no_value():
    third = torch.full((5000,), 1 / 3)
    assert narrowest(third).dtype == torch.float32
    assert narrowest(third.bfloat16().float()).dtype == torch.bfloat16
    assert narrowest(third.half().float()).dtype == torch.float16
    last = torch.ones(5000)
    last[-1] = 1 / 3
    assert narrowest(last).dtype == torch.float32
    assert narrowest(torch.tensor([math.nan, 1.0])).dtype == torch.float32
    assert narrowest(torch.tensor([1e30, 1.0])).dtype == torch.float32


def test_several_files_say_what_one_does(llama, tmp_path, cache, monkeypatch):
    hf, arch, fields, tensors = llama
    path = planted.write(tmp_path / "m.gguf", arch, fields, tensors)
    monkeypatch.setattr(gguf, "SHARD", 20_000)
    made = load_plain(path, device="cpu")[0]
    assert len(list(cache.rglob("model-0*.safetensors"))) > 3
    for name, value in made.state_dict().items():
        assert torch.allclose(value, hf.state_dict()[name], atol=1e-6), name


def test_size_and_place_are_said_before_and_a_full_disk_is_refused(
    llama, tmp_path, cache, monkeypatch, capsys
):
    _, arch, fields, tensors = llama
    path = planted.write(tmp_path / "m.gguf", arch, fields, tensors)
    monkeypatch.setattr(gguf.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(FetchError, match=r"needs 0 MB, and 0 MB are free"):
        load_plain(path)
    said = capsys.readouterr().err
    assert "converting m.gguf once, to at most 0 MB in" in said
    assert str(cache / "models") in said
    assert not [item for item in cache.rglob("*") if item.is_file()]


def test_without_a_cache_nothing_is_written(llama, tmp_path, cache, monkeypatch):
    _, arch, fields, tensors = llama
    path = planted.write(tmp_path / "m.gguf", arch, fields, tensors)
    saved = load(path, device="cpu")
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path / "second"))
    monkeypatch.setenv("MELENS_NO_CACHE", "1")
    made = load(path, device="cpu")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(made(ids), saved(ids))
    assert made.tokenizer("AB!")["input_ids"] == saved.tokenizer("AB!")["input_ids"]
    assert not (tmp_path / "second").exists()
    with pytest.raises(ModelError, match="drop --no-cache"):
        load_streamed(path)


def test_a_named_model_keeps_no_copy_where_none_is_wanted(llama, tmp_path, cache, monkeypatch):
    from dataclasses import replace

    from melens.models import NAMED, named
    from melens.scanning import scan
    from melens.store import hash_file

    hf, arch, fields, tensors = llama
    model = NAMED["smollm2-135m"]
    path = planted.write(tmp_path / model.file, arch, fields, tensors)
    monkeypatch.setitem(NAMED._items, model.name, replace(model, sha256=hash_file(path)))
    monkeypatch.setattr(named, "package_dir", lambda *_: tmp_path)
    monkeypatch.setenv("MELENS_NO_CACHE", "1")
    made = load_plain(model.name, device="cpu")[0]
    assert torch.allclose(made.lm_head.weight, hf.lm_head.weight)
    assert scan(model.name).run.model == model.name
    with pytest.raises(ModelError, match="drop --no-cache"):
        load_streamed(model.name)
    monkeypatch.setenv("MELENS_ACCEPT_LICENSE", "gemma")
    with pytest.raises(ModelError, match=r"comes in 4 packages.*; drop --no-cache"):
        load("gemma3-270m")
    assert not [item for item in cache.rglob("*") if item.is_file()]


def test_files_beside_a_gguf_are_another_models(llama, tmp_path):
    _, arch, fields, tensors = llama
    path = planted.write(tmp_path / "m.gguf", arch, fields, tensors)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "Z", "add_bos_token": true}')
    (tmp_path / "config.json").write_text("{broken")
    assert load(path, device="cpu").tokenizer.bos_token == "<s>"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "tokenizer.json", "config.json", "melens_copy.json"]
)
def test_a_torn_copy_of_the_users_own_file_is_made_again(file, llama, tmp_path):
    _, arch, fields, tensors = llama
    path = planted.write(tmp_path / "m.gguf", arch, fields, tensors)
    found = gguf.converted_copy(path) / file
    whole, made = found.read_bytes(), found.stat().st_ino
    assert gguf.converted_copy(path) == found.parent
    assert found.stat().st_ino == made  # once is enough
    found.write_bytes(whole[: len(whole) // 2])
    gguf.converted_copy(path)
    assert found.read_bytes() == whole
    found.unlink()
    gguf.converted_copy(path)
    assert found.read_bytes() == whole


def test_the_files_own_name_is_held_against_what_is_known(llama, tmp_path, cache):
    _, arch, fields, tensors = llama
    said = {
        "general.name": "A",
        "general.basename": "Qwen3",
        "general.size_label": "4B",
        "general.repo_url": "https://huggingface.co/Qwen/Qwen3-4B",
    }
    path = planted.write(tmp_path / "m.gguf", arch, fields, tensors, extra=said)
    assert gguf.given_names(path) == ("Qwen/Qwen3-4B", "A", "Qwen3-4B")
    assert gguf.given_names(gguf.converted_copy(path)) == ("Qwen/Qwen3-4B", "A", "Qwen3-4B")
    del said["general.repo_url"]
    said["general.finetune"] = "Mine"
    other = planted.write(tmp_path / "n.gguf", arch, fields, tensors, extra=said)
    assert gguf.given_names(other) == ("A", "Qwen3-4B-Mine", "Qwen3-Mine-4B")


def test_a_model_object_of_a_gguf_knows_the_files_names(llama, tmp_path, monkeypatch):
    """In check and in `melens known`, whole, streamed and without a copy."""
    from melens.models.origin import origin_of
    from melens.published import known_by
    from melens.results.known import KnownCheck

    _, arch, fields, tensors = llama
    path = planted.write(
        tmp_path / "m.gguf", arch, fields, tensors, extra={"general.name": "Qwen3 4B"}
    )
    assert origin_of(load_streamed(path)).also == ("Qwen3 4B",)
    monkeypatch.setenv("MELENS_NO_CACHE", "1")
    assert origin_of(load(path)).also == ("Qwen3 4B",)

    def hold(name):
        source = "a paper" if "Qwen3" in name else None
        return KnownCheck(model=name, verdict="unknown", comparisons=(), source=source)

    assert known_by(("m.gguf", "Qwen3 4B"), hold).model == "Qwen3 4B"
    assert known_by(("m.gguf", "other"), hold).model == "m.gguf"


def test_locate_without_a_cache_and_known_by_the_files_name(llama, tmp_path, cache, capsys):
    from melens.cli.app import main

    _, arch, fields, tensors = llama
    path = planted.write(
        tmp_path / "m.gguf", arch, fields, tensors, extra={"general.name": "Qwen3 4B"}
    )
    for words, code in (
        (["locate", str(path), "--no-cache", "--prompt", "A B C D E F", "-o", str(tmp_path)], 0),
        (["known", str(path), str(tmp_path / "locate.json"), "--json"], 0),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == code
    said = capsys.readouterr().out
    assert json.loads(said[said.index("{") :])["model"] == "Qwen3 4B"
    assert not cache.exists()
