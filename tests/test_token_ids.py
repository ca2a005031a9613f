"""Token ids instead of texts: what a tokenizer, `to_tokens` or a person made, and what is none."""

from __future__ import annotations

import copy
import io

import numpy as np
import pandas as pd
import pytest
import torch

from melens import locate, patch, prompts
from melens.batches import Batch, strings_of
from melens.capture import ChannelMax, stream
from melens.errors import InterventionError, PromptError
from melens.inputs import _batches, prepare, rows_of
from melens.models import load

TEXTS = ["w5 w6 w7 w8 w9", "w10 w11 w12 w13 w14 w15 w16"]
ROWS = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 16]]


def rows(model, source):
    return prepare(model, source, least=1).rows


def sources(tokenizer):
    padded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"
    return {
        "encoding": padded,
        "encoding, lists": tokenizer(TEXTS),
        "encoding, arrays": tokenizer(TEXTS, padding=True, return_tensors="np"),
        "encoding, left": left(TEXTS, padding=True, return_tensors="pt"),
        "dict": dict(padded),
        "mask of truth values": {**padded, "attention_mask": padded["attention_mask"].bool()},
        "mask, array": {**padded, "attention_mask": padded["attention_mask"].bool().numpy()},
        "mask, lists": {**padded, "attention_mask": padded["attention_mask"].bool().tolist()},
        "encodings": [tokenizer(text) for text in TEXTS],
        "tensor, padded right": padded["input_ids"],
        "tensor, padded left": left(TEXTS, padding=True, return_tensors="pt")["input_ids"],
        "lists": ROWS,
        "tuples": tuple(map(tuple, ROWS)),
        "tensors": [torch.tensor(row) for row in ROWS],
        "arrays": [np.array(row) for row in ROWS],
        "batch": Batch.pad(ROWS),
        "batches": [Batch.pad([row]) for row in ROWS],
        "generator": (row for row in ROWS),
        "texts": TEXTS,
        "texts, generator": (text for text in TEXTS),
        "texts, array": np.array(TEXTS),
    }


def test_every_form_of_the_same_tokens_is_the_same_input(tiny, tokenizer):
    for name, source in sources(tokenizer).items():
        assert rows(tiny, source) == ROWS, name
    alone = {
        "list": ROWS[0],
        "tensor": torch.tensor(ROWS[0]),
        "array": np.array(ROWS[0]),
        "ids": [np.int64(token) for token in ROWS[0]],
    }
    for name, source in alone.items():
        assert rows(tiny, source) == ROWS[:1], name


def test_to_tokens_gives_what_the_model_itself_runs(tiny):
    ids = tiny.to_tokens(TEXTS[:1])  # puts BOS in front
    assert rows(tiny, ids) == [[1, *ROWS[0]]]
    assert rows(tiny, tiny.to_tokens(TEXTS)) == [[1, *row] for row in ROWS]
    assert locate(tiny, ids).run.settings["bos_first"] is True
    assert locate(tiny, TEXTS[0]).run.settings["bos_first"] is False


def test_a_verdict_on_ids_is_the_verdict_on_their_texts(tiny, tokenizer):
    by_text, by_ids = (
        locate(tiny, source)
        for source in (TEXTS, tokenizer(TEXTS, return_tensors="pt", padding=True))
    )
    same = {"run"}
    assert by_text.to_dict() | dict.fromkeys(same) == by_ids.to_dict() | dict.fromkeys(same)
    assert by_text.run.settings["ids"] == by_ids.run.settings["ids"]


def test_batches_are_cut_as_texts_are(tiny):
    inputs = prepare(tiny, torch.arange(5, 45).reshape(10, 4), batch_size=4)
    assert [len(batch) for batch in inputs.batches] == [4, 4, 2]


