"""A prefix of several tokens: the fewest after which no later token is massive, and its export."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from planted import BOS_ID, NEWLINE_ID, newline_batch, plant_newline

from melens.batches import Batch
from melens.cli.app import main
from melens.errors import InterventionError, PromptError
from melens.exporting import (
    choose_prefix,
    export,
    for_call,
    for_generate,
    load_prefix,
    read_edit,
)
from melens.exporting.prefix_search import _searched, _Texts
from melens.interventions.massive import massive_tokens
from melens.locating import locate
from melens.models import load
from melens.results import load_result
from melens.results.edit import ChosenPrefix, Edit

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
NONE = Edit(name="none")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
THREE = ChosenPrefix(
    token_ids=(1, 9, 12),
    tokens=("<s>", "w9", "w12"),
    starts_texts=True,
    tried=1,
    counted=1,
    massive_without=0,
    massive_with=0,
    loss_without=1.0,
    loss_with=1.0,
)


@pytest.fixture(scope="module")
def newline():
    """Its newline is massive at position 3: any prefix of more than BOS moves it away."""
    bridge = load(plant_newline().model)
    batch = newline_batch()
    return bridge, batch, locate(bridge, batch)


def count(bridge, me_layer, rows, own):
    ((marks, _),) = massive_tokens(bridge, me_layer, [Batch.of(rows)])
    return int(marks[:, own:].sum())


def test_the_fewest_tokens_are_found_after_which_none_is_massive(newline):
    bridge, batch, me_layer = newline
    chosen = choose_prefix(bridge, batch, me_layer=me_layer)
    assert chosen.token_ids == (BOS_ID, NEWLINE_ID)
    assert chosen.starts_texts
    without = count(bridge, me_layer, batch, 1)
    assert chosen.massive_without == without == 3  # every second of six rows
    moved = torch.cat([batch[:, :1], torch.full((6, 1), NEWLINE_ID), batch[:, 1:]], dim=1)
    assert chosen.massive_with == count(bridge, me_layer, moved, 2) == 0
    assert chosen.counted == 6 * 23
    assert chosen.tried == 2  # BOS alone, and with a newline
    with torch.no_grad():
        scored = [
            torch.nn.functional.cross_entropy(
                bridge(ids)[:, start - 1 : -1].flatten(0, 1), ids[:, start:].flatten()
            )
            for ids, start in ((batch, 1), (moved, 2))
        ]
    assert chosen.loss_without == pytest.approx(scored[0].item(), rel=1e-5)
    assert chosen.loss_with == pytest.approx(scored[1].item(), rel=1e-5)
    assert "0 of 138 tokens after the prefix are massive (3 without it)" in chosen.sentence()


def test_where_no_prefix_is_enough_the_best_is_given(newline):
    bridge, batch, me_layer = newline
    chosen = choose_prefix(bridge, batch, me_layer=me_layer, most=1)
    assert chosen.token_ids == (BOS_ID,)
    assert chosen.massive_with == chosen.massive_without == 3
    assert chosen.loss_with == pytest.approx(chosen.loss_without)
    for most in (0, 5):
        with pytest.raises(InterventionError, match=r"at (least 1|most 4)"):
            choose_prefix(bridge, batch, me_layer=me_layer, most=most)


def test_texts_without_a_common_start_are_kept_whole(newline):
    bridge, batch, me_layer = newline
    rows = batch[:, 1:]
    chosen = choose_prefix(bridge, rows, me_layer=me_layer, most=1)
    assert not chosen.starts_texts
    assert chosen.counted == rows.numel()
    ((token,),) = [chosen.token_ids]
    moved = torch.cat([torch.full((6, 1), token), rows], dim=1)
    assert chosen.massive_with == count(bridge, me_layer, moved, 1)


MASSIVE = {(1,): 4, (2,): 2, (1, 2): 0, (2, 1): 0}
LOSS = {(1, 2): 3.0, (2, 1): 2.0}


class Table(_Texts):
    """What prefixes leave massive, and their loss, without a model."""

    def __init__(self):
        """Nothing to run."""

    def massive(self, tokens):
        return MASSIVE[tokens]

    def loss(self, tokens):
        return LOSS[tokens]


def test_fewest_tokens_then_the_lowest_loss_then_the_fewest_massive():
    def prefixes(size):
        return (tokens for tokens in MASSIVE if len(tokens) == size)

    assert _searched(Table(), prefixes, 2) == (2, 1)
    assert _searched(Table(), prefixes, 1) == (2,)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("stands", [True, False])
def test_the_exported_prefix_is_the_tokens_themselves(side, stands, make_tiny, tmp_path):
    hf = make_tiny("qwen3")
    chosen = THREE.model_copy(update={"starts_texts": stands})
    folder = export(hf, NONE, format="prefix", out=tmp_path / "p", first_token=chosen)
    facts = read_edit(folder).prefix
    assert facts.chosen == chosen
    assert facts.logit_difference < 1e-4
    starts = [1] if stands else []
    rows = [[*starts, 20, 21, 22, 23], [*starts, 30, 31]]
    batch = Batch.pad(rows, side=side)
    call = for_call(batch.ids, batch.mask, prefix=facts)
    with torch.no_grad():
        found = hf(**call, past_key_values=load_prefix(folder, hf, batch=2)).logits
    kept = call["attention_mask"][:, 3:].bool()
    draw = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inputs = for_generate(batch.ids, batch.mask, prefix=facts)
    made = hf.generate(**inputs, past_key_values=load_prefix(folder, hf, batch=2), **draw)
    for n, row in enumerate(rows):
        whole = torch.tensor([[1, 9, 12, *row[stands:]]])
        with torch.no_grad():
            wanted = hf(whole).logits[0, 3:]
        torch.testing.assert_close(found[n][kept[n]], wanted, **CLOSE)
        if side == "left":
            assert made[n, -4:].tolist() == hf.generate(whole, **draw)[0, -4:].tolist()
    wrong = torch.tensor([[5, 6]] if stands else [[1, 6]])
    with pytest.raises(PromptError, match="whole prompt" if stands else "leave it out"):
        for_call(wrong, prefix=facts)


def test_an_adapter_of_several_tokens_is_the_tokens_themselves(make_tiny, tmp_path):
    hf = make_tiny("llama")
    ids = torch.tensor([[1, 9, 12, 20, 21, 22]])
    with torch.no_grad():
        wanted = hf(ids).logits[:, 3:]
    folder = export(hf, NONE, format="peft", out=tmp_path / "a", first_token=THREE)
    adapted = PeftModel.from_pretrained(hf, folder)
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids[:, 3:]).logits, wanted, **CLOSE)


def test_a_searched_prefix_holds_no_edit(make_tiny, tmp_path):
    edit = Edit(rate=0.5, layers=(1,))
    with pytest.raises(InterventionError, match="searched prefix holds no edit"):
        export(make_tiny("llama"), edit, format="prefix", out=tmp_path / "p", first_token=THREE)


def test_the_command_searches_and_says_what_it_found(make_tiny, tokenizer, tmp_path, capsys):
    from planted import plant

    model = plant("llama", "single", 1).model
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    arguments = ["export", str(tmp_path / "m"), "--search-prefix", "2", "--bos", "--n-seq", "2"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--format", "prefix", "-o", str(tmp_path / "p"), "--json"])
    out = capsys.readouterr()
    assert done.value.code == 0, out.err
    chosen = json.loads(out.out)["prefix"]["chosen"]
    assert chosen["token_ids"] == [1]
    assert chosen["massive_with"] == 0
    assert "before every text (prefix)" in load_result(tmp_path / "p" / "melens.json").summary()
    with pytest.raises(SystemExit) as done:
        main([*arguments, "-o", str(tmp_path / "q")])
    assert done.value.code == 2
    assert "drop --format, or use --format prefix or peft" in capsys.readouterr().err
