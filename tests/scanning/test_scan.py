"""The scan: bounds hold on real modules, files are read right, layers are predicted."""

from __future__ import annotations

import json
import shutil

import families
import pytest
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from planted import plant
from tiny import TINY
from torch import nn

from melens.cli.app import main
from melens.errors import (
    FetchError,
    ModelError,
    ModelNotFoundError,
    ResultError,
    WeightsError,
)
from melens.models import checkpoint
from melens.models.contract import probe_ids
from melens.models.opening import by_range, open_checkpoint
from melens.models.roles import roles_of
from melens.published import known_scan, published_rows
from melens.results import WeightScan, load_result
from melens.scanning import predict as weights
from melens.scanning import scan
from melens.scanning.neurons import HIGHEST
from melens.scanning.plan import GGUF, HF
from melens.scanning.predict import STANDS_OUT

AROUND = {
    "gemma2": ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    "gemma3": ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    "olmo2": (None, "mlp", "post_feedforward_layernorm"),
    "gpt2": ("ln_2", "mlp", None),
    "phi": ("input_layernorm", "mlp", None),
    "opt": ("final_layer_norm", None, None),
}
"""Modules around a block's FFN in transformers: norm, FFN, norm behind it."""
USUAL = ("post_attention_layernorm", "mlp", None)
ROUTED = ("mixtral", "qwen3-moe", "qwen3-next")
BIASED = ("gpt2", "neox", "phi", "opt")


def phi():
    from transformers import PhiConfig

    return PhiConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )


def opt():
    from transformers import OPTConfig

    shape = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "word_embed_proj_dim": 32}
    return OPTConfig(vocab_size=64, num_attention_heads=4, max_position_embeddings=64, **shape)


OTHERS = {"phi": phi, "opt": opt}


@pytest.fixture(scope="module")
def make(make_tiny):
    """A tiny model of any family, its biases random too, and gate and up large: acts saturate."""
    from transformers import AutoModelForCausalLM

    def made(family, *, size=1.0):
        if family in OTHERS:
            torch.manual_seed(3)
            hf = AutoModelForCausalLM.from_config(OTHERS[family]()).eval()
        else:
            hf = make_tiny(family)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in hf.named_parameters():
                if name.endswith("bias"):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                elif is_input(name):
                    parameter.mul_(size)
        return hf

    return made


def is_input(name):
    return any(
        part in name
        for part in (
            "gate_proj",
            "up_proj",
            "gate_up_proj",
            "c_fc",
            "fc1",
            "dense_h_to_4h",
            "w1.",
            "w3.",
        )
    )


def is_output(name):
    parts = ("down_proj", "mlp.c_proj", "dense_4h_to_h", "fc2", "w2.")
    return any(part in name for part in parts) and not name.endswith("bias")


def blocks_of(hf):
    base = hf.base_model
    base = getattr(base, "decoder", base)
    return base.h if hasattr(base, "h") else base.layers


@pytest.fixture
def saved(make, tmp_path):
    def go(family, **options):
        hf = make(family, **options)
        hf.save_pretrained(tmp_path / family)
        return hf, tmp_path / family

    return go


class OneNeuron:
    """A block's norm, FFN and norm as transformers runs them, with one neuron left of the FFN."""

    def __init__(self, family, block, found):
        norm, ffn, post = AROUND.get(family, USUAL)
        self.norm = nn.Identity() if norm is None else getattr(block, norm)
        self.ffn = self._opt(block) if ffn is None else getattr(block, ffn)
        self.post = nn.Identity() if post is None else getattr(block, post)
        self.dim = found.dim
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                if is_output(name):
                    self._keep(family, name, parameter, found)
                elif name.endswith("bias") and is_output(name.removesuffix("bias") + "weight"):
                    parameter.zero_()

    @staticmethod
    def _opt(block):
        return lambda x: block.fc2(block.activation_fn(block.fc1(x)))

    @staticmethod
    def _keep(family, name, parameter, found):
        mask = torch.zeros_like(parameter)
        shared = "shared" in name
        if found.expert is not None and parameter.ndim == 3:
            if found.expert != "shared":
                mask[int(found.expert), :, found.neuron] = 1.0
        elif found.expert is None or shared == (found.expert == "shared"):
            columns = mask.T if family == "gpt2" else mask
            columns[:, found.neuron] = 1.0
        parameter.mul_(mask)

    def write(self, x):
        """What the neuron writes into its dim, for residuals ``x``."""
        made = self.ffn(self.norm(x)[None])
        made = made[0] if isinstance(made, tuple) else made
        return self.post(made[0])

    def climb(self, steps=150):
        """Largest |write| that gradient ascent finds, from several starts."""
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        adam = torch.optim.Adam([x], lr=0.1)
        best = 0.0
        for _ in range(steps):
            write = self.write(x)[:, self.dim].abs()
            best = max(best, write.max().item())
            adam.zero_grad()
            (-write.sum()).backward()
            adam.step()
        return best