def test_padding_is_only_what_a_row_has_more_of_than_the_others(make_tiny, tokenizer):
    """A beginning-of-text token that is also the padding token stays, as in GPT-2."""
    made = copy.deepcopy(tokenizer)
    made.pad_token = made.bos_token
    tiny = load(make_tiny("llama"), tokenizer=made)
    assert rows(tiny, torch.tensor([[1, 5, 6, 7], [1, 8, 9, 1]])) == [[1, 5, 6, 7], [1, 8, 9]]
    assert rows(tiny, torch.tensor([[1, 5, 6, 7], [1, 1, 8, 9]])) == [[1, 5, 6, 7], [1, 8, 9]]
    assert rows(tiny, torch.tensor([[1, 5, 6, 1], [1, 8, 9, 1]])) == [[1, 5, 6, 1], [1, 8, 9, 1]]
    tiny.tokenizer.pad_token = None
    assert rows(tiny, torch.tensor([[1, 5, 0, 0]])) == [[1, 5, 0, 0]]


def test_patching_takes_ids(tiny, tokenizer):
    clean, other = ROWS[0], [5, 6, 17, 8, 9]
    options = {"sites": "resid_pre", "layers": [1], "metric": "kl"}
    texts = patch(tiny, TEXTS[0], tokenizer.decode(other), **options)
    forms = [
        (torch.tensor(clean), torch.tensor(other)),
        (clean, other),
        ([clean], [other]),
        (tokenizer(TEXTS[0]), tokenizer(tokenizer.decode(other))),
    ]
    for first, second in forms:
        made = patch(tiny, first, second, **options)
        assert made.to_frame().equals(texts.to_frame())


def test_reducers_take_ids(tiny):
    seen = []
    for source in (Batch.pad(ROWS), ROWS, {"input_ids": ROWS}):
        taps = {"blocks.1.hook_resid_post": ChannelMax()}
        stream(tiny, source, taps)
        seen.append(taps["blocks.1.hook_resid_post"].result())
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_searching_takes_ids(tiny):
    from melens.tuning.items import items_of

    _, made = items_of(tiny, torch.tensor([[1, 5, 6, 7], [1, 8, 9, 10]]), "loss")
    assert [item.ids for item in made] == [(1, 5, 6, 7), (1, 8, 9, 10)]
    assert made[0].scored == (False, True, True, True)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"a": "b"}, "a dict without 'input_ids' is not a text"),
        ({"text": TEXTS}, "without 'input_ids'"),
        ({"input_ids": "w5"}, "hold no token ids"),
        ({"input_ids": [5, 6], "attention_mask": [1]}, "the shape of input_ids"),
        (b"w5 w6 w7 w8", "got a bytes"),
        ({"w5 w6 w7 w8"}, "got a set"),
        (dict.fromkeys(TEXTS).keys(), "got a dict_keys"),
        (pd.DataFrame({TEXTS[0]: [1]}), "got a DataFrame"),
        (pd.DataFrame({"input_ids": ROWS}), "got a DataFrame"),
        (bytearray(b"w5 w6 w7 w8"), "got a bytearray"),
        (1.5, "got a float"),
        (5, "got a int"),
        (object(), "got a object"),
        ([], "at least one string"),
        ([True, False], "got a list"),
        ([5, "w5"], "mixed"),
        ([TEXTS[0], ROWS[0]], "mixed"),
        ([TEXTS], "rows of whole numbers"),
        ([[5, 6.5]], "rows of whole numbers"),
        ([[]], "rows of whole numbers"),
        (torch.tensor([[0.5]]), "rows of whole numbers"),
        (torch.tensor([[True]]), "rows of whole numbers"),
        (torch.zeros(1, 2, 2).long(), r"\[pos\] or \[batch, pos\]"),
        (torch.zeros(0).long(), "not empty"),
        ([2**70], "beyond any vocabulary"),
        ([[5, 6, 7, 64]], "the vocabulary is 0 to 63"),
        ([[5, -1, 7, 6]], "token ids run from -1"),
        ([Batch.pad(ROWS), TEXTS[0]], "mixed with something else"),
        (io.StringIO("w5 w6 w7 w8"), "an open file is not a text"),
    ],
)
def test_what_is_neither_text_nor_ids_is_refused_by_its_type(tiny, wrong, says):
    with pytest.raises(PromptError, match=says) as said:
        _batches(tiny, wrong, 4, 1)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("size", ["a", 0, -1, 1.5, None, True, [2], 2**70])
