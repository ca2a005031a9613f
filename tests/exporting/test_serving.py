"""Engines of transformers beside a plain cached run: the same tokens, or a refusal by name."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.utils.import_utils import is_serve_available

from melens import exporting
from melens.batches import Batch
from melens.errors import InterventionError, ResultError
from melens.exporting import (
    bake,
    export,
    for_call,
    for_generate,
    load_prefix,
    open_edit,
    read_edit,
)
from melens.interventions import ffn_ablate_neurons, wemask
from melens.results.baked import weight_edits
from melens.results.edit import Edit

# PEFT asks transformers for this by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

EDIT = Edit(rate=0.5, select="product", layers=(1, 2))
FIRST, NEW = 1, 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
FAMILIES = ["llama", "gemma3"]
ROWS = [[FIRST, 56, 51, 37, 7, 11, 54, 61, 34, 41], [FIRST, 53, 50, 5, 51, 48, 49]]


@torch.no_grad()
def sharp(hf):
    """Matrices so large that the mask changes greedy tokens."""
    for value in hf.parameters():
        if value.ndim > 1:
            value.mul_(4)
    return hf


@pytest.fixture(scope="module")
def made(make_tiny, tokenizer, tmp_path_factory):
    """By family: folders of every export form, made once."""
    kept = {}

    def make(family):
        if family not in kept:
            place = tmp_path_factory.mktemp(family)
            sharp(make_tiny(family)).save_pretrained(place / "plain")
            tokenizer.save_pretrained(place / "plain")
            hf = AutoModelForCausalLM.from_pretrained(place / "plain").eval()
            export(hf, EDIT, out=place / "masked")
            for form in ("prefix", "peft"):
                export(hf, EDIT, format=form, out=place / form, first_token=FIRST)
            bake(hf, weight_edits(["neuron:1,9,-8"]), out=place / "baked")
            kept[family] = place
        return kept[family]

    return make


def read(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def continued(hf, rows=ROWS, **options):
    """New tokens of each row by a run of its own."""
    found = []
    for row in rows:
        ids = torch.tensor([row])
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **options)
        found.append(out[0, len(row) :].tolist())
    return found


def wanted(folder):
    """A plain cached run with the mask, and one without it."""
    hf = read(folder)
    plain = continued(hf)
    with wemask(hf, rate=0.5, select="product", layers=(1, 2)):
        masked = continued(hf)
    assert all(a != b for a, b in zip(plain, masked, strict=True))
    return masked, plain


def batched(hf, rows=ROWS, **options):
    """New tokens by continuous batching, two texts in one row; the errors of its thread."""
    made = hf.generate_batch(
        rows,
        generation_config=GenerationConfig(
            max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=-1
        ),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64),
        **options,
    )
    assert len(made) == len(rows)
    errors = {made[name].error for name in made} - {None}
    return [made[name].generated_tokens for name in sorted(made)], errors


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_in_a_static_cache_gives_the_same_tokens(family, made):
    """Padded rows, and more tokens than Gemma's sliding window holds."""
    folder = made(family)
    hf, (masked, _) = read(folder / "plain"), wanted(folder / "plain")
    batch = Batch.pad(ROWS, side="left")
    inputs = for_generate(batch.ids, batch.mask, prefix=read_edit(folder / "prefix").prefix)
    cache = load_prefix(folder / "prefix", hf, batch=2, static=20)
    assert type(cache).__name__ == "StaticCache"
    found = hf.generate(**inputs, past_key_values=cache, **GREEDY)[:, batch.ids.shape[1] :]
    assert found.tolist() == masked
    with pytest.raises(ResultError, match=r"static must be room for the prefix \(1\)"):
        load_prefix(folder / "prefix", hf, static=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_model_that_drafts(family, made, make_tiny):
    folder = made(family)
    (masked, plain), draft = wanted(folder / "plain"), make_tiny(family, seed=1)
    hf, facts = read(folder / "masked"), read_edit(folder / "prefix").prefix

    def by_prefix(inputs, held):
        found = []
        for row in ROWS:
            ids = torch.tensor([row])
            call = inputs(ids, torch.ones_like(ids), prefix=facts)
            cache = load_prefix(folder / "prefix", hf)
            out = hf.generate(**call, past_key_values=cache, assistant_model=draft, **GREEDY)
            found.append(out[0, len(row) - held :].tolist())
        return found

    assert by_prefix(for_call, 1) == masked
    # transformers 5.23 feeds the whole prompt behind the cache: docs/serve.md warns of it
    assert by_prefix(for_generate, 0) != masked
    bridge = exporting.load(folder / "masked")
    assert continued(bridge.original_model, assistant_model=draft) == masked
    open_edit(folder / "masked", hf)  # the model keeps it
    assert continued(hf, assistant_model=draft) == masked
    assert continued(read(folder / "plain"), assistant_model=draft) == plain


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_under_continuous_batching_and_in_a_static_cache(family, made):
    folder = made(family)
    masked, plain = wanted(folder / "plain")
    hf = read(folder / "masked")
    opened = open_edit(folder / "masked", hf)
    assert batched(hf) == (masked, set())
    assert continued(hf, cache_implementation="static") == masked
    opened.close()
    assert batched(hf) == (plain, set())
    bridge = exporting.load(folder / "masked")
    assert continued(bridge.original_model, cache_implementation="static") == masked


def test_located_tokens_are_told_in_a_row_of_several_texts():
    """Massive tokens are told by their size: two texts, one with a second massive token."""
    import planted

    from melens import locate
    from melens.exporting.reload import OpenEdit

    model = planted.plant("llama", "several-tokens", 0)
    found = locate(model.model, planted.batch(model, n=4))
    rows = planted.batch(model, n=2, length=12, seed=3).tolist()
    edit = Edit(rate=0.5, select="activation")
    opened = OpenEdit(model.model, edit, found)
    whole = continued(model.model, rows)
    one = opened.record.edited.tokens
    assert batched(model.model, rows) == (whole, set())
    assert opened.record.edited.tokens == 2 * one > 4  # not the first tokens alone
    opened.close()
    assert continued(model.model, rows) != whole


def test_changed_weights_need_nobody(made, make_tiny):
    folder = made("llama")
    hf, draft = read(folder / "baked"), make_tiny("llama", seed=1)
    bridge = exporting.load(folder / "plain")
    with ffn_ablate_neurons(bridge, 1, neurons=[9], factor=-8.0, tokens="all"):
        edited = continued(bridge.original_model)
    assert edited != continued(read(folder / "plain"))
    assert continued(hf) == edited
    assert continued(hf, cache_implementation="static") == edited
    assert continued(hf, assistant_model=draft) == edited
    assert batched(hf) == (edited, set())


def test_what_continuous_batching_cannot_have(made, tmp_path):
    """melens refuses where it is in the call; a prefix is lost, as docs/serve.md says."""
    folder = made("llama")
    masked, plain = wanted(folder / "plain")
    bridge = exporting.load(folder / "masked")
    _, (error,) = batched(bridge.original_model)
    assert "inside a bridge" in error
    assert "open_edit(folder, model)" in error
    hf = read(folder / "plain")
    export(hf, Edit(name="drop-key", layers=(1,)), out=tmp_path / "dropped")
    opened = open_edit(tmp_path / "dropped", hf)
    _, (error,) = batched(hf)
    assert "an open edit (drop-key) looks at whole texts" in error
    opened.close()
    cache = load_prefix(folder / "prefix", hf, batch=2)
    assert batched(hf, past_key_values=cache) == (plain, set())
    adapted = PeftModel.from_pretrained(hf, folder / "peft")
    assert batched(adapted, [row[1:] for row in ROWS])[0] not in (masked, plain)


def test_an_adapter_has_no_static_cache_and_no_draft(made, make_tiny):
    """PEFT with transformers 5.23; where these pass, docs/serve.md is to be changed."""
    folder = made("llama")
    masked, _ = wanted(folder / "plain")
    adapted = PeftModel.from_pretrained(read(folder / "plain"), folder / "peft")
    ids = torch.tensor([ROWS[0][1:]])
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY}
    assert adapted.generate(**call)[0, ids.shape[1] :].tolist() == masked[0]
    with pytest.raises(AttributeError, match="max_cache_len"):
        adapted.generate(**call, cache_implementation="static")
    with pytest.raises(RuntimeError, match="shapes"):
        adapted.generate(**call, assistant_model=make_tiny("llama", seed=1))