@pytest.mark.parametrize("family", [*TINY, *OTHERS])
def test_no_residual_makes_a_neuron_write_more_than_its_ceiling(family, saved):
    """Against transformers' own modules, one neuron left in them, by random inputs and ascent."""
    hf, folder = saved(family, size=30.0)
    found = scan(folder)
    assert found.covered
    opened = open_checkpoint(folder)
    plan = weights.plan_of(opened)
    top = weights.scan_layer(opened, plan, plan.layers[1], "cpu").highest[0]
    assert top.ceiling == found.profile[1].ceiling
    one = OneNeuron(family, blocks_of(hf)[1], top)
    sizes = 10.0 ** torch.linspace(-1, 3, 4000)[:, None]
    x = sizes * torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        write = one.write(x).abs()
    assert write.max().item() <= top.ceiling * 1.0001
    if found.profile[1].path != "after a norm":
        assert int(write.amax(0).argmax()) == top.dim
    reached = one.climb()
    assert reached <= top.ceiling * 1.0001
    # a router gives an expert less than all; biases leave a bound that is not quite reached
    close = 0.2 if family in ROUTED else 0.97 if family in BIASED else 0.99
    assert reached >= close * top.ceiling


@pytest.mark.parametrize("family", TINY)
def test_layouts_are_what_is_measured(family, make_tiny):
    """A row of the table says of its family what the measured anatomy finds."""
    model = make_tiny(family)
    layout = HF[model.config.model_type]
    for row in roles_of(model, probe_ids(model.config)):
        assert row.norms.get("ln2_post") == layout.post
        assert row.ffn_reads == layout.norm
        for path in filter(None, (row.ffn_reads, row.norms.get("ln2_post"))):
            found = row.found[path]
            assert (found.kind == "layer", found.offset) == (layout.layer_norm, layout.offset)


def test_a_family_without_a_layout_is_measured(saved_planted):
    folder, layer = saved_planted("BioGptForCausalLM")
    found = scan(folder)
    assert (found.me_layer, found.dims[0]) == (layer, 7)
    assert found.covered


