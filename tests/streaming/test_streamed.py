"""Blocks read from disk while the model runs: the same numbers, one block at a time."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY

from melens.batches import Batch
from melens.capture import stream
from melens.errors import ModelError, PromptError, ResultError, SiteError, WeightsError
from melens.interventions import INTERVENTIONS
from melens.locating import locate
from melens.locating.trajectory import LastRow, trace
from melens.models import fingerprint, load
from melens.models.anatomy import anatomy, resid_post, resid_pre
from melens.results import load_result
from melens.scanning import reaching, scan
from melens.scanning.reaching import reach
from melens.streaming.skeleton import placeholder_of
from melens.streaming.streamed import load_streamed, stream_of

NAMES = list(TINY)


@pytest.fixture(scope="session")
def folder_of(make_tiny, tokenizer, tmp_path_factory):
    """A family's tiny model as a folder of several shards, made once."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_tiny(family).save_pretrained(made[family], max_shard_size="60KB")
            tokenizer.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture
def folder(folder_of, tmp_path):
    """A tiny Llama's folder, free to be damaged."""
    return shutil.copytree(folder_of("llama"), tmp_path / "model")


def everything(model, batch):
    """Every write and residual that an anatomy knows, bit by bit."""
    taps = {resid_pre(0): LastRow()}
    for block in anatomy(model).blocks:
        sites = (*block.mixer_writes, block.ffn_write, resid_post(block.layer))
        taps |= {site: LastRow() for site in sites if site}
    stream(model, batch, taps)
    return {site: tap.result() for site, tap in taps.items()}


def comparable(result):
    return {**json.loads(result.to_json()), "run": None}


@pytest.mark.parametrize("family", NAMES)
def test_every_family_streams_bit_by_bit(folder_of, family, ids):
    folder, batch = folder_of(family), Batch.of(ids)
    whole, streamed = load(folder, device="cpu"), load_streamed(folder, device="cpu")
    expected, found = everything(whole, batch), everything(streamed, batch)
    assert set(found) == set(expected)
    for site, value in expected.items():
        assert torch.equal(found[site], value), site
    located, there = locate(whole, [batch]), locate(streamed, [batch])
    assert comparable(there) == comparable(located)
    assert there.run.weights == located.run.weights == fingerprint(whole)
    assert (there.run.model, there.run.dtype) == (located.run.model, located.run.dtype)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3-moe"])
def test_one_block_is_in_memory_and_none_afterwards(folder_of, family, ids):
    streamed = load_streamed(folder_of(family), device="cpu")
    sizes = [
        sum(slot.placeholder.numel() for slot in b) for b in stream_of(streamed)._skeleton.blocks
    ]
    seen = []

    def real(model):
        parts = {id(p): p for p in model.blocks.parameters() if not p.isnan().all()}
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in parts.values()}
        return sum(storage.nbytes() for storage in storages.values()) // 4

    class Count:
        def update(self, x, batch):
            seen.append(real(streamed))

        def result(self):
            return seen

    stream(streamed, Batch.of(ids), {resid_post(i): Count() for i in range(len(sizes))})
    assert seen == sizes
    assert real(streamed) == 0
    assert streamed.embed.weight.isnan().all()


def test_only_the_rows_of_the_tokens_are_read(folder, ids):
    streamed = load_streamed(folder, device="cpu")
    reading = stream_of(streamed)
    before = reading.checkpoint.bytes_read
    stream(streamed, Batch.of(ids), {resid_pre(0): LastRow()})
    block = sum(slot.placeholder.numel() for slot in reading._skeleton.blocks[0])
    assert reading.checkpoint.bytes_read - before == (len(ids.unique()) * 32 + block) * 4


def test_half_precision_files_give_the_numbers_of_an_ordinary_load(
    make_tiny, tokenizer, tmp_path, ids
):
    make_tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    streamed = load_streamed(tmp_path, device="cpu", need_tokenizer=False)
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    whole = load(hf, tokenizer=tokenizer)
    assert next(streamed.parameters()).dtype == torch.float32
    expected = everything(whole, Batch.of(ids))
    for site, value in everything(streamed, Batch.of(ids)).items():
        assert torch.equal(value, expected[site]), site


