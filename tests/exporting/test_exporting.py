"""Exports: the folder, the constant prefix and the PEFT adapter do what the hook does."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from melens import exporting
from melens.batches import Batch
from melens.errors import InterventionError, ModelError, OutputError, PromptError, ResultError
from melens.exporting import export, for_call, for_generate, load_prefix, read_edit
from melens.exporting.prefix import fixed_first
from melens.exporting.subject import subject_of
from melens.inputs import Inputs
from melens.interventions import wemask
from melens.measuring.located import check_same_model
from melens.models import fingerprint, load
from melens.results import load_result
from melens.results.edit import Edit, EditFile

# PEFT asks transformers for this by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

EDIT = Edit(rate=0.5, select="product", layers=(1, 2))
MASK = {"rate": 0.5, "select": "product", "layers": (1, 2)}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
FAMILIES = ["llama", "qwen3", "mistral", "gemma3", "gpt2", "phi3"]
FIRST = 1
DOCS = Path(__file__).parents[2] / "docs"
LENGTHS = (11, 6, 9)


@pytest.fixture
def rows():
    rng = torch.Generator().manual_seed(3)
    return [[FIRST, *torch.randint(3, 64, (n - 1,), generator=rng).tolist()] for n in LENGTHS]


@pytest.fixture
def family(make_tiny, tmp_path):
    """A plain model of a family, and a function that exports it with what else is needed."""

    def make(name, **options):
        hf = make_tiny(name)
        if name == "gemma3":
            assert hf.config.head_dim * hf.config.num_attention_heads == 32  # the tiny one
        if name in ("mistral", "gemma3"):
            hf.config.sliding_window = 8
        folder = export(
            hf, EDIT, out=tmp_path / f"{name}-{options['format']}", first_token=FIRST, **options
        )
        return hf, folder

    return make


def real(logits, batch):
    """Logits after the first token, padding dropped, row by row."""
    return [row[mask][1:] for row, mask in zip(logits, batch.mask, strict=True)]


def hook(hf, batch):
    """Logits under the hook; positions as generate() gives them."""
    with torch.no_grad(), wemask(hf, **MASK):
        return hf(
            batch.ids, attention_mask=batch.mask.long(), position_ids=batch.positions.clamp_min(0)
        ).logits


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_prefix_gives_the_hooks_logits(name, side, family, rows):
    hf, folder = family(name, format="prefix")
    sliding = name in ("mistral", "gemma3")
    if sliding and side == "left":  # padding counts in a window: kept within it, as documented
        rows = [row[:7] for row in rows]
    batch = Batch.pad(rows, side=side)
    wanted = real(hook(hf, batch), batch)
    call = for_call(batch.ids, batch.mask)
    with torch.no_grad():
        found = hf(**call, past_key_values=load_prefix(folder, hf, batch=len(rows))).logits
        clean = hf(batch.ids, attention_mask=batch.mask.long()).logits
    kept = call["attention_mask"][:, 1:].bool()
    for want, row, keep in zip(wanted, found, kept, strict=True):
        torch.testing.assert_close(row[keep], want, **CLOSE)
    assert (clean - hook(hf, batch)).abs().max() > 1e-2  # the edit does something


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_peft_program_gives_the_hooks_logits(name, side, family, rows):
    hf, folder = family(name, format="peft")
    if name in ("mistral", "gemma3") and side == "left":
        rows = [row[:7] for row in rows]
    batch = Batch.pad(rows, side=side)
    wanted = real(hook(hf, batch), batch)
    rest = Batch.pad([row[1:] for row in rows], side=side)
    adapted = PeftModel.from_pretrained(hf, folder)
    with torch.no_grad():
        found = adapted(
            rest.ids, attention_mask=rest.mask.long(), position_ids=rest.positions.clamp_min(0)
        ).logits
    for want, row, mask in zip(wanted, found, rest.mask, strict=True):
        torch.testing.assert_close(row[mask], want, **CLOSE)
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "melens.json",
    }


def test_a_second_first_token_is_refused(family):
    """A chat template and a tokenizer that both put BOS; the prefix stands for one of them."""
    facts = read_edit(family("llama", format="prefix")[1]).prefix
    ids = torch.tensor([[FIRST, 5, 9], [0, FIRST, FIRST]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    for inputs in (for_call, for_generate):
        with pytest.raises(PromptError, match=r"row 1 begins with token 1 twice.*add_special"):
            inputs(ids, mask)
        with pytest.raises(PromptError, match="row 0 begins with token 5, the prefix stands for 1"):
            inputs(ids[:1, 1:], prefix=facts)
        inputs(torch.tensor([[FIRST, 5, FIRST]]), prefix=facts)


GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_gives_the_same_tokens_with_hook_prefix_and_adapter(name, family, rows):
    if name in ("mistral", "gemma3"):
        rows = [rows[0], rows[0][:1] + rows[0][:0:-1]]  # no padding, longer than the window
    batch = Batch.pad(rows, side="left")
    hf, folder = family(name, format="prefix")
    width, mask = batch.ids.shape[1], batch.mask.long()
    with wemask(hf, **MASK):
        wanted = hf.generate(batch.ids, attention_mask=mask, **GREEDY)[:, width:]
    inputs = for_generate(batch.ids, batch.mask)
    cache = load_prefix(folder, hf, batch=len(rows))
    found = hf.generate(**inputs, past_key_values=cache, **GREEDY)[:, width:]
    assert torch.equal(found, wanted)
    _, folder = family(name, format="peft")
    rest = Batch.pad([row[1:] for row in rows], side="left")
    adapted = PeftModel.from_pretrained(hf, folder)
    found = adapted.generate(input_ids=rest.ids, attention_mask=rest.mask.long(), **GREEDY)
    found = found[:, rest.ids.shape[1] :]
    assert torch.equal(found, wanted)


def test_the_token_leaves_a_sliding_window_as_it_would(family, rows):
    """Independent: the whole run with the hook, three windows long, in Gemma-3's mixed layers."""
    hf, folder = family("gemma3", format="prefix")
    kinds = hf.config.layer_types
    assert "sliding_attention" in kinds
    ids = torch.tensor([[FIRST, *range(3, 30)]])
    batch = Batch.of(ids)
    with torch.no_grad():
        found = hf(ids[:, 1:], past_key_values=load_prefix(folder, hf)).logits
    torch.testing.assert_close(found, hook(hf, batch)[:, 1:], **CLOSE)