def test_measured_layouts_give_what_the_table_gives(saved_planted, monkeypatch):
    """The same ceilings, found without the row of the table."""
    for name in ("LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "Phi3ForCausalLM"):
        folder, _ = saved_planted(name)
        known = scan(folder)
        with monkeypatch.context() as patched:
            patched.setattr("melens.scanning.predict.has_layout", lambda files: False)
            measured = scan(folder)
        for one, other in zip(known.profile, measured.profile, strict=True):
            assert other.ceiling == pytest.approx(one.ceiling, rel=1e-6)
            assert (other.neuron, other.dim, other.sign) == (one.neuron, one.dim, one.sign)


@pytest.fixture
def saved_planted(tmp_path):
    """Saves a family's tiny model with a massive token planted at layer 1."""

    def save(name):
        model = families.tiny(name)
        families.plant(model, 1, 7)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, 1

    return save


@pytest.mark.parametrize("family", [*TINY, *OTHERS])
def test_random_weights_predict_nothing(family, saved):
    found = scan(saved(family)[1])
    assert found.me_layer is found.erase_layer is None
    assert (found.dims, found.confidence, found.candidates) == ((), 0.0, ())
    assert max(row.ratio_to_median for row in found.profile) < STANDS_OUT
    assert "predict no ME Layer" in found.summary()


def profile(path, **options):
    found = scan(path, **options)
    return found.profile, found.me_layer, found.dims, found.candidates


def test_shards_and_one_file_say_the_same_and_half_precision_nearly(make, tmp_path):
    hf = make("llama")
    hf.save_pretrained(tmp_path / "one")
    hf.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert profile(tmp_path / "one") == profile(tmp_path / "many")
    hf.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = scan(tmp_path / "half")
    assert half.run.dtype == "BF16"
    for a, b in zip(scan(tmp_path / "one").profile, half.profile, strict=True):
        assert a.ceiling == pytest.approx(b.ceiling, rel=0.02)


def write_gguf(path, tensors, *, arch="llama", quantised=False):
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_tokenizer_model("none")
    for name, tensor in tensors.items():
        data = tensor.detach().float().contiguous().numpy()
        if quantised and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_gguf(hf, *, offset=0.0):
    """Names as llama.cpp gives them; its converter makes gains kept around zero whole."""
    names = {
        "post_attention_layernorm": "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    made = {}
    for layer, block in enumerate(hf.model.layers):
        gemma = hasattr(block, "pre_feedforward_layernorm")
        for name, value in names.items():
            if hasattr(block, name) and not (gemma and name == "post_attention_layernorm"):
                made[f"blk.{layer}.{value}.weight"] = getattr(block, name).weight + offset
        for part in ("gate", "up", "down"):
            matrix = getattr(block.mlp, f"{part}_proj").weight
            made[f"blk.{layer}.ffn_{part}.weight"] = matrix
    return made


@pytest.mark.parametrize(("family", "offset"), [("llama", 0.0), ("gemma3", 1.0)])
def test_a_gguf_says_what_its_safetensors_say(family, offset, saved, tmp_path):
    hf, folder = saved(family)
    write_gguf(tmp_path / "a.gguf", as_gguf(hf, offset=offset), arch=family)
    plain, whole = scan(tmp_path / "a.gguf"), scan(folder)
    for a, b in zip(plain.profile, whole.profile, strict=True):
        assert (a.neuron, a.dim, a.sign) == (b.neuron, b.dim, b.sign)
        assert a.ceiling == pytest.approx(b.ceiling, rel=1e-5)
    write_gguf(tmp_path / "b.gguf", as_gguf(hf, offset=offset), arch=family, quantised=True)
    blocks = scan(tmp_path / "b.gguf")
    assert (blocks.run.dtype, blocks.run.settings["format"]) == ("Q8_0", "gguf")
    for a, b in zip(blocks.profile, whole.profile, strict=True):
        assert a.ceiling == pytest.approx(b.ceiling, rel=0.02)


def test_experts_saved_apart_and_stacked_say_the_same(saved, tmp_path):
    """transformers splits Mixtral's experts when saving; a folder may hold them stacked too."""
    from safetensors.torch import save_file

    hf, folder = saved("mixtral")
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    (stacked / "config.json").write_text((folder / "config.json").read_text())
    state = {name: value.contiguous() for name, value in hf.state_dict().items()}
    assert any(value.ndim == 3 for value in state.values())
    save_file(state, stacked / "model.safetensors")
    names = set(open_checkpoint(folder).tensors)
    assert any("experts.0." in name for name in names) != any("experts.0." in n for n in state)
    assert profile(stacked) == profile(folder)
    experts = {c.row.expert for c in _layers(folder)}
    assert experts <= {"0", "1", "2", "3"}


def _layers(folder):
    opened = open_checkpoint(folder)
    plan = weights.plan_of(opened)
    return [weights.scan_layer(opened, plan, layer, "cpu") for layer in plan.layers]


def opt_folder(folder, **settings):
    """A tiny OPT of another build, saved."""
    from transformers import AutoModelForCausalLM

    config = opt()
    config.update(settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_block_without_a_bound_is_left_out_and_says_why(tmp_path):
    found = scan(opt_folder(tmp_path / "post", do_layer_norm_before=False))
    assert not found.covered
    assert "no norm bounds what the FFN reads" in found.profile[0].reason
    assert "nothing is said" in found.summary()
    assert WeightScan.from_json(found.to_json()) == found
    found.plot()
    # OPT-350M embeds in another width as well: the reason is said all the same
    width = {"word_embed_proj_dim": 16}
    assert not scan(opt_folder(tmp_path / "350", do_layer_norm_before=False, **width)).covered
    with pytest.raises(ModelError, match="embeds in another width"):
        scan(opt_folder(tmp_path / "width", **width))


def test_what_a_scan_leaves_out_is_listed(saved, tmp_path):
    _, folder = saved("qwen3-next")
    assert weights.HYBRID in scan(folder).leaves_out
    assert GGUF["qwen3next"].hybrid
    _, folder = saved("llama")
    assert scan(folder).leaves_out == weights.LEAVES_OUT


def test_a_hub_model_is_taken_from_the_cache_only_if_whole(saved, tmp_path, monkeypatch):
    """What is not there is fetched by range, from one commit; what is damaged is said."""
    import huggingface_hub
    from fsspec.implementations import dirfs

    _, folder = saved("llama")
    snapshot = tmp_path / "hub" / "c0ffee"
    shutil.copytree(folder, snapshot)
    kept = str(snapshot / "config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: kept)
    assert scan("some/model").run.model_revision == "c0ffee"
    data = (snapshot / "model.safetensors").read_bytes()
    (snapshot / "model.safetensors").write_bytes(data[:-8])
    with pytest.raises(WeightsError, match="truncated"):
        scan("some/model")
    (snapshot / "model.safetensors").unlink()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("MELENS_OFFLINE", raising=False)
    monkeypatch.setattr(dirfs, "DirFileSystem", lambda at, hub: Server(folder))
    commit = type("Info", (), {"sha": "beef"})()
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *a, **k: commit)
    found = scan("some/model", revision="main")
    assert found.run.model_revision == "beef"
    assert found.profile == scan(folder).profile


def test_a_scan_follows_the_hub_as_loading_does(saved, tmp_path, monkeypatch):
    """The commit that the hub names is looked for in the cache; out of reach, the cache decides."""
    import huggingface_hub

    _, folder = saved("llama")
    snapshot = tmp_path / "hub" / "c0ffee"
    shutil.copytree(folder, snapshot)
    asked = []

    def kept(name, file, revision=None):
        asked.append(revision)
        return str(snapshot / file)

    def unreachable(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", kept)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("MELENS_OFFLINE", raising=False)
    commit = type("Info", (), {"sha": "beef"})()
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *a, **k: commit)
    assert scan("some/model").run.model_revision == "beef"
    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    assert scan("some/model").run.model_revision == "c0ffee"
    assert asked == ["beef", None]
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(FetchError, match=r"the hub could not be read: no route"):
        scan("some/model")


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "single"),
        ("gpt2", "single"),
        ("qwen3", "multi-step"),
        ("gemma2", "gradual"),
        ("llama", "re-emergent"),
        ("llama", "none"),
        ("gpt2", "final-growth"),
    ],
)
def test_planted_layers_are_predicted(family, kind, tmp_path):
    made = plant(family, kind, 3)
    made.model.save_pretrained(tmp_path)
    found = scan(tmp_path)
    assert found.me_layer == made.truth.me_layer
    if found.me_layer is not None:
        assert found.dims[0] == made.truth.dim
        assert found.erase_layer is None
        roles = {c.layer: c.role for c in found.candidates if c.dim == made.truth.dim}
        erased = {made.truth.erased_at} - {None}
        assert {layer for layer, role in roles.items() if role == "erase"} <= erased
        assert roles[found.me_layer] == "emerge"
        best = next(c for c in found.candidates if c.layer == found.me_layer)
        assert best.at == (best.layer, best.dim, best.neuron)