def test_what_a_streamed_model_cannot_do_is_refused_or_nan(folder, ids):
    streamed = load_streamed(folder, device="cpu")
    with pytest.raises(ModelError, match="gives no logits"):
        streamed(ids)
    assert streamed.blocks[0].mlp.out.weight.isnan().all()
    with pytest.raises(RuntimeError), torch.no_grad():
        streamed.blocks[0].mlp.out.weight.mul_(2.0)
    assert placeholder_of((5, 7), torch.float32, "cpu").untyped_storage().nbytes() == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("absent", r"lacks 1 tensor.*, first model\.layers\.1\.mlp\.up_proj\.weight"),
        ("shard", r"is missing from"),
        ("cut", r"model-00002-of-\d+\.safetensors is truncated"),
        (
            "shape",
            r"model\.layers\.1\.mlp\.up_proj\.weight in .* has shape \[64, 16\]; .*\[64, 32\]",
        ),
        ("wrong", r"index\.json says that .* holds model\.layers\.1\.mlp\.up_proj\.weight"),
        ("nan", r"model\.layers\.1\.mlp\.up_proj\.weight in .* holds 1 NaN or Inf of 2048"),
    ],
)
def test_damage_is_one_line_that_names_the_tensor(folder, damage, message):
    name, index = "model.layers.1.mlp.up_proj.weight", folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    file = folder / data["weight_map"][name]
    tensors = load_file(file)
    if damage == "absent":
        del data["weight_map"][name], tensors[name]
    elif damage == "wrong":
        data["weight_map"][name] = next(f for f in data["weight_map"].values() if f != file.name)
    elif damage == "shard":
        file.unlink()
    elif damage == "cut":
        file = folder / sorted(set(data["weight_map"].values()))[1]
        file.write_bytes(file.read_bytes()[:-40])
    elif damage == "nan":
        tensors[name][3, 4] = float("nan")
    elif damage == "shape":
        tensors[name] = tensors[name][:, :16].contiguous()
    if damage in ("absent", "nan", "shape"):
        save_file(tensors, file, metadata={"format": "pt"})
    index.write_text(json.dumps(data))
    with pytest.raises(WeightsError, match=message) as found:
        load_streamed(folder, device="cpu")
    assert "\n" not in str(found.value)


def test_a_file_cut_while_it_runs_is_named(folder, ids):
    streamed = load_streamed(folder, device="cpu")
    file = stream_of(streamed).checkpoint.tensors["model.layers.2.mlp.down_proj.weight"].blob.path
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(WeightsError, match=f"{file.name} ends inside model.layers.2"):
        locate(streamed, [Batch.of(ids)])


OTHERS = {
    "OPTConfig": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "PhiConfig": {"intermediate_size": 64},
    "BloomConfig": {"n_layer": 3, "n_head": 4},
    "OlmoeConfig": {"intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "MambaConfig": {"state_size": 8},
}
"""Families that melens has no row for."""


@pytest.mark.parametrize("name", OTHERS)
def test_families_without_a_row_stream_too(name, tmp_path, ids, tokenizer):
    import transformers

    torch.manual_seed(0)
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4} if name != "BloomConfig" else {}
    config = getattr(transformers, name)(vocab_size=64, hidden_size=32, **shape, **OTHERS[name])
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = everything(load(tmp_path, device="cpu"), Batch.of(ids))
    for site, value in everything(load_streamed(tmp_path, device="cpu"), Batch.of(ids)).items():
        assert torch.equal(value, expected[site]), site


