"""What tokenizers put around a text: known once, the same for every command and export."""

from __future__ import annotations

import copy
import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from planted import BOS_ID, plant
from tokenizers import processors

from melens import locate
from melens.batches import Prompts, encode
from melens.errors import PromptError
from melens.evaluating.haystack import Haystack, haystacks, plain_texts
from melens.evaluating.tasks import gsm8k_likelihood, perplexity
from melens.exporting.prefix import fixed_first
from melens.framing import (
    Frame,
    frame_of,
    known_ids,
    prompt_ids,
    repeated_rows,
    split_text,
    unknown_rows,
)
from melens.models import load
from melens.settings import Items

TEXT, BODY = "w5 w6 w7", [5, 6, 7]
FRAMES = {
    "none": ([], []),
    "BOS": ([1], []),
    "BOS and EOS": ([1], [2]),
    "EOS": ([], [2]),
    "[CLS] and [SEP]": ([60], [61]),
    "two in front": ([1, 62], [2]),
}


def framed(tokenizer, name, *, bos=True):
    """A tokenizer whose post-processor adds special tokens around every text."""
    prefix, suffix = FRAMES[name]
    made = copy.deepcopy(tokenizer)
    named = {i: made.convert_ids_to_tokens(i) for i in (*prefix, *suffix)}
    made.add_special_tokens({"additional_special_tokens": ["w60", "w61", "w62"]})
    pattern = [*(named[i] for i in prefix), "$A", *(named[i] for i in suffix)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=pattern, pair=[*pattern, "$B"], special_tokens=[(t, i) for i, t in named.items()]
    )
    if name.startswith("[CLS]"):
        made.bos_token = None
    assert made(TEXT)["input_ids"] == [*prefix, *BODY, *suffix]
    return made


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_is_found_and_its_end_left_out(tokenizer, name):
    made, (prefix, suffix) = framed(tokenizer, name), FRAMES[name]
    assert frame_of(made) == Frame(tuple(prefix), tuple(suffix))
    assert encode(made, TEXT, bos=None) == [*prefix, *BODY]
    assert encode(made, TEXT, bos=False) == BODY
    if made.bos_token_id is None:
        with pytest.raises(PromptError, match="no BOS token"):
            encode(made, TEXT, bos=True)
    else:
        forced = prefix if prefix[:1] == [1] else [1, *prefix]
        assert encode(made, TEXT, bos=True) == [*forced, *BODY]


@pytest.mark.parametrize("name", FRAMES)
def test_every_piece_of_a_long_text_begins_alike(tokenizer, name):
    made, (prefix, _) = framed(tokenizer, name), FRAMES[name]
    text = " ".join(f"w{i}" for i in range(5, 35))
    rows = Prompts((text,), length=10).token_rows(made)
    assert all(row[: len(prefix)] == prefix for row in rows)
    assert [token for row in rows for token in row[len(prefix) :]][:20] == list(range(5, 25))
    assert not {2, 61} & {row[-1] for row in rows}
    stretches = plain_texts(made, Haystack(text=text), length=10, n=3, per_bin=2)
    assert all(list(item.ids[: len(prefix)]) == prefix for item in stretches)
    items = perplexity_items(made, text, len(prefix))
    assert all(not any(item.scored[: len(prefix)]) for item in items)


def perplexity_items(tokenizer, text, head):
    from melens.tuning.items import _item

    rows = Prompts((text,), length=10).token_rows(tokenizer)

    class Model:
        pass

    Model.tokenizer = tokenizer
    return [_item(Model, i, row, max(1, head)) for i, row in enumerate(rows)]


def test_only_the_texts_own_tokens_are_scored(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in range(5, 35)))
    for name, (prefix, _) in FRAMES.items():
        task = perplexity(framed(tokenizer, name), Items(path, n=2, length=10))
        head = max(1, len(prefix))
        assert all(item.scored == (*[False] * head, *[True] * (10 - head)) for item in task.items)


class Inside:
    """A tokenizer that puts BOS and EOS around a text whatever it is told."""

    def __init__(self, tokenizer):
        self.own = tokenizer

    def __getattr__(self, name):
        return getattr(self.own, name)

    def __call__(self, text, **_):
        return {"input_ids": [1, *self.own(text, add_special_tokens=False)["input_ids"], 2]}