def test_gains_and_biases_count(make, tmp_path):
    """A gain of 3 makes a gated ceiling 9 times as high, a plain one 3 times."""
    for family, times in (("llama", 9.0), ("gpt2", 3.0)):
        hf = make(family)
        for name, parameter in hf.named_parameters():
            if name.endswith("bias"):
                parameter.data.zero_()
        hf.save_pretrained(tmp_path / "a")
        norm = "ln_2.weight" if family == "gpt2" else "post_attention_layernorm.weight"
        for name, parameter in hf.named_parameters():
            if name.endswith(norm):
                parameter.data.mul_(3.0)
        hf.save_pretrained(tmp_path / "b")
        for a, b in zip(scan(tmp_path / "a").profile, scan(tmp_path / "b").profile, strict=True):
            assert b.ceiling == pytest.approx(times * a.ceiling, rel=1e-5)


def test_rows_that_are_nearly_all_mean_keep_their_bound(saved):
    """LayerNorm takes the mean off a row: in float32 sums what is left would be lost."""
    _, folder = saved("phi")
    generator = torch.Generator().manual_seed(4)
    name, bias, norm = (
        "model.layers.1.mlp.fc1.weight",
        "model.layers.1.mlp.fc1.bias",
        "model.layers.1.input_layernorm",
    )
    kept = {}

    def change(tensors):
        noise = torch.randn(tensors[name].shape, generator=generator)
        tensors[name] = 100 + 0.1 * noise
        tensors[bias].zero_()
        tensors[f"{norm}.weight"].fill_(1.0)
        tensors[f"{norm}.bias"].zero_()
        kept.update(tensors)

    edit(folder, change)
    found = scan(folder).profile[1]
    rows = kept[name].double()
    sizes = (rows - rows.mean(1, keepdim=True)).norm(dim=1)
    down = kept["model.layers.1.mlp.fc2.weight"].double().abs().amax(0)
    assert found.ceiling == pytest.approx((32**0.5 * sizes * down).max().item(), rel=1e-6)