def test_heads_wider_than_the_model(make_tiny, tmp_path):
    """Gemma-3's heads: head_dim is not d_model / heads; PEFT must read it from the config."""
    from transformers import Gemma3ForCausalLM

    torch.manual_seed(0)
    config = make_tiny("gemma3").config
    config.head_dim = 16
    hf = Gemma3ForCausalLM(config).eval()
    folder = export(hf, EDIT, format="peft", out=tmp_path / "a", first_token=FIRST)
    row = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    assert row.shape == (1, 3 * 2 * 2 * 16)
    ids = torch.tensor([[FIRST, 5, 6, 7, 8]])
    wanted = hook(hf, Batch.of(ids))[:, 1:]
    with torch.no_grad():
        found = PeftModel.from_pretrained(hf, folder)(ids[:, 1:]).logits
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_the_embedding_row_is_keys_then_values(family):
    """Closed form: layer 0 is not edited, so its key and value are the unedited token's."""
    hf, folder = family("llama", format="peft")
    row = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    with torch.no_grad():
        cache = hf(torch.tensor([[FIRST]]), use_cache=True).past_key_values
    first = torch.stack([cache.layers[0].keys[0, :, 0], cache.layers[0].values[0, :, 0]])
    torch.testing.assert_close(row.reshape(3, 2, 2, 8)[0], first)