def test_a_scored_answer_has_nothing_around_it(tokenizer, tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps({"question": "w5 w6", "answer": "w7 w8"}) + "\n")
    (item,) = gsm8k_likelihood(Inside(tokenizer), Items(path, chat=False)).items
    assert [t for t, scored in zip(item.ids, item.scored, strict=True) if scored] == [7, 8]
    assert item.ids[0] == 1
    assert 2 not in item.ids


def test_a_tokenizer_that_never_stops_adding_is_read_the_same_everywhere(tokenizer):
    from melens.chat import chat_ids
    from melens.evaluating.haystack import Filler
    from melens.patching.metrics import _token_id

    made = copy.deepcopy(tokenizer)
    made.chat_template = "w5 {{ messages[0].content }} w6"
    inside = Inside(made)
    inside.is_fast = False
    assert chat_ids(inside, ["w9"]) == chat_ids(made, ["w9"]) == [[5, 9, 6]]
    assert prompt_ids(inside, TEXT, add=False) == BODY
    assert Filler.of(inside, TEXT) == Filler.of(made, TEXT).__class__(tuple(BODY), (0,), (0,))
    assert fixed_first(inside, "w9") == 9

    class Model:
        tokenizer = inside
        cfg = SimpleNamespace(d_vocab=64)

    assert _token_id(Model, "w9", "answer") == 9


def test_located_and_generated_texts_of_a_chat_task_begin_alike(tokenizer, make_tiny):
    """The tokenizer puts BOS first, the template does not: transformers' rule is the template's."""
    pytest.importorskip("lm_eval")  # comes with melens[eval]
    from melens.chat import render, task_prompt_ids
    from melens.evaluating.harness.model import Generator
    from melens.evaluating.tasks import alike

    made = framed(tokenizer, "BOS and EOS")
    made.chat_template = "w5 {{ messages[0].content }} w6"
    chat = [{"role": "user", "content": TEXT}]
    wanted = list(made.apply_chat_template(chat, return_dict=False))
    assert wanted == [5, *BODY, 6]
    (prompt,) = render(made, [chat])
    assert task_prompt_ids(made, prompt) == wanted
    rows = alike(made, "gsm8k", Items()).token_rows(made)
    assert {row[0] for row in rows} == {5}
    lm = Generator(make_tiny("llama"), made, batch_size=2)
    assert lm.tok_encode(prompt) == wanted  # as from lm-eval's own cache of requests
    assert lm.tok_encode(lm.apply_chat_template(chat)) == wanted
    assert lm.tok_batch_encode([prompt])[0].tolist() == [wanted]
    assert lm.tok_encode(f"{prompt} w9") == [*wanted, 9]
    for text in ("w9 w8", f"w6 {TEXT}"):  # of a task without chats, and of a rolling one
        assert lm.tok_encode(text)[0] == 1
        assert lm.tok_encode(text, add_special_tokens=False)[0] != 1
    assert task_prompt_ids(made, TEXT, chat=False) == [1, *BODY]
    bare = framed(tokenizer, "BOS and EOS")
    assert task_prompt_ids(bare, TEXT) == [1, *BODY]


def test_how_a_template_begins_and_when_kept_answers_are_of_it(tokenizer):
    from melens.chat import chat_opening, loses_prefix, template_key

    made = framed(tokenizer, "BOS and EOS")
    bare = template_key(made)
    turns = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    for template, opening, alone in (
        (turns, "<|", True),
        ("{{ bos_token }}" + turns, "<s><|", False),
        ("[x]\n{{ strftime_now('%f') }}{{ messages[0].content }}", "[x]", True),
        ("{{ messages[0].content }}", "", True),
        ("{{ raise_exception('never') }}", "", None),
    ):
        made.chat_template = template
        assert chat_opening(made) == opening
        assert template_key(made, chat=False) == bare
        if alone is None:
            continue
        assert loses_prefix(made) == alone
        as_before = hashlib.sha256(repr(template).encode()).hexdigest()[:16]
        assert (template_key(made) == as_before) == (not alone)