@pytest.mark.parametrize("dead", [40, 64])
def test_dead_neurons_are_left_out_of_the_median(saved, dead):
    """A pruned layer: half of it writes nothing, which says nothing of the rest."""
    _, folder = saved("llama")
    whole = scan(folder).profile[1]
    order = torch.arange(64)
    order = torch.cat([order[order == whole.neuron], order[order != whole.neuron]])

    def change(tensors):
        tensors[DOWN][:, order[64 - dead :]] = 0.0

    edit(folder, change)
    found = scan(folder).profile[1]
    if dead == 64:
        assert (found.ceiling, found.median, found.ratio_to_median) == (0.0, 0.0, 0.0)
        return
    assert found.ceiling == whole.ceiling
    assert found.ratio_to_median == pytest.approx(whole.ratio_to_median, rel=0.3)
    assert found.ratio_to_median > 1


def edit(folder, change):
    """Rewrite a folder's only weight file."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


DOWN, GATE = "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.gate_proj.weight"


def test_damaged_weights_are_one_clear_line(saved):
    _, folder = saved("llama")
    whole = (folder / "model.safetensors").read_bytes()
    cases = [
        (lambda t: t[DOWN].__setitem__((3, 5), torch.nan), rf"{DOWN} in model.* holds NaN"),
        (lambda t: t[GATE].__setitem__((3, 5), torch.inf), rf"{GATE} in model.* holds NaN or Inf"),
        (lambda t: t.update({DOWN: t[DOWN].T.contiguous()}), r"shape \[64, 32\]; .*\[32, 64\]"),
        (lambda t: t.pop(GATE), rf"lacks 1 tensor.*, first {GATE}; fetch"),
        (lambda t: t.update({DOWN: t[DOWN].to(torch.int8)}), "stored as I8, which .* cannot"),
    ]
    for change, says in cases:
        edit(folder, change)
        with pytest.raises(WeightsError, match=says):
            scan(folder)
        (folder / "model.safetensors").write_bytes(whole)
    for change in (
        lambda t: [t.pop(n) for n in list(t) if "layers.1.mlp" in n],
        lambda t: t.pop("model.layers.1.post_attention_layernorm.weight"),
    ):
        edit(folder, change)
        with pytest.raises(WeightsError, match=r"lacks \d tensor.*first model\.layers\.1\.[mp]"):
            scan(folder)
        (folder / "model.safetensors").write_bytes(whole)
    (folder / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(WeightsError, match="truncated"):
        scan(folder)


def test_a_wrong_index_is_one_clear_line(make, tmp_path):
    make("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    wrong = next(file for file in shards if file != index["weight_map"][DOWN])
    moved = {**index["weight_map"], DOWN: wrong}
    path.write_text(json.dumps({**index, "weight_map": moved}))
    with pytest.raises(WeightsError, match=rf"says that {wrong} holds {DOWN}"):
        scan(tmp_path)
    path.write_text(json.dumps(index))
    whole = scan(tmp_path)
    del moved[DOWN]  # the files hold it, and transformers takes what they hold
    path.write_text(json.dumps({**index, "weight_map": moved}))
    assert scan(tmp_path).profile == whole.profile
    path.write_text(json.dumps(index))
    (tmp_path / shards[0]).unlink()
    with pytest.raises(WeightsError, match=f"{shards[0]} is missing"):
        scan(tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"hidden_act": "relu2"}, "relu2 behind a gate, for which melens has no bound"),
        ({"quantization_config": {"bits": 4}}, "has a quantization_config"),
        ({"num_hidden_layers": None}, "config.json does not make a model"),
        ({"model_type": "t5"}, "no causal decoder"),
    ],
)
def test_models_that_cannot_be_scanned_are_refused(settings, says, saved):
    _, folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(ModelError, match=says):
        scan(folder)


def test_names_that_are_no_model(tmp_path):
    for name, says in (
        ("./nowhere", "no file or folder"),
        ("smollm2-135", "Did you mean"),
        (" ", "is empty"),
        ("", "is empty"),
        (str(tmp_path), r"no config\.json"),
    ):
        with pytest.raises(ModelNotFoundError, match=says):
            scan(name)
    with pytest.raises(ModelError, match="reads files, and got a Linear; give a path or a name"):
        open_checkpoint(nn.Linear(2, 2))
    with pytest.raises(FetchError, match="offline was asked for"):
        scan("nobody/nothing-at-all")
    with pytest.raises(ModelError, match="cannot be used"):
        scan(tmp_path, device="cuda:99")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"no \.gguf"):
        scan(tmp_path / "weights.bin")
    (tmp_path / "bad.gguf").write_bytes(b"GGUFxxxx")
    with pytest.raises(WeightsError, match="corrupt or truncated"):
        scan(tmp_path / "bad.gguf")


class Server(DirFileSystem):
    """A folder behind the interface that the hub's file system has; counts what is read."""

    cachable = False

    def __init__(self, folder, cut=0):
        super().__init__(str(folder), LocalFileSystem())
        self.cut, self.sent = cut, 0

    def open(self, path, *args, **kwargs):
        file, server = super().open(path, *args, **kwargs), self

        class Counted:
            seek, close = file.seek, file.close

            def readinto(self, view):
                if server.cut and len(view) > 8:
                    return 0
                got = file.readinto(view)
                server.sent += got
                return got

        return Counted()