def test_a_batch_size_that_is_none_is_one_line(tiny, size):
    for call in (
        lambda: locate(tiny, ROWS, batch_size=size),
        lambda: Batch.pad(ROWS).split(size),
        lambda: prompts(TEXTS).pack(tiny.tokenizer, batch_size=size),
    ):
        with pytest.raises(PromptError, match="batch_size must be a whole number, at least 1, got"):
            call()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"n": "a"}, "n must be a whole number"),
        ({"length": 1.5}, "length must be a whole number"),
        ({"bos": "yes"}, "bos must be True, False or None"),
        ({"chat": 1}, "chat must be True, False or None"),
    ],
)
def test_settings_of_texts_are_refused_by_their_kind(setting, says):
    with pytest.raises(PromptError, match=says):
        prompts(TEXTS, **setting)


@pytest.mark.parametrize("seed", ["a", None, 1.5, True, -1, 2**80])
def test_a_seed_that_torch_cannot_take_is_one_line(seed):
    with pytest.raises(InterventionError, match="seed must be a whole number"):
        locate("no-such-model", seed=seed)


def test_prompts_says_where_ids_go():
    for ids in (ROWS, torch.tensor(ROWS[0]), {"input_ids": ROWS}):
        with pytest.raises(PromptError, match=r"token ids go to the measurement itself"):
            strings_of(ids)


def test_a_padding_id_outside_the_vocabulary_never_reaches_the_model(tiny, make_tiny, tokenizer):
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"pad_token": "[PAD]"})
    assert made.pad_token_id == 64  # the embedding ends at 63
    before = locate(tiny, TEXTS)
    tiny = load(make_tiny("llama"), tokenizer=made)
    assert locate(tiny, TEXTS).profile == before.profile
    encoded = made(TEXTS, padding=True, return_tensors="pt")
    assert int(encoded["input_ids"].max()) == 64
    batch = Batch.of(encoded["input_ids"], encoded["attention_mask"].bool())
    for source in (
        encoded,
        encoded["input_ids"],
        Batch.of(encoded["input_ids"], encoded["attention_mask"].bool()),
    ):
        assert locate(tiny, source).profile == before.profile
    with pytest.raises(PromptError, match="the vocabulary is 0 to 63"):
        locate(tiny, [[5, 6, 7, 64]])
    stream(tiny, batch, {"blocks.1.hook_resid_post": ChannelMax()})
    assert int(batch.ids.max()) == 64  # the caller's own stays as it is
    assert rows_of([batch]) == ROWS


@pytest.mark.parametrize("take", ["Batch.of", "encoding", "a prefix"])
def test_padding_inside_a_text_is_refused_wherever_texts_come_in(take, tiny):
    from melens.exporting import for_generate

    ids = torch.tensor([ROWS[0], ROWS[0]])

    def give(*rows):
        mask = torch.tensor(rows)
        if take == "Batch.of":
            return Batch.of(ids, mask.bool())
        if take == "encoding":
            return prepare(tiny, {"input_ids": ids, "attention_mask": mask}, least=1)
        return for_generate(ids, mask)

    give([1, 1, 1, 0, 0], [0, 0, 1, 1, 1])
    give([1, 1, 1, 1, 1], [0, 1, 1, 1, 0])
    with pytest.raises(PromptError, match="of row 1 has padding before position 3, in the middle"):
        give([1, 1, 1, 1, 1], [1, 0, 0, 1, 1])


def test_an_edited_right_padded_batch_is_continued_without_a_cache_as_with_one(make_tiny):
    """What was generated stands behind the padding, in the middle of the row."""
    from melens.interventions import wemask

    hf, ids = make_tiny("llama"), torch.tensor([ROWS[0], ROWS[0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    given = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with wemask(hf, layers=[0, 1], rate=1.0, tokens="first") as record:
        without, cached = (hf.generate(ids, use_cache=on, **given) for on in (False, True))
    assert torch.equal(without, cached)
    assert record.edited.tokens == 2 * 4 + 2  # in every whole pass, and in the one prefill