def test_without_a_tokenizer_nothing_is_said_of_bos(make_tiny):
    model = load(make_tiny("llama"))
    assert model.tokenizer is None
    found = locate(model, torch.arange(5, 29).view(2, 12))
    assert "bos_first" not in found.run.settings
    assert "BOS" not in found.summary()


@pytest.mark.parametrize("name", FRAMES)
def test_the_token_of_an_export_is_the_first_of_every_text(tokenizer, name):
    made, (prefix, _) = framed(tokenizer, name), FRAMES[name]
    if prefix:
        assert fixed_first(made) == prefix[0]
    else:
        with pytest.raises(PromptError, match="no fixed token first"):
            fixed_first(made)


def test_a_bos_that_a_prompt_writes_itself_is_not_doubled(tokenizer):
    made = framed(tokenizer, "BOS and EOS")
    assert prompt_ids(made, TEXT) == [1, *BODY]
    assert prompt_ids(made, f"<s> {TEXT}") == [1, *BODY]
    assert prompt_ids(made, TEXT, add=False) == BODY
    plain = framed(tokenizer, "none")
    assert split_text(plain, f"<s> {TEXT}", bos=None) == ([1], BODY)


def test_the_harness_encodes_prompts_open_and_pads_within_the_vocabulary(tokenizer, make_tiny):
    pytest.importorskip("lm_eval")  # comes with melens[eval]
    from melens.evaluating.harness.model import Generator

    model = make_tiny("llama")
    made = framed(tokenizer, "two in front")
    lm = Generator(model, made, batch_size=2)
    assert lm.tok_encode(TEXT) == [1, 62, *BODY]
    ids, mask = lm.tok_batch_encode([TEXT, "w5"])
    assert ids.tolist() == [[1, 62, *BODY], [0, 0, 1, 62, 5]]
    assert mask.tolist() == [[1] * 5, [0, 0, 1, 1, 1]]
    lacking = copy.deepcopy(tokenizer)
    lacking.add_special_tokens({"pad_token": "[PAD]"})
    assert lacking.pad_token_id == 64
    assert Generator(model, lacking, batch_size=2).tokenizer.pad_token_id == 2
    assert lacking.pad_token_id == 64  # the caller's stays


def test_haystacks_begin_as_texts_do(tokenizer):
    made = framed(tokenizer, "two in front")
    with pytest.raises(PromptError, match="cannot write the number"):  # no digits in this one
        haystacks(made, Haystack(lengths=(64,)), context=None)
    assert encode(made, "w9", bos=None)[:2] == [1, 62]


def test_only_ids_that_the_tokenizer_has_are_drawn(make_tiny):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from melens.measuring.first_tokens import sample_vocabulary
    from melens.scanning.choosing import Vocabulary, choose

    small = Tokenizer(models.WordLevel({"<s>": 1, "a": 7, "b": 9, "c": 30}, unk_token="a"))
    small.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=small, bos_token="<s>")
    tiny = load(make_tiny("llama"), tokenizer=made)
    assert known_ids(tiny.tokenizer, 64) == [1, 7, 9, 30]
    assert known_ids(tiny.tokenizer, 10) == [1, 7, 9]
    assert set(sample_vocabulary(tiny, count=50, seed=0)) == {7, 9, 30}
    chosen, _ = choose(Vocabulary(tiny.tokenizer, None, 64), None, 50, 0)
    assert set(chosen) == {1, 7, 9, 30}
    assert known_ids(None, 5) == [0, 1, 2, 3, 4]


def test_texts_that_a_tokenizer_cannot_read_are_no_evidence(tiny, tokenizer, capsys):
    from melens.cli.output import show

    unread, read = "alpha beta gamma delta epsilon", [f"w{i} w7 w8 w9 w10" for i in range(20, 25)]
    assert unknown_rows([[3, 3], [1, 3, 3], [3, 5], [1]], tokenizer) == [True, True, False, False]
    none, half, all_of_it = (
        locate(tiny, texts) for texts in (read[:1], [read[0], unread], [unread, f"{unread} zeta"])
    )
    assert none.run.settings.get("unknown_texts") is None
    assert none.confidence > half.confidence > 0
    assert all_of_it.confidence == 0
    assert "1 of 2 texts hold nothing but unknown tokens" in half.summary()
    show(half, as_json=True)
    assert "they are no evidence" in capsys.readouterr().err