def test_a_hub_id_is_read_by_range_and_only_what_is_needed(make, tmp_path, monkeypatch):
    hf = make("llama")
    hf.save_pretrained(tmp_path / "one")
    hf.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    local = scan(tmp_path / "one")
    monkeypatch.setattr(checkpoint, "EDGE", 100)
    sizes = {name: 4 * value.numel() for name, value in hf.state_dict().items()}
    needed = sum(n for name, n in sizes.items() if "mlp" in name or "post_attention" in name)
    again = sum(n for name, n in sizes.items() if "down_proj" in name) + 3 * HIGHEST * 2 * 32 * 4
    for folder in ("one", "many"):
        server = Server(tmp_path / folder)
        monkeypatch.setattr(
            weights,
            "open_checkpoint",
            lambda model, revision, server=server: by_range(model, revision, server),
        )
        found = scan("some/model", revision="main")
        assert (found.profile, found.run.model) == (local.profile, "some/model")
        assert found.run.model_revision == "main"
        paths = list((tmp_path / folder).glob("*.safetensors"))
        headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in paths)
        fixed = headers + len(paths) * checkpoint.EDGE  # the end is hashed
        assert fixed + needed <= server.sent <= fixed + needed + again
        assert server.sent < sum(path.stat().st_size for path in paths)
    with pytest.raises(FetchError, match=r"model\.safetensors ends inside its header"):
        by_range("some/model", None, Server(tmp_path / "one", cut=3))