def test_what_is_no_constant_prefix_is_refused(make_tiny, tmp_path, tokenizer):
    hf = make_tiny("llama")
    options = {"out": tmp_path / "a", "first_token": FIRST}
    with pytest.raises(InterventionError, match=r"drop-key hides .* no constant prefix"):
        export(hf, Edit(name="drop-key", layers=(1,)), format="prefix", **options)
    with pytest.raises(InterventionError, match=r"layers of linear_attention"):
        export(make_tiny("qwen3-next"), Edit(layers=(1,)), format="prefix", **options)
    with pytest.raises(InterventionError, match=r"format must be one of hf, prefix, peft"):
        export(hf, EDIT, format="onnx", **options)
    with pytest.raises(InterventionError, match=r"first_token belongs to"):
        export(hf, EDIT, **options)
    with pytest.raises(InterventionError, match=r"pass what melens.locate returns"):
        export(hf, Edit(), format="prefix", **options)
    with pytest.raises(PromptError, match=r"outside the vocabulary|no tokenizer"):
        export(hf, EDIT, format="prefix", out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_layers_of_different_heads_have_no_adapter(make_tiny):
    from melens.exporting.prefix import Prefix, row_of

    two, one = torch.zeros(2, 1, 8), torch.zeros(1, 1, 8)
    with pytest.raises(InterventionError, match=r"of one shape in all layers.*format='prefix'"):
        row_of(Prefix(1, [two, one], [two, one]))


def test_a_model_without_keys_and_values_has_no_prefix():
    import families

    from melens.exporting.prefix import constant_prefix

    with pytest.raises(InterventionError, match=r"keeps no keys and values of a token"):
        constant_prefix(families.tiny("RwkvForCausalLM"), Edit(name="none"), None, 1)


def test_a_config_that_says_heads_layer_by_layer_has_no_adapter():
    import families

    from melens.exporting.prefix import Prefix, check_like_peft

    keys = [torch.zeros(2, 1, 8)]
    with pytest.raises(InterventionError, match=r"heads of its own in every layer"):
        check_like_peft(families.tiny("Gemma4ForCausalLM"), Prefix(1, keys, keys))


def test_which_token_comes_first(tokenizer):
    import copy

    assert fixed_first(tokenizer, "w7") == 7
    assert fixed_first(tokenizer, 9) == 9
    with pytest.raises(PromptError, match=r"no fixed token first.*--first-token"):
        fixed_first(tokenizer)
    with pytest.raises(PromptError, match=r"'w7 w8' is 2 tokens"):
        fixed_first(tokenizer, "w7 w8")
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "w5 {{ messages[0]['content'] }}"
    assert fixed_first(chat) == 5
    from tokenizers import processors

    chat._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    with pytest.raises(PromptError, match=r"BOS starts with '<s>' and the chat template .*'w5'"):
        fixed_first(chat)


@pytest.fixture
def saved(make_tiny, tokenizer, tmp_path):
    """A tiny model's folder, and a plain model that was read from it."""
    folder = tmp_path / "base"
    make_tiny("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_exported_folder_is_a_model_and_its_edit_comes_back(saved, tmp_path, ids):
    folder = export(saved, EDIT, out=tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(saved)
    for name, value in base.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert load_result(folder / "melens.json") == read_edit(folder)
    bridge = exporting.load(folder)
    clean = load(folder)
    with torch.no_grad(), wemask(clean, **MASK):
        wanted = clean(ids, return_type="logits")
    with torch.no_grad():
        assert torch.equal(bridge(ids, return_type="logits"), wanted)
        bridge.melens_edit.close()
        bridge.melens_edit.close()
        assert torch.equal(bridge(ids, return_type="logits"), clean(ids, return_type="logits"))
    exporting.load(folder).melens_edit.close()  # never used: no error


def test_a_located_mask_comes_back_in_another_dtype(tokenizer, tmp_path):
    """Its weights are compared with the probe, not against those of the dtype it was located in."""
    from planted import batch, plant

    from melens import locate

    planted = plant("llama", "single", 1)
    planted.model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    me = locate(load(tmp_path / "base", device="cpu"), [Batch.of(batch(planted))])
    edit = Edit(name="wemask", select="activation", rate=0.5)
    folder = export(tmp_path / "base", edit, me_layer=me, out=tmp_path / "out")
    bridge = exporting.load(folder, device="cpu", dtype="bfloat16")
    assert bridge.melens_edit.active
    bridge.melens_edit.close()
    half = load(folder, device="cpu", dtype="bfloat16")
    other = Inputs(half, [], {}, fingerprint(half))
    with pytest.raises(ResultError, match="locate it again"):
        check_same_model(other, me)
    with pytest.raises(ResultError, match="locate it again"):
        subject_of(half, me)
    for ask in (  # whoever asks: a measurement, an export, a command
        lambda: check_same_model(Inputs(bridge, [], {}, fingerprint(bridge)), me),
        lambda: subject_of(bridge, me),
        lambda: _job(folder).me_layer(half, None),
        lambda: check_same_model(other, me),
    ):
        ask()


def _job(folder):
    from melens.cli.commands.export import EditJob
    from melens.cli.job import Job
    from melens.cli.options import RunOptions

    return EditJob(Job(str(folder), RunOptions()), Edit(name="wemask"))


def test_a_model_with_an_open_edit_is_collected_in_silence(saved, tmp_path, monkeypatch):
    lost = []
    monkeypatch.setattr("sys.unraisablehook", lost.append)
    exporting.load(export(saved, EDIT, out=tmp_path / "out"))
    gc.collect()
    assert not [item.exc_value for item in lost]


def test_other_weights_than_the_exported_are_refused(saved, make_tiny, tmp_path):
    folder = export(saved, EDIT, out=tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"] *= 3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResultError, match=r"was exported from other weights"):
        exporting.load(folder)
    prefix = export(saved, EDIT, format="prefix", out=tmp_path / "p", first_token=FIRST)
    with pytest.raises(ResultError, match=r"was exported from other weights"):
        load_prefix(prefix, make_tiny("llama", seed=5))
    with pytest.raises(ResultError, match=r"is a prefix export, no model; load it with"):
        exporting.load(prefix)
    text = json.loads((folder / "melens.json").read_text())
    (folder / "melens.json").write_text(json.dumps({**text, "schema": "melens/edit/9"}))
    with pytest.raises(ResultError, match=r"has schema 'melens/edit/9'"):
        exporting.load(folder)
    text["edit"]["rate"] = 7
    (folder / "melens.json").write_text(json.dumps(text))
    with pytest.raises(ResultError, match=r"edit.rate: .*less than or equal to 1"):
        exporting.load(folder)


def test_a_bridge_is_exported_from_its_folder_or_refused(saved, make_tiny, tokenizer, tmp_path):
    bridge = load(saved)
    folder = export(bridge, EDIT, out=tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(folder)
    made = load(make_tiny("llama"), tokenizer=tokenizer)
    with pytest.raises(ModelError, match=r"a bridged model cannot be saved, .* give the model's"):
        export(made, EDIT, out=tmp_path / "b")
    prefix = export(made, EDIT, format="prefix", out=tmp_path / "c", first_token=FIRST)
    plain = export(make_tiny("llama"), EDIT, format="prefix", out=tmp_path / "d", first_token=FIRST)
    one, other = load_file(prefix / "prefix.safetensors"), load_file(plain / "prefix.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        bridge.original_model.model.layers[0].mlp.down_proj.weight.mul_(5)
    with pytest.raises(ResultError, match=r"exported from other weights"):
        export(bridge, EDIT, out=tmp_path / "e")


def test_a_folder_is_whole_or_not_there(saved, tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(
        ResultError, match=r"holds notes.txt, which no earlier export wrote"
    ) as caught:
        export(saved, EDIT, out=taken)
    assert caught.value.exit_code == 2
    first = export(saved, EDIT, out=tmp_path / "out", format="prefix", first_token=FIRST)
    before = (first / "melens.json").read_bytes()

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("melens.exporting.folder.write_prefix", full)
    with pytest.raises(OutputError, match=r"cannot write .*: No space left on device\.") as caught:
        export(saved, EDIT, out=tmp_path / "out", format="prefix", first_token=FIRST)
    assert caught.value.exit_code == 3
    assert (first / "melens.json").read_bytes() == before
    monkeypatch.undo()
    export(saved, Edit(rate=0.25, layers=(1,)), out=first)  # an earlier export is replaced
    assert read_edit(first).format == "hf"
    assert not (first / "prefix.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    (first / "mine.txt").write_text("mine")
    with pytest.raises(ResultError, match=r"holds mine.txt, which no earlier export wrote"):
        export(saved, EDIT, out=first)
    assert (first / "mine.txt").read_text() == "mine"


def test_the_record_can_be_read_again(saved, tmp_path):
    folder = export(saved, EDIT, format="peft", out=tmp_path / "a", first_token="w9")
    found = read_edit(folder)
    assert EditFile.from_json(found.to_json()) == found
    assert found.prefix.token == "w9"
    assert found.prefix.logit_difference < 1e-5
    assert str(tmp_path) not in (folder / "adapter_config.json").read_text()
    shutil.rmtree(folder)


@pytest.mark.weights
def test_smollm2_prefix_and_adapter(smol, tmp_path):
    """The case of the paper notes: gamma, rate 0.5, all later layers, located."""
    rows = ["The first text is this one", "Another", "Numbers: 1, 2, 3 and some more of them"]
    first = smol.tokenizer.bos_token_id
    tokens = [[first, *smol.tokenizer(text)["input_ids"]] for text in rows]
    me_layer = load_result(DOCS / "results" / "smollm2-135m-bos.locate.json")
    edit = Edit()
    folder = export(smol, edit, format="prefix", out=tmp_path / "p", me_layer=me_layer)
    adapter = export(smol, edit, format="peft", out=tmp_path / "a", me_layer=me_layer)
    assert read_edit(folder).prefix.token_id == first
    hf = AutoModelForCausalLM.from_pretrained(smol.original_model.config._name_or_path)
    batch = Batch.pad(tokens, pad_id=first, side="left")
    positions = batch.positions.clamp_min(0)
    mask = batch.mask.long()
    with torch.no_grad(), wemask(hf, me_layer, rate=0.5) as record:
        wanted = hf(batch.ids, attention_mask=mask, position_ids=positions).logits
        text = hf.generate(batch.ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert record.mean_energy > 0.1
    call = for_call(batch.ids, batch.mask)
    with torch.no_grad():
        found = hf(**call, past_key_values=load_prefix(folder, hf, batch=3)).logits
        clean = hf(batch.ids, attention_mask=mask, position_ids=positions).logits
    for i, row in enumerate(tokens):
        n = len(row) - 1
        torch.testing.assert_close(found[i, -n:], wanted[i, -n:], rtol=1e-4, atol=1e-4)
    assert (clean[0] - wanted[0]).abs().max() > 1
    made = hf.generate(
        **for_generate(batch.ids, batch.mask),
        past_key_values=load_prefix(folder, hf, batch=3),
        max_new_tokens=8,
        do_sample=False,
    )
    assert torch.equal(made[:, -8:], text[:, -8:])
    rest = torch.tensor([tokens[2][1:]])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(hf, adapter)(rest).logits
    torch.testing.assert_close(adapted[0], wanted[2, 1:], rtol=1e-4, atol=1e-4)