def test_every_sentence_says_how_texts_began(tiny):
    without = locate(tiny, ["w5 w6 w7 w8"])
    assert without.summary().startswith(f"{without.run.model} (without BOS): ")
    assert "(with BOS)" in locate(tiny, [[1, 6, 7, 8]]).summary()
    assert "(BOS before some texts)" in locate(tiny, [[1, 6, 7, 8], [5, 6, 7, 8]]).summary()
    title = without.plot().axes[0].get_title("left") or without.plot().axes[0].get_title()
    assert "without BOS" in title
    older = json.loads(without.to_json())
    del older["run"]["settings"]["bos_first"]
    assert type(without).from_json(json.dumps(older)).run.subject == without.run.model


def test_a_forced_bos_that_is_not_massive_is_said():
    made = plant("llama", "single", 0)
    model = load(made.model)
    ids = torch.randint(6, 120, (4, 12), generator=torch.Generator().manual_seed(0))
    ids[2, 0] = BOS_ID
    found = locate(model, ids)
    assert found.stability.sequences_massive == 1
    assert "1 of 4 texts has a massive token" in found.summary()
    assert "forced" not in found.summary()
    later = ids.clone()
    later[:, 0] = 3
    later[2, 5] = BOS_ID
    found = locate(model, later)
    settings = {**found.run.settings, "bos": True}
    forced = found.model_copy(update={"run": found.run.model_copy(update={"settings": settings})})
    assert found.massive
    assert "the BOS that you forced is not massive here" in forced.summary()


@pytest.mark.parametrize(
    ("start", "said"),
    [(True, "with BOS"), (False, "without BOS"), (None, "BOS before some texts")],
)
def test_how_texts_begin_is_said_in_one_way(start, said):
    from melens.comparing.sides import _about
    from melens.provenance import bos_said

    assert bos_said(start) == said
    assert _about({"sequences": 3, "bos_first": start, "ids": "a"}) == f"3 sequences, {said}, ids a"


def test_repeated_texts_are_no_evidence_only_where_they_are_large(tiny, capsys):
    from melens.cli.output import show

    varied, again = [5, 6, 7, 8, 9, 10, 11, 12], [7, 8] * 8
    rows = [[7] * 4, again, varied, [7, 7, 7, 8, 9], [5, 6, 7, 8]]
    assert repeated_rows(rows) == [True, True, False, True, False]
    table = locate(tiny, [again])  # small numbers, as of a table or of digits
    assert table.verdict == "none"
    assert table.confidence > 0
    assert table.nearest is not None
    assert "repeated_texts" not in table.run.settings
    large = load(plant("llama", "single", 0).model)
    one, both, alone = (
        locate(large, rows) for rows in ([varied], [varied, [BOS_ID] * 16], [[BOS_ID] * 16])
    )
    assert (one.verdict, both.verdict, alone.verdict) == ("none",) * 3
    counts = [found.run.settings.get("repeated_texts") for found in (one, both, alone)]
    assert counts == [None, 1, 1]
    assert both.nearest is not None
    assert one.nearest is not None
    assert (both.nearest.token_id, both.nearest.dim) == (one.nearest.token_id, one.nearest.dim)
    assert one.confidence > both.confidence > 0 == alone.confidence
    assert alone.nearest is None
    assert "1 of 2 texts repeat a few tokens" in both.summary()
    assert "give texts of varied words" not in both.summary()  # the sentence is of the varied text
    last = max(alone.profile[:-1], key=lambda row: row.max)
    assert "no massive token can be told from these texts" in alone.summary()
    assert f"|x| reaches {last.max:,.0f} in dimension {last.dim}" in alone.summary()
    show(both, as_json=True)
    assert "1 of 2 texts repeat a few tokens" in capsys.readouterr().err


def test_a_massive_token_in_a_repeated_text_is_found_as_before():
    model = plant("llama", "single", 0)
    texts = [[BOS_ID, *[7] * 15]]
    found = locate(model.model, texts)
    assert found.verdict == "single"
    assert found.run.settings["repeated_texts"] == 1
    assert found.confidence > 0
