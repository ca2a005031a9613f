"""Which files are a folder's weights, and that they fit its config: one answer for all commands."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file, save_file

from melens.cli.app import _run
from melens.errors import MelensError, ModelError, ModelNotFoundError, WeightsError
from melens.models import files, fingerprint, load, loading
from melens.models.dry_load import require_all_there
from melens.models.files import check_fit, check_folder
from melens.models.named import kept_copy
from melens.models.opening import by_range
from melens.models.weight_files import INDEX, SINGLE, is_inside
from melens.scanning import scan
from melens.scanning.reaching import reach
from melens.streaming.streamed import load_streamed

UP = "model.layers.1.mlp.up_proj.weight"
pytestmark = pytest.mark.timeout(60)
"""What hangs is stopped; what is refused here takes far less than a second."""


@pytest.fixture(scope="module")
def saved(make_tiny, tokenizer, tmp_path_factory):
    """Two tiny Llamas of one shape and other weights, each in one file and in shards."""
    made = {}
    for seed, name in enumerate("ab"):
        hf = make_tiny("llama", seed=seed)
        for kind, size in (("one", "5GB"), ("many", "60KB")):
            folder = made[name, kind] = tmp_path_factory.mktemp(f"{name}-{kind}")
            hf.save_pretrained(folder, max_shard_size=size)
            tokenizer.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def right(saved):
    """What is said of each of the two models in one file."""
    return {name: answers(saved[name, "one"])[1] for name in "ab"}


@pytest.fixture
def folder(saved, tmp_path):
    """Model a in one file, free to be damaged."""
    return shutil.copytree(saved["a", "one"], tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, **changes):
    tensors = load_file(folder / SINGLE)
    tensors.update({name.replace("__", "."): value for name, value in changes.items()})
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def answers(folder):
    """What load, --stream, scan and reach say, each of the weights that it reads."""
    whole, streamed = load(folder, device="cpu"), load_streamed(folder, device="cpu")
    weights = whole.state_dict()["blocks.1.mlp.in.weight"].clone()
    went = reach(streamed, tokens=[4, 5]).profile
    found = scan(folder)
    return weights, (fingerprint(whole), fingerprint(streamed), found.profile, went)


def refusals(folder, kind=MelensError):
    """The one line that each reader refuses a folder with."""
    found = []
    for reader in (lambda f: load(f, device="cpu"), load_streamed, scan):
        with pytest.raises(kind) as error:
            reader(folder)
        assert error.value.exit_code == 2
        assert "\n" not in str(error.value)
        found.append(str(error.value))
    return found


def check_all_refuse(folder, pattern, kind=MelensError):
    for said in refusals(folder, kind):
        assert re.search(pattern, said), said


@pytest.mark.parametrize("case", ["old beside", "stale beside shards", "named by the config"])
def test_every_reader_takes_the_weights_that_transformers_takes(
    saved, right, case, tmp_path, capsys
):
    from transformers import AutoModelForCausalLM

    first, other = ("b", "a") if case == "stale beside shards" else ("a", "b")
    source = saved["a", "many"] if case == "stale beside shards" else saved["a", "one"]
    both = shutil.copytree(source, tmp_path / "both")
    if case == "old beside":
        shutil.copy(saved["b", "one"] / SINGLE, both / "model_old.safetensors")
    elif case == "stale beside shards":
        shutil.copy(saved["b", "one"] / SINGLE, both / SINGLE)
    else:
        (both / SINGLE).rename(both / "mine.safetensors")
        shutil.copy(saved["b", "one"] / SINGLE, both / SINGLE)
        edit_config(both, transformers_weights="mine.safetensors")
    capsys.readouterr()
    weights, found = answers(both)
    said = capsys.readouterr().err
    hf = AutoModelForCausalLM.from_pretrained(both)
    assert torch.equal(weights, hf.state_dict()[UP])
    assert not torch.equal(weights, load_file(saved[other, "one"] / SINGLE)[UP])
    assert found == right[first]
    taken = "mine.safetensors" if case == "named by the config" else SINGLE
    assert said.count(f"the weights are those of {taken}, as in transformers; not read: ") == 1


def test_shards_and_one_file_are_the_same_model_and_raise_no_note(saved, right, capsys):
    assert answers(saved["a", "many"])[1] == right["a"]
    assert "not read" not in capsys.readouterr().err


def test_weights_of_which_none_is_the_model_are_refused(folder, saved):
    shutil.copy(folder / SINGLE, folder / "other.safetensors")
    (folder / SINGLE).rename(folder / "model_old.safetensors")
    check_all_refuse(folder, r"neither model\.safetensors nor .*only model_old\.saf.*, other\.saf")


def test_links_as_in_the_hubs_cache_are_followed(saved, right, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for at, file in enumerate(sorted(saved["a", "many"].iterdir())):
        shutil.copy(file, blobs / str(at))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(at))
    whole = load(snapshot, device="cpu")
    assert (fingerprint(whole), scan(snapshot).profile) == (right["a"][0], right["a"][2])


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/tmp/x.safetensors",
        "a\\b.safetensors",
        "sub/x.safetensors",
        "",
        "..",
        ".",
        "x\0.safetensors",
        7,
        None,
    ],
)
def test_an_index_or_config_names_no_file_elsewhere(saved, tmp_path, name):
    assert not is_inside(name)
    folder = shutil.copytree(saved["a", "many"], tmp_path / "in" / "model")
    shutil.copy(saved["a", "one"] / SINGLE, folder.parent / SINGLE)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][UP] = name
    (folder / INDEX).write_text(json.dumps(index))
    check_all_refuse(folder, "only safetensors files of its own folder", WeightsError)
    if name is not None:
        edit_config(folder, transformers_weights=name)
        check_all_refuse(folder, "config.json says that the weights are in", WeightsError)


def _other(placed):
    return next(file for file in placed.values() if file != placed[UP])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: index.pop("metadata"), "no metadata"),
        (lambda index: index.update(weight_map={}), "no weight_map"),
        (lambda index: index.update(weight_map=[1]), "no weight_map"),
        (
            lambda index: index["weight_map"].update({UP: _other(index["weight_map"])}),
            f"holds {UP}, and .* does",
        ),
        (lambda index: index["weight_map"].update({UP: "pytorch_model.bin"}), "only safetensors"),
        (lambda index: index["weight_map"].update({UP: "gone.safetensors"}), "gone.* is missing"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(saved, tmp_path, change, says):
    folder = shutil.copytree(saved["a", "many"], tmp_path / "model")
    assert (folder / "model-00001-of-00003.safetensors").is_file()
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    check_all_refuse(folder, says, WeightsError)


def test_an_index_may_name_what_no_shard_holds_if_the_model_needs_none(saved, tmp_path):
    folder = shutil.copytree(saved["a", "many"], tmp_path / "model")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["old.weight"] = index["weight_map"][UP]
    (folder / INDEX).write_text(json.dumps(index))
    check_folder(folder, trust_remote_code=False)
    file = folder / index["weight_map"][UP]
    left = {name: value for name, value in load_file(file).items() if name != UP}
    save_file(left, file, metadata={"format": "pt"})
    check_all_refuse(folder, rf"lacks 1 tensor.*first {UP}", WeightsError)


def test_one_tensor_in_two_shards_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved["a", "many"], tmp_path / "model")
    index = json.loads((folder / INDEX).read_text())
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][UP])
    tensors = load_file(folder / other)
    save_file({**tensors, UP: torch.zeros(64, 32)}, folder / other, metadata={"format": "pt"})
    check_all_refuse(folder, rf"{UP} is in .* and in .*; keep one", WeightsError)


COMMANDS = [
    ["locate"],
    ["locate", "--stream"],
    ["scan"],
    ["reach"],
    ["check"],
    ["diff"],
    ["generate"],
    ["export"],
    ["eval"],
]
"""One for each way of opening a model; the other commands open theirs as ``locate`` does."""
MORE = {
    "generate": ["--prompt", "w5 w6"],
    "export": ["--format", "hf"],
    "eval": ["--task", "perplexity"],
}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_config_with_fewer_layers_is_refused_by_every_command(folder, command, capsys, tmp_path):
    edit_config(folder, num_hidden_layers=2)
    second = [str(folder)] if command == ["diff"] else []
    out = ["-o", str(tmp_path / "out")] if command != ["generate"] else []
    more = MORE.get(command[0], [])
    code = _run([command[0], str(folder), *second, *command[1:], *more, *out], debug=False)
    said = capsys.readouterr().err
    assert code == 2, said
    assert "holds weights of layer 2, and its config.json has 2 layers (0 to 1)" in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "name",
    [
        "v_head__summary__weight",
        "model__layers__0__self_attn__q_proj__bias",
        "model__layers__0__extra__weight",
    ],
)
def test_weights_that_the_model_does_not_use_are_refused(folder, name):
    edit_weights(folder, **{name: torch.ones(32)})
    check_all_refuse(
        folder, rf"1 tensor.*does not use, first {name.replace('__', '.')}", WeightsError
    )


def test_what_transformers_ignores_by_design_is_let_pass(folder, make_tiny, tmp_path):
    before = scan(folder).profile
    old = {f"model__layers__{i}__self_attn__rotary_emb__inv_freq": torch.ones(4) for i in range(3)}
    edit_weights(folder, **old)
    assert scan(folder).profile == before
    make_tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    edit_weights(tmp_path / "gpt2", transformer__h__0__attn__bias=torch.ones(1, 1, 64, 64))
    check_folder(tmp_path / "gpt2", trust_remote_code=False)


@pytest.mark.parametrize(
    ("config", "old"),
    [
        ("GPTNeoConfig", "attn.attention.bias"),
        ("GPTNeoConfig", "attn.attention.masked_bias"),
        ("GPTJConfig", "attn.bias"),
        ("GPTJConfig", "attn.masked_bias"),
        ("CodeGenConfig", "attn.causal_mask"),
        ("GPT2Config", "attn.masked_bias"),
    ],
)
def test_masks_that_older_versions_saved_are_let_pass(config, old, tmp_path):
    import transformers

    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rotary_dim": 4,
        "attention_types": [[["global", "local"], 1]],
    }
    if config != "GPTNeoConfig":
        del sizes["attention_types"]
    made = getattr(transformers, config)(
        vocab_size=64, hidden_size=32, max_position_embeddings=64, **sizes
    )
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    edit_weights(tmp_path, **{f"transformer.h.0.{old}".replace(".", "__"): torch.ones(1)})
    check_folder(tmp_path, trust_remote_code=False)
    edit_weights(tmp_path, transformer__h__0__attn__extra=torch.ones(1))
    with pytest.raises(WeightsError, match=r"1 tensor.*first transformer.h.0.attn.extra"):
        check_folder(tmp_path, trust_remote_code=False)


def test_a_width_is_no_count(tmp_path):
    """Qwen1.5-MoE's shared expert is wider than its files have tensors."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_experts=2,
        num_key_value_heads=2,
        intermediate_size=32,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=5632,
    )
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path)
    check_folder(tmp_path, trust_remote_code=False)
    edit_config(tmp_path, shared_expert_intermediate_size=10**9)
    with pytest.raises(WeightsError, match="asks for"):
        check_folder(tmp_path, trust_remote_code=False)