def test_an_edit_is_opened_on_the_weights_that_it_was_exported_of(made):
    folder = made("llama")
    masked, _ = wanted(folder / "plain")
    hf = read(folder / "masked")
    with pytest.raises(ResultError, match="no edit beside its weights"):
        open_edit(folder / "baked", read(folder / "baked"))
    with pytest.raises(ResultError, match="other weights"):
        open_edit(folder / "masked", read(folder / "baked"))
    with pytest.raises(ResultError, match="is a prefix export"):
        open_edit(folder / "prefix", hf)
    opened = open_edit(folder / "masked", hf)
    with pytest.raises(InterventionError, match="open on this model already"):
        open_edit(folder / "masked", hf)
    found = []
    thread = threading.Thread(target=lambda: found.append(continued(hf)))  # a server's
    thread.start()
    thread.join()
    assert found == [masked]
    exporting.reload._leave_all()  # at the end of a process
    assert not opened.active
    assert continued(hf) != masked


def completions(folders, prompt):
    """What ``transformers serve`` makes of a prompt, model by model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base, environment = f"http://127.0.0.1:{port}", {**os.environ, "HF_HUB_OFFLINE": "1"}
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(
        [sys.executable, "-m", "transformers.cli.transformers", "serve", *where],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{base}/health", timeout=2).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.5)
        made = []
        for folder in folders:
            body = {"model": str(folder), "prompt": prompt, "max_tokens": NEW, "temperature": 0}
            asked = urllib.request.Request(
                f"{base}/v1/completions",
                json.dumps({**body, "stream": False}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(asked, timeout=120) as answer:
                made.append(json.load(answer)["choices"][0]["text"])
        return made
    finally:
        server.terminate()
        server.wait()


@pytest.mark.enable_socket
@pytest.mark.skipif(
    not is_serve_available(), reason="runs where transformers[serving] is installed (fastapi)"
)
def test_transformers_serve_has_changed_weights_and_loses_a_mask(made, tokenizer):
    folder = made("llama")
    prompt = tokenizer.decode(ROWS[0][1:])
    start = tokenizer(prompt).input_ids
    found = completions([folder / "baked", folder / "masked"], prompt)
    said = [
        tokenizer.decode(continued(read(folder / name), [start])[0], skip_special_tokens=True)
        for name in ("baked", "plain")
    ]
    assert found == said
    config = json.loads((folder / "masked" / "config.json").read_text())
    assert config["melens_edit"]["applied"] is False