def test_an_interrupted_scan_goes_on_where_it_was(saved, tmp_path, monkeypatch):
    _, folder = saved("llama")
    whole = scan(folder)
    keep = tmp_path / "layers.jsonl"
    done = []

    def stop(at, total):
        if at == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(folder, keep=keep, progress=stop)
    real = weights.scan_layer
    monkeypatch.setattr(
        weights, "scan_layer", lambda *args: done.append(args[2].layer) or real(*args)
    )
    ticks = []
    found = scan(folder, keep=keep, progress=lambda *at: ticks.append(at))
    assert done == [2]
    assert ticks == [(1, 3), (2, 3), (3, 3)]
    assert found.model_copy(update={"run": whole.run}) == whole
    keep.write_text(keep.read_text()[:-20])  # torn by a kill
    done.clear()
    assert scan(folder, keep=keep).profile == whole.profile
    assert done == [2]
    done.clear()
    assert scan(folder, keep=keep).profile == whole.profile  # what was torn is whole again
    assert done == []
    with monkeypatch.context() as other:
        other.setattr(weights, "__version__", "0.0.0")
        assert scan(folder, keep=tmp_path / "other").profile == whole.profile
    done.clear()
    assert scan(folder, keep=tmp_path / "other").profile == whole.profile
    assert done == [0, 1, 2]
    done.clear()
    assert scan(folder, keep=keep).profile == whole.profile
    assert done == []
    edit(folder, lambda t: t[DOWN].mul_(2.0))
    done.clear()
    assert scan(folder, keep=keep).profile[1].ceiling == pytest.approx(2 * whole.profile[1].ceiling)
    assert done == [0, 1, 2]