def test_a_hub_id_keeps_its_name(folder, monkeypatch):
    import huggingface_hub

    from melens.streaming import streamed as module

    monkeypatch.setattr(module, "source_of", lambda wanted, **options: wanted.name)
    asked = []

    def download(name, **options):
        asked.append((name, options["revision"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = reach(load_streamed("somebody/model", revision="v2", device="cpu"), tokens=[4])
    assert asked == [("somebody/model", "v2")]
    assert (found.run.model, found.run.model_revision) == ("somebody/model", "v2")


def test_quantised_and_local_revisions_are_refused(folder):
    with pytest.raises(ModelError, match=r"no file or folder some\.gguf"):
        load_streamed("some.gguf")
    with pytest.raises(ModelError, match="revision belongs to a hub id"):
        load_streamed(folder, revision="main")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised"):
        load_streamed(folder)


RESUMED = ["llama", "gpt2", "gemma3", "mixtral", "qwen3-next"]


@pytest.mark.parametrize("family", RESUMED)
def test_an_interrupted_pass_goes_on_at_the_block_where_it_stopped(
    folder_of, family, ids, tmp_path
):
    batch, folder = Batch.of(ids), folder_of(family)
    expected = comparable(locate(load_streamed(folder, device="cpu"), [batch]))
    first = load_streamed(folder, device="cpu", keep=tmp_path)

    def stop(done, total):
        if stream_of(first).blocks_read == 4 + first.cfg.n_layers:  # block 0, the contract's pass
            raise KeyboardInterrupt

    stream_of(first).progress = stop
    with pytest.raises(KeyboardInterrupt):
        locate(first, [batch])
    kept = sorted(tmp_path.rglob("block-*"))
    assert len(kept) == 2
    assert not list(tmp_path.rglob("*.tmp"))
    second = load_streamed(folder, device="cpu", keep=tmp_path)
    assert stream_of(second).blocks_read == 0  # the contract held already
    assert comparable(locate(second, [batch])) == expected
    plain = load_streamed(folder, device="cpu")
    locate(plain, [batch])
    saved = stream_of(plain).blocks_read - plain.cfg.n_layers - 1 - stream_of(second).blocks_read
    assert saved == 2


def test_a_tape_of_other_weights_is_not_used(folder_of, ids, tmp_path, make_tiny, tokenizer):
    locate(load_streamed(folder_of("llama"), device="cpu", keep=tmp_path), [Batch.of(ids)])
    other = tmp_path / "other"
    make_tiny("llama", seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    expected = locate(load(other, device="cpu"), [Batch.of(ids)])
    found = locate(load_streamed(other, device="cpu", keep=tmp_path), [Batch.of(ids)])
    assert comparable(found) == comparable(expected)


def test_a_tape_keeps_no_edited_pass_and_plays_none(folder_of, ids, tmp_path):
    batch, site = Batch.of(ids), resid_post(2)
    model = load_streamed(folder_of("llama"), device="cpu", keep=tmp_path)

    def clean():
        tap = LastRow()
        stream(model, batch, {site: tap})
        return tap.result()

    def edits():
        yield model.hooks(fwd_hooks=[(resid_post(1), lambda x, hook: 2 * x)])
        yield INTERVENTIONS["ffn_scale"].make(model, 1, tokens="all", factor=2.0)

    expected = stream_without_tape(folder_of("llama"), batch, site)
    for turn in range(2):  # nothing on the tape, then everything
        for edit in edits():
            with pytest.raises(ModelError, match="cannot be edited"), edit:
                clean()
        if not turn:
            assert clean().equal(expected)
    assert clean().equal(expected)


def stream_without_tape(folder, batch, site):
    tap = LastRow()
    stream(load_streamed(folder, device="cpu"), batch, {site: tap})
    return tap.result()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_reach_is_the_trajectory_of_locate(folder_of, family):
    tokens = [1, 40, 7, 22]
    found = reach(folder_of(family), tokens=tokens)
    paths = trace(load(folder_of(family), device="cpu"), [[token] for token in tokens])
    for token, path in zip(found.tokens, paths, strict=True):
        largest = path.resid[1:].abs().amax(-1).tolist()
        assert token.largest == pytest.approx(largest, rel=1e-5)
        assert token.dims == tuple(path.resid[1:].abs().argmax(-1).tolist())
        assert abs(token.value) == pytest.approx(max(largest), rel=1e-5)
    for row in found.profile:
        at = [path.ffn[row.layer] for path in paths]
        assert abs(row.write) == pytest.approx(max(x.abs().max().item() for x in at), rel=1e-5)
        values = torch.stack([path.resid[row.layer + 1] for path in paths])
        assert abs(row.value) == pytest.approx(values.abs().max().item(), rel=1e-5)
        assert row.token_id == tokens[int(values.abs().amax(-1).argmax())]


def bounded(folder):
    """A scan with bounds and an erase layer of our own."""
    found = scan(folder)
    bounds = ((50.0, 3), (None, None), (8.0, 4))
    rows = [
        row.model_copy(update={"ceiling": ceiling, "dim": dim})
        for row, (ceiling, dim) in zip(found.profile, bounds, strict=True)
    ]
    return found.model_copy(update={"erase_layer": 1, "profile": tuple(rows)})


def test_the_reach_stops_at_the_erase_layer_and_reads_no_further(folder_of):
    streamed = load_streamed(folder_of("llama"), device="cpu")
    before = stream_of(streamed).blocks_read
    said = bounded(folder_of("llama"))
    found = reach(streamed, said, tokens=torch.tensor([1, 9]))
    assert stream_of(streamed).blocks_read - before == 2 == found.until + 1
    paths = trace(load(folder_of("llama"), device="cpu"), [[1], [9]])
    most = max(abs(path.ffn[0, 3].item()) for path in paths)
    assert found.profile[0].used == pytest.approx(most / 50.0, rel=1e-5)
    assert found.profile[1].used is None
    assert "the layers after 1 were not run" in found.summary()
    assert reach(streamed, said, tokens=[1], until=2).until == 2


def test_the_reach_tries_bos_the_chat_and_a_seeded_sample(folder_of):
    streamed = load_streamed(folder_of("llama"), device="cpu")
    found = reach(streamed, sample=5, seed=3)
    assert [token.why for token in found.tokens] == ["bos"] + ["sample"] * 5
    assert found.tokens[0].token == "<s>"
    assert [t.token_id for t in reach(streamed, sample=5, seed=3).tokens] == [
        t.token_id for t in found.tokens
    ]
    streamed.tokenizer.chat_template = "w9 {{ messages[0]['content'] }}"
    try:
        assert [(t.why, t.token_id) for t in reach(streamed, sample=0).tokens] == [
            ("bos", 1),
            ("chat", 9),
        ]
    finally:
        streamed.tokenizer.chat_template = None


def test_the_reach_refuses_what_is_not_there(folder_of):
    streamed = load_streamed(folder_of("llama"), device="cpu")
    with pytest.raises(PromptError, match="token 64 is outside the vocabulary, 0 to 63"):
        reach(streamed, tokens=[64])
    with pytest.raises(PromptError, match="no token to try"):
        reach("nowhere", tokens=[])
    with pytest.raises(PromptError, match="count from 0, got -1"):
        reach("nowhere", tokens=[-1])
    with pytest.raises(SiteError, match=r"layer 3 is outside 0\.\.2"):
        reach(streamed, until=3)


def test_the_reach_refuses_a_scan_of_another_model(folder_of, tmp_path):
    llama = folder_of("llama")
    said = scan(llama)
    found = reach(llama, said, tokens=[1])
    assert found.run.settings["files"] == said.run.settings["files"]
    other = scan(folder_of("mistral"))
    assert (other.n_layers, other.d_model) == (said.n_layers, said.d_model)
    with pytest.raises(ResultError, match="other weight files"):
        reach(llama, other, tokens=[1])
    for update in ({"n_layers": 2, "profile": said.profile[:2]}, {"d_model": 16}):
        with pytest.raises(ResultError, match=r"another model: .* has 3 of 32; scan this model"):
            reach(llama, said.model_copy(update=update), tokens=[1])
    path = tmp_path / "scan.json"
    path.write_text(said.to_json())
    assert reach(llama, path, tokens=[1]).profile == found.profile
    path.write_text(found.to_json())
    with pytest.raises(ResultError, match=r"needs what scan\(\) gave, got Reach"):
        reach("nowhere", path, tokens=[1])
    for wrong in (1, "abc", [1.5]):
        with pytest.raises(PromptError, match="must be a list of token ids"):
            reaching._check(wrong, None)


def test_the_reach_survives_saving(folder_of, tmp_path):
    found = reach(folder_of("gemma2"), bounded(folder_of("gemma2")), tokens=[1, 9, 12])
    (tmp_path / "reach.json").write_text(found.to_json())
    again = load_result(tmp_path / "reach.json")
    assert again == found
    assert again.plot().axes


def run(arguments, capsys):
    from melens.cli.app import _run

    code = _run(arguments, debug=False)
    return code, capsys.readouterr()


def test_the_commands(folder_of, capsys, tmp_path):
    model = str(folder_of("llama"))
    text = " ".join(f"w{3 + i * 7 % 60}" for i in range(300))
    (tmp_path / "text.txt").write_text(text)
    options = ["--text", str(tmp_path / "text.txt"), "--n-seq", "3", "--length", "20", "--json"]
    code, plain = run(["locate", model, *options, "--batch-size", "3"], capsys)
    assert code == 0
    out = tmp_path / "out"
    code, streamed = run(["locate", model, *options, "--stream", "--out", str(out)], capsys)
    assert code == 0
    assert {**json.loads(streamed.out), "run": 0} == {**json.loads(plain.out), "run": 0}
    assert "10 blocks read of 3 in the model" in streamed.err  # 1, and three passes
    assert sorted(f.name for f in out.iterdir()) == ["locate.json", "profile.png", "profile.svg"]
    code, made = run(["locate", model, *options[:2], "--stream", "-q", "--json"], capsys)
    settings = json.loads(made.out)["run"]["settings"]
    assert (code, settings["sequences"], settings["length"]) == (0, 2, 64)
    code, made = run(["reach", model, "--token", "5", "--until", "1", "--out", str(out)], capsys)
    assert code == 0
    assert "the layers after 1 were not run" in made.out
    assert (out / "reach.json").is_file()
    assert not (out / ".stream").exists()
    code, made = run(["reach", model, "--scan", str(out / "locate.json")], capsys)
    assert code == 2
    assert "give a scan.json" in made.err


@pytest.mark.weights
def test_smollm2_streamed_is_the_ordinary_locate(smol):
    from melens import prompts

    texts = prompts(n=2, length=64)
    streamed = load_streamed("smollm2-135m", device="cpu")
    found, expected = locate(streamed, texts), locate(smol, texts)
    assert comparable(found) == comparable(expected)
    assert found.run.weights == expected.run.weights


def test_the_big_checkpoint_in_small_is_predicted_and_located(tmp_path):
    big = benchmark("big_checkpoint")
    shape = big.SHAPES[0.0001]
    big.write_checkpoint(tmp_path, shape, limit=1_500_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    data = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert data["metadata"]["total_size"] == 2 * shape.parameters
    from melens import prompts
    from melens.scanning import scan

    predicted = scan(str(tmp_path))
    assert (predicted.me_layer, predicted.dims[0]) == (shape.me_layer, shape.dim)
    streamed = load_streamed(tmp_path, device="cpu")
    found = locate(streamed, prompts(big.words(200), n=2, length=64, bos=True))
    assert (found.me_layer, found.erase_layer) == (shape.me_layer, shape.erase_layer)
    assert (found.massive[0].dim, found.massive[0].token_id) == (shape.dim, big.BOS)
    assert found.massive[0].value == pytest.approx(big.AMOUNT, rel=0.15)
    reached = reach(streamed, predicted, tokens=[big.BOS, 9], until=shape.me_layer)
    row = reached.profile[shape.me_layer]
    assert (row.dim, row.ceiling_dim, row.token_id) == (shape.dim, shape.dim, big.BOS)
    assert row.used == pytest.approx(big.AMOUNT / row.ceiling, rel=0.15)


def test_the_full_size_fits_the_disk_it_promises():
    shape = benchmark("big_checkpoint").SHAPES[1.0]
    assert 7.9e9 < shape.parameters < 8.1e9
    assert 2 * shape.parameters < 17e9


def benchmark(name):
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parts_that_are_joined_must_all_be_there(tmp_path):
    """OLMo hybrid keeps three convolutions apart that transformers joins as it loads."""
    import families

    families.tiny("OlmoHybridForCausalLM").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("layers.0.linear_attn.k_conv1d.weight"))
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"conv1d.*has shape \[64, 1, 4\]; the config asks"):
        load_streamed(tmp_path)


def test_a_part_that_nothing_fills_is_refused_by_the_skeleton_too(tmp_path):
    """The check at loading comes first; without it an expert would be whatever was in memory."""
    import families

    from melens.models.checkpoint import read_folder
    from melens.models.weight_files import read_json, weight_files
    from melens.streaming.skeleton import build_skeleton

    families.tiny("MixtralForCausalLM").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[next(name for name in tensors if "layers.1" in name and "experts.3.w2" in name)]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = read_json(tmp_path / "config.json")
    files = read_folder(weight_files(tmp_path, config), config)
    with pytest.raises(WeightsError, match=r"experts\.0\.w2.* others hold"):
        build_skeleton(tmp_path, files, dtype=torch.float32, device="cpu")