def test_a_quantised_loader_may_leave_scales_over():
    info = {"missing_keys": (), "unexpected_keys": ["model.layers.1.self_attn.k_scale"]}
    require_all_there(info, 2, name="m", quantised=True)
    with pytest.raises(WeightsError, match="does not use"):
        require_all_there(info, 2, name="m")
    with pytest.raises(WeightsError, match="layer 1,"):
        require_all_there(info, 1, name="m", quantised=True)


@pytest.mark.parametrize("text", ["[]", "{", '{"transformers_weights": "../x.safetensors"}', "{}"])
def test_a_damaged_copy_in_the_hubs_cache_is_none(text, tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "config.json").write_text(text)
    found = str(tmp_path / "config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: found)
    assert kept_copy("org/name", None) is None


def test_a_config_is_left_as_it_was(make_tiny):
    config = make_tiny("llama").config.to_dict()
    config["rope_scaling"] = {"type": "linear", "factor": 2.0}
    before = copy.deepcopy(config)
    shapes = {name: tuple(v.shape) for name, v in make_tiny("llama").state_dict().items()}
    check_fit(config, shapes, name="m")
    assert config == before


@pytest.mark.filterwarnings("ignore")  # peft's and transformers' own
def test_the_loader_itself_refuses_what_a_hub_id_may_bring(folder):
    """A hub id is read by transformers alone: what it did not use is asked of it."""
    options = {"local_files_only": True, "revision": None, "trust_remote_code": False}
    edit_config(folder, num_hidden_layers=2)
    with pytest.raises(WeightsError, match="holds weights of layer 2"):
        loading._read_weights(folder, dtype=torch.float32, options=options)
    edit_config(folder, num_hidden_layers=3)
    add_adapter(folder)
    with pytest.raises(ModelError, match="holds an adapter"):
        loading._read_weights(folder, dtype=torch.float32, options=options)


def add_adapter(folder):
    """What peft saves of a LoRA of this model, beside it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(hf, LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "some/base-model"}))


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_never_applied_unsaid(folder, capsys):
    add_adapter(folder)
    check_all_refuse(
        folder, r"holds an adapter \(adapter_config\.json\) beside the model", ModelError
    )
    for file in ("config.json", SINGLE):
        (folder / file).unlink()
    check_all_refuse(
        folder, "only an adapter, of the model some/base-model; merge", ModelNotFoundError
    )
    assert _run(["check", str(folder)], debug=False) == 2
    (folder / "adapter_config.json").write_text("[")
    check_all_refuse(folder, "cannot read", ModelError)


def write_header(folder, change):
    """Rewrite the header of the only file; the data stay where they are in it."""
    path = folder / SINGLE
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = (change(header) or json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def same_bytes(header):
    header[UP] |= {"data_offsets": header["model.layers.0.mlp.up_proj.weight"]["data_offsets"]}


def outside(header):
    begin, end = header[UP]["data_offsets"]
    header[UP]["data_offsets"] = [begin + 2**40, end + 2**40]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (same_bytes, r"up_proj\.weight and model.*up_proj\.weight lie on the same bytes"),
        (outside, "is truncated"),
        (lambda h: h.pop(UP) and None, "are no tensor's"),
        (lambda h: h[UP].update(data_offsets=[-8, 8184]), "corrupt"),
        (lambda h: h[UP].update(data_offsets=[0.0, 8192.0]), "corrupt"),
        (lambda h: h[UP].update(data_offsets=[8192, 0]), "corrupt"),
        (lambda h: h[UP].update(data_offsets=[0, 8192, 1]), "corrupt"),
        (lambda h: h[UP].update(shape=[-64, -32]), "corrupt"),
        (lambda h: h[UP].update(shape=[64, 33]), "corrupt"),
        (lambda h: h[UP].update(shape=[True, 2048]), "corrupt"),
        (lambda h: h[UP].update(shape=[10**30, 0], data_offsets=[0, 0]), "corrupt"),
        (lambda h: h[UP].update(shape="64"), "corrupt"),
        (lambda h: h[UP].update(dtype=["F32"]), "corrupt"),
        (lambda h: h.update({UP: 5}), "corrupt"),
        (lambda h: h.update(__metadata__={"format": 1}), "corrupt"),
        (lambda h: "[" * 100_000, "corrupt"),
        (lambda h: '{"a": ' * 100_000, "corrupt"),
        (lambda h: json.dumps(h).replace('"lm_head.weight"', f'"{UP}"'), "corrupt"),
    ],
)
def test_a_header_lists_only_what_lies_in_the_file(folder, change, says):
    write_header(folder, change)
    check_all_refuse(folder, says, WeightsError)


def test_a_header_of_any_length_is_held_against_the_file(folder):
    path = folder / SINGLE
    data = path.read_bytes()
    for length in (2**63, 2**40, len(data) - 7, 0):
        path.write_bytes(length.to_bytes(8, "little") + data[8:])
        check_all_refuse(folder, "truncated or no safetensors file", WeightsError)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_hidden_layers": 10**9}),
        ("llama", {"num_hidden_layers": 10**30}),
        ("llama", {"num_labels": 10**9}),
        ("llama", {"layer_types": [10**9]}),
        ("llama", {"hidden_size": 10**12}),
        ("llama", {"vocab_size": 10**9}),
        ("llama", {"head_dim": 10**12}),
        ("llama", {"num_hidden_layers": 4}),
        ("gpt2", {"n_layer": 10**9}),
        ("gpt2", {"n_positions": 10**6}),
        ("mixtral", {"num_local_experts": 10**9}),
    ],
)
def test_sizes_that_the_files_do_not_hold_are_refused_before_anything_is_built(
    make_tiny, tmp_path, family, changes
):
    make_tiny(family).save_pretrained(tmp_path)
    check_folder(tmp_path, trust_remote_code=False)
    edit_config(tmp_path, **changes)
    check_all_refuse(tmp_path, r"config|lacks \d+ tensor", ModelError)


def test_computed_tables_are_bounded_by_what_is_stored(tmp_path):
    """GPT-J stores no mask: its length alone would make one of 4 TB."""
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    GPTJForCausalLM(config).save_pretrained(tmp_path)
    check_folder(tmp_path, trust_remote_code=False)
    edit_config(tmp_path, n_positions=10**9)
    with pytest.raises(ModelError, match=r"GB of computed tables|does not make a model"):
        check_folder(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -3},
        {"hidden_size": "32"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 2.5},
        {"vocab_size": True},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": -1.0},
        {"rms_norm_eps": "x"},
        {"rope_theta": float("nan")},
        {"initializer_range": float("inf")},
        {"hidden_act": 7},
        {"hidden_act": "no such"},
        {"architectures": 5},
        {"model_type": ["llama"]},
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": "no such"}},
        {"dtype": "no such"},
        {"num_key_value_heads": 3},
        {"pad_token_id": 10**9},
        {"intermediate_size": {"a": 1}},
        {"max_position_embeddings": 0},
    ],
    ids=str,
)
def test_a_senseless_config_is_one_line_and_exit_code_2(folder, changes):
    edit_config(folder, **changes)
    check_all_refuse(folder, r"config|model type|causal", ModelError)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "7",
        "null",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"model_type": "llama", "x": ' + "[" * 900 + "]" * 900 + "}",
        "{" + '"a": 1' * 3,
        '"' + "1" * 5000,
    ],
)
def test_a_config_that_is_no_object_is_one_line(folder, text):
    (folder / "config.json").write_text(text)
    assert all(len(said) < 600 for said in refusals(folder, ModelError))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "melens.json"]
)
def test_a_pipe_in_the_folder_is_named_and_not_read(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    check_all_refuse(folder, rf"{name} is a pipe, a socket or a device", MelensError)


def test_a_config_or_index_that_is_too_long_is_refused_unread(folder):
    (folder / "config.json").unlink()
    with (folder / "config.json").open("wb") as file:
        file.truncate(2**40)
    check_all_refuse(folder, r"1,099,511,627,776 bytes, and at most 100,000,000 are", ModelError)


def test_what_passed_once_is_not_asked_again_unless_something_changed(saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved["a", "one"], tmp_path / "model")
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MELENS_NO_CACHE", raising=False)
    monkeypatch.setattr(files, "LARGE", 1)
    asked = []
    monkeypatch.setattr(files, "check_fit", lambda *_, **__: asked.append("fit"))

    def times():
        asked.clear()
        check_folder(folder, trust_remote_code=False)
        return len(asked)

    assert [times(), times()] == [1, 0]
    monkeypatch.setenv("MELENS_NO_CACHE", "1")
    assert times() == 1
    monkeypatch.delenv("MELENS_NO_CACHE")
    monkeypatch.setattr(files, "versions", lambda: {"transformers": "another"})
    assert [times(), times()] == [1, 0]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    assert [times(), times()] == [1, 0]


def repository(folder):
    """The interface of a hub's repository."""
    return DirFileSystem(str(folder), LocalFileSystem())


def test_a_scan_by_range_follows_the_same_rule(saved, folder, tmp_path):
    both = shutil.copytree(saved["a", "many"], tmp_path / "both")
    shutil.copy(saved["b", "one"] / SINGLE, both / SINGLE)
    found = by_range("some/model", "main", repository(both))
    assert [blob.name for blob in found.blobs] == [SINGLE]
    edit_config(folder, num_hidden_layers=2)
    with pytest.raises(WeightsError, match="layer 2"):
        by_range("some/model", "main", repository(folder))
    edit_config(folder, num_hidden_layers=3)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        by_range("some/model", "main", repository(folder))


@pytest.mark.parametrize("ask", [load, scan, load_streamed, loading.load_plain])
def test_a_folder_of_a_gguf_names_the_file_to_give(ask, tmp_path):
    for name in ("model.gguf", "melens.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelNotFoundError, match=rf"give {tmp_path}/model\.gguf itself\.$"):
        ask(tmp_path)
    (tmp_path / "b.gguf").write_text("")
    with pytest.raises(ModelNotFoundError, match=r"b\.gguf itself \(one of 2 such files\)"):
        ask(tmp_path)