def test_a_scan_gives_the_threads_back(saved, monkeypatch):
    _, folder = saved("llama")
    real, seen = weights.scan_layer, []
    monkeypatch.setattr(
        weights, "scan_layer", lambda *args: seen.append(torch.get_num_threads()) or real(*args)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        scan(folder)
        edit(folder, lambda t: t[DOWN].mul_(torch.nan))
        with pytest.raises(WeightsError):
            scan(folder)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


def test_the_command_writes_its_files_and_says_one_sentence(tmp_path, capsys):
    made = plant("llama", "single", 3)
    made.model.save_pretrained(tmp_path / "model")

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code or 0, capsys.readouterr()

    out = tmp_path / "out"
    code, said = run("scan", tmp_path / "model", "-o", out)
    assert code == 0
    assert f"predict ME Layer {made.truth.me_layer} of" in said.out.splitlines()[-1]
    assert {file.name for file in out.iterdir()} == {"scan.json", "scan.png", "scan.svg"}
    result = load_result(out / "scan.json")
    assert {
        "kind",
        "schema",
        "me_layer",
        "erase_layer",
        "dims",
        "candidates",
        "profile",
        "covered",
        "run",
    } <= set(result.to_dict())
    code, said = run("plot", out / "scan.json", "-o", out / "again.svg")
    assert (out / "again.svg").read_bytes() == (out / "scan.svg").read_bytes()
    code, said = run("scan", tmp_path / "model", "--json")
    again = WeightScan.from_json(said.out)
    assert again.model_copy(update={"run": result.run}) == result
    code, said = run("scan", tmp_path / "model", "--no-reach", "--json")
    update = {"run": result.run, "seen": None}
    assert WeightScan.from_json(said.out).model_copy(update=update) == (
        result.model_copy(update=update)
    )
    assert "seen" not in json.loads(said.out)
    code, said = run("scan", tmp_path / "model")
    assert "x own median" in said.out
    assert "of 17 first tokens tried, 1 reaches it" in said.out.splitlines()[-1]
    code, said = run("scan", tmp_path / "nowhere")
    assert code == 2
    assert len(said.err.strip().splitlines()) == 1


def test_a_scan_is_held_against_published_numbers(saved, capsys, tmp_path):
    folder = saved("llama")[1]
    found, row = scan(folder), published_rows("meta-llama/Llama-2-7b-hf")[0]
    fake, one = found.profile[0], _layers(folder)[0].highest[0]
    made = [
        one.model_copy(update={"layer": at, "dim": dim, "neuron": neuron})
        for at, dim, neuron in row["super_weights"]
    ]
    right = found.model_copy(
        update={
            "n_layers": 32,
            "d_model": 4096,
            "me_layer": row["me_layer"],
            "erase_layer": row["erase_layer"],
            "dims": tuple(map(int, row["dims"])),
            "candidates": tuple(made),
            "profile": tuple(fake.model_copy(update={"layer": layer}) for layer in range(32)),
        }
    )
    assert known_scan("Llama-2-7b-hf", right).verdict == "match"
    for update, what in (
        ({"me_layer": 2}, "ME Layer"),
        ({"dims": right.dims[:1]}, f"dimension {right.dims[1]}"),
        ({"erase_layer": None}, "erase layer"),
        ({"candidates": ()}, "down_proj entry"),
    ):
        check = known_scan("Llama-2-7b-hf", right.model_copy(update=update))
        bad = [item.what for item in check.comparisons if item.verdict == "mismatch"]
        assert check.verdict == "mismatch"
        assert len(bad) == 1
        assert bad[0].startswith(what)
    assert known_scan("Llama-2-7b", right).meant == "Llama-2-7b-hf"
    (tmp_path / "scan.json").write_text(right.to_json())
    with pytest.raises(SystemExit) as ended:
        main(["known", "Llama-2-7b-hf", str(tmp_path / "scan.json")])
    assert not ended.value.code
    assert "Llama-2-7b-hf: match" in capsys.readouterr().out


def test_a_sign_that_is_not_known_is_not_said(saved):
    from melens.cli.tables.weights import _candidate

    one = _layers(saved("llama")[1])[0].highest[0]
    for cosine, role, said in (
        (0.1, "emerge", "may make"),
        (0.9, "emerge", "makes"),
        (None, "erase", "erases"),
        (-0.2, "erase", "may erase"),
    ):
        found = one.model_copy(update={"cosine": cosine, "role": role})
        assert _candidate(found)[""] == said


def test_a_result_that_no_scan_made_is_refused(saved):
    data = scan(saved("llama")[1]).to_dict()
    for change, says in (
        ({"me_layer": 1}, "comes with its dimensions"),
        ({"erase_layer": 1}, "comes after an ME Layer"),
        ({"covered": False}, "what the profile says"),
        ({"n_layers": 4}, "one row a layer"),
    ):
        with pytest.raises(ResultError, match=says):
            WeightScan.from_json(json.dumps({**data, **change}))


@pytest.mark.weights
def test_smollm2():
    """definitions.md, section 8: the neurons that the running model uses, found without running."""
    found = scan("smollm2-135m")
    assert (found.me_layer, found.erase_layer, found.dims) == (11, 28, (507,))
    assert (found.allowed.neuron, found.allowed.highest_layer) == (1229, 11)
    assert (found.seen.reached, len(found.seen.tokens), found.seen.farthest.dim) == (17, 17, 507)
    assert 19_000 < found.seen.farthest.value < 27_000
    highest = {(c.layer, c.neuron): c for c in found.candidates if c.dim == 507}
    for at, ceiling, ratio in (
        ((28, 678), 3.4e5, 853),
        ((11, 1229), 5.1e4, 181),
        ((2, 90), 1.7e4, 104),
        ((9, 200), 1.0e4, 43),
    ):
        assert highest[at].ceiling == pytest.approx(ceiling, rel=0.04)
        assert highest[at].ratio_to_median == pytest.approx(ratio, rel=0.02)
    roles = {at: c.role for at, c in highest.items()}
    assert [roles[at] for at in ((11, 1229), (28, 678), (9, 200), (2, 430))] == [
        "emerge",
        "erase",
        "erase",
        "emerge",
    ]


@pytest.mark.gemma
def test_gemma3():
    found = scan("gemma3-270m")
    assert (found.me_layer, found.dims) == (3, (163, 400))
    assert (found.seen.reached, found.seen.farthest.why) == (17, "bos")
    assert [row.dim for row in found.profile] == [400] * 3 + [163] * 15
    ceilings = [row.ceiling for row in found.profile[:6]]
    assert ceilings == pytest.approx([2840, 2518, 2208, 10259, 13197, 15464], rel=1e-3)
