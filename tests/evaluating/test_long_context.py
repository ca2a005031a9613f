"""Haystacks that hold what they say, answers scored as greedy decoding gives them, runs resumed."""

from __future__ import annotations

import json
import math
import re
import string
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from planted import plant

from melens.cli.app import main
from melens.errors import InterventionError, PromptError, ResultError
from melens.evaluating.edits import BASE, EditCondition
from melens.evaluating.forced import Forced, Foreseen, Runner
from melens.evaluating.haystack import (
    Filler,
    Haystack,
    bins,
    haystacks,
    plain_texts,
    scored_positions,
)
from melens.evaluating.long_context import light_comparison, long_context, score_of
from melens.figures import FIGURES
from melens.models import load
from melens.results import Edit, LongContext, load_result
from melens.settings import Run

TEXT = "\n".join(
    f"Line {word} goes on for a while. It then ends, as lines do.\nAnd {word} comes back!"
    for word in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
)
PASSKEY = re.compile(r"\nThe pass key is (\d{5})\. Remember it: \1 is the pass key\.\n")
NUMBER = re.compile(r"\nThe special number of (\w+) is (\d{5})\.\n")
ASKED = re.compile(r"Question: What is the special number of (\w+)\?")
SMALL = Haystack(lengths=(260, 320), depths=(0.0, 0.5, 1.0), seeds=2, text=TEXT, plain=2)


@pytest.fixture(scope="module")
def letters():
    """One token a character, all that is printed; 102 of the planted model's 128 ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = [c for c in string.printable if c not in "\r\x0b\x0c\t"]
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    words |= {sign: i for i, sign in enumerate(signs, start=4)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def chatting(letters):
    from copy import deepcopy

    made = deepcopy(letters)
    made.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return made


def _hf():
    hf = plant("llama", "single", 1).model
    hf.config.max_position_embeddings = 640
    return hf


@pytest.fixture(scope="module")
def model(letters):
    return load(_hf(), tokenizer=letters)


@pytest.fixture(scope="module")
def located(model):
    from melens import locate, prompts

    return locate(model, prompts(TEXT, bos=True, n=4, length=40))


@pytest.fixture(scope="module")
def result(model, located):
    haystack = replace(SMALL, bos=True)
    return long_context(model, me_layer=located, haystack=haystack)


KINDS = [
    SMALL,
    replace(SMALL, bos=True),
    replace(SMALL, task="needles", needles=3, lengths=(400, 523)),
    replace(SMALL, task="needles", needles=2, lengths=(431,), depths=(0.1, 0.3, 0.9), chat=True),
]


@pytest.mark.parametrize("haystack", KINDS, ids=["passkey", "bos", "needles", "chat"])
def test_an_oracle_that_reads_the_text_finds_every_answer(haystack, chatting):
    items = haystacks(chatting, haystack, context=None)
    assert len(items) == len(haystack.lengths) * len(haystack.depths) * haystack.seeds
    for item in items:
        assert len(item.ids) == item.about["length"]  # exact, question and answer included
        said = chatting.decode(item.ids)
        assert said.endswith(f" is {item.about['answer']}")
        prompt = chatting.decode([i for i, s in zip(item.ids, item.scored, strict=True) if not s])
        assert prompt == item.about["prompt"]
        if haystack.task == "passkey":
            assert PASSKEY.findall(prompt) == [item.about["answer"]]
            assert prompt.count(item.about["answer"]) == 2
        else:
            numbers = dict(NUMBER.findall(prompt))
            asked = re.findall(r"What is the special number of (\w+)\?", prompt)[-1]
            assert numbers[asked] == item.about["answer"]
            assert len(numbers) == len(set(numbers.values())) == haystack.needles
        # The answer alone is scored, all of it.
        scored = chatting.decode([i for i, s in zip(item.ids, item.scored, strict=True) if s])
        assert scored.strip() == item.about["answer"]
        assert (item.ids[0] == 1) == (haystack.bos is True or haystack.chat)


def _depth(item, tokenizer):
    """Where the asked needle really stands, found in the decoded text alone."""
    prompt = item.about["prompt"]
    name = item.about["asked"]
    pattern = f"\nThe special number of {name} is " if name else "\nThe pass key is "
    return prompt.index(pattern)


@pytest.mark.parametrize("task", ["passkey", "needles"])
def test_the_needle_is_where_it_is_said_to_be(task, letters):
    depths = tuple(i / 10 for i in range(11))
    haystack = replace(SMALL, task=task, lengths=(600,), depths=depths, seeds=2)
    items = haystacks(letters, haystack, context=None)
    for seed in range(2):
        mine = [item for item in items if item.about["seed"] == seed]
        places = [item.about["placed"] for item in mine]
        assert places == sorted(places)
        assert (places[0], places[-1]) == (0.0, 1.0)
        found = [_depth(item, letters) for item in mine]
        assert found == sorted(found)
        assert all(abs(at - depth) <= 1 / 6 for at, depth in zip(places, depths, strict=True))
        # Nothing follows the last one but the question, nothing stands before the first but the
        # introduction.
        assert "\n\n\nThe " in mine[0].about["prompt"]
        assert re.search(r"\d{5}( is the pass key)?\.\n\n\nQuestion:", mine[-1].about["prompt"])


def test_needles_stand_between_sentences_or_lines(letters):
    items = haystacks(letters, replace(SMALL, lengths=(600,), seeds=8), context=None)
    for item in items:
        prompt = item.about["prompt"]
        before = prompt[: PASSKEY.search(prompt).start()].rstrip(" ")
        if 0 < item.about["placed"] < 1:
            assert before.endswith((".", "!", "\n")), before[-20:]
        else:
            assert before.endswith("\n") or item.about["depth"] == 1


def test_cuts_are_sentences_and_lines(letters):
    text = 'He said "no." Then\nhe left. At 3.5 metres... what? Yes'
    filler = Filler.of(letters, text)
    starts = [text[i:].split()[0] for i in filler.sentences]
    assert starts == ["He", "Then", "At", "what?", "Yes"]
    assert [text[i:].split()[0] for i in filler.lines] == ["He", "he"]
    # A text goes round: place counts on over its end.
    size = len(filler.ids)
    assert filler.stretch(size - 2, 4) == [*filler.ids[-2:], *filler.ids[:2]]
    begin = filler.sentences[-1]
    at = filler.place(begin, 100, 0.2)
    assert (begin + at) % size in filler.sentences


def test_same_seed_same_items_other_seed_others(letters):
    first, again = (haystacks(letters, SMALL, context=None) for _ in range(2))
    assert first == again
    others = haystacks(letters, replace(SMALL, seed=1), context=None)
    assert not {item.about["answer"] for item in first} & {item.about["answer"] for item in others}
    begins = {
        item.about["begin"] for item in haystacks(letters, replace(SMALL, seeds=8), context=None)
    }
    assert len(begins) > 4
    # More seeds leave the earlier items as they were.
    more = {item.id: item for item in haystacks(letters, replace(SMALL, seeds=4), context=None)}
    assert all(more[item.id] == item for item in first)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lengths": (700,)}, "length 700 is over the model's context of 640 tokens"),
        ({"lengths": (260, 100)}, r"length 100 is too short for passkey .* at least 2\d\d tokens"),
        ({"chat": True}, "no chat template"),
        ({"text": "\x00 "}, None),
    ],
)
def test_what_cannot_be_built_is_refused(changes, says, letters):
    if says is None:
        assert haystacks(letters, replace(SMALL, **changes), context=640)
        return
    with pytest.raises(PromptError, match=says):
        haystacks(letters, replace(SMALL, **changes), context=640)


def test_the_least_length_that_is_named_is_enough(letters):
    one = replace(SMALL, lengths=(20,), depths=(0.5,), seeds=1)
    with pytest.raises(PromptError, match="at least") as refused:
        haystacks(letters, one, context=None)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    item = haystacks(letters, replace(one, lengths=(least,)), context=None)[0]
    assert len(item.ids) == least
    with pytest.raises(PromptError, match="too short"):
        haystacks(letters, replace(one, lengths=(least - 1,)), context=None)


def test_a_tokenizer_without_digits_is_refused(tokenizer):
    with pytest.raises(PromptError, match=r"cannot write the number \d{5}"):
        haystacks(tokenizer, Haystack(text="w5 w6 w7", lengths=(60,)), context=64)


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "hay"},
        {"lengths": ()},
        {"lengths": (0,)},
        {"lengths": (260, 260)},
        {"depths": (1.5,)},
        {"depths": (math.nan,)},
        {"depths": (0.5, 0.5)},
        {"seeds": 0},
        {"task": "needles", "needles": 1},
        {"task": "needles", "needles": 99},
        {"chat": True, "bos": True},
    ],
)
def test_settings_that_mean_nothing_are_refused(changes):
    with pytest.raises(PromptError):
        replace(SMALL, **changes)


def test_plain_texts_never_overlap_and_score_every_bin(letters):
    rows = plain_texts(letters, replace(SMALL, bos=True), length=100, n=5, per_bin=4)
    assert [len(row.ids) for row in rows] == [100] * 5
    assert all(row.ids[0] == 1 for row in rows)
    said = [letters.decode(row.ids[1:]) for row in rows]
    places = [TEXT.find(text) for text in said]
    assert all(b - a >= 99 for a, b in pairwise(places))
    assert min(places) >= 0
    for low, high in bins(100):
        assert sum(rows[0].scored[low:high]) == min(4, high - low)
    assert not rows[0].scored[0]
    with pytest.raises(PromptError, match=r"needs 100000 in a row; give a longer --text"):
        plain_texts(letters, SMALL, length=100_000, n=5, per_bin=4)


@pytest.mark.parametrize("length", [2, 3, 64, 100, 1024, 4097])
def test_bins_cover_every_position_once(length):
    found = [at for low, high in bins(length) for at in range(low, high)]
    assert found == list(range(1, length))
    assert scored_positions(length, length) == tuple(found)


def _foreseen(item, right):
    tokens = sum(item.scored)
    return Foreseen(
        loss=torch.full((tokens,), 0.25),
        right=torch.tensor(right),
        kl=torch.zeros(tokens),
        agree=torch.ones(tokens, dtype=torch.bool),
    )


def test_who_always_knows_finds_all_and_one_wrong_token_is_not_found(letters):
    for item in haystacks(letters, SMALL, context=None):
        n = sum(item.scored)
        value, weight, also = score_of(item, _foreseen(item, [True] * n))
        assert (value, weight, also["loss"]) == (1.0, 1.0, (0.25, float(n)))
        for wrong in range(n):
            right = [i != wrong for i in range(n)]
            assert score_of(item, _foreseen(item, right))[0] == 0.0
        assert score_of(item, _foreseen(item, [False] * n))[0] == 0.0


def test_bins_of_a_plain_text_are_means_of_its_positions(letters):
    item = plain_texts(letters, SMALL, length=40, n=1, per_bin=3)[0]
    at = [i for i, scored in enumerate(item.scored) if scored]
    losses = torch.tensor([float(i) for i in at])
    found = Foreseen(losses, losses > 0, losses * 0, losses > 0)
    value, weight, also = score_of(item, found)
    assert (value, weight) == (pytest.approx(sum(at) / len(at)), len(at))
    for low, high in bins(40):
        inside = [i for i in at if low <= i < high]
        assert also[f"from {low}"] == (pytest.approx(sum(inside) / len(inside)), len(inside))


def test_found_is_what_greedy_decoding_gives(model, letters):
    """Against transformers' own generate, answers that it gives and answers that it does not."""
    hf, rng = _hf(), torch.Generator().manual_seed(3)
    items, wanted = [], []
    for i in range(6):
        ids = [1, *torch.randint(4, 100, (20,), generator=rng).tolist()]
        made = hf.generate(
            torch.tensor([ids]),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=127,
        )[0, len(ids) :].tolist()
        for answer in (made, [*made[:4], (made[4] + 1) % 100], [(made[0] + 1) % 100, *made[1:]]):
            scored = (*[False] * len(ids), *[True] * 5)
            name = f"{i}-{len(items)}"
            items.append(Forced(name, (*ids, *answer), scored, {"task": "passkey"}))
            wanted.append(float(answer == made))
    runner = Runner(model, [EditCondition("base", "base", BASE)], None, batch_tokens=10_000)
    outcome = runner.outcome(items, runner.conditions)
    found = [score_of(i, f)[0] for i, f in zip(items, outcome.found["base"], strict=True)]
    assert found == wanted
    assert sum(wanted) == 6


def test_one_dose_below_one_above_and_both_controls(result, located):
    assert [c.edit.rate for c in result.dose] == [0.25, 0.75]
    assert {c.name for c in result.controls} == {"other layers", "random dims, seed 0"}
    assert light_comparison(Edit(rate=1.0)).rates == (0.5,)
    assert result.me_layer == located.me_layer
    assert result.run.settings["bos_first"] is True
    with pytest.raises(InterventionError, match="none"):
        long_context("never-loaded", Edit(name="none"))
    with pytest.raises(InterventionError, match="changes nothing"):
        long_context("never-loaded", Edit(rate=0.0))


def test_the_numbers_are_those_of_one_full_run_each(result, model, letters, located):
    """The edited loss of an item, from a plain forward pass under the edit."""
    from melens.evaluating.edits import applied

    haystack = replace(SMALL, bos=True)
    items = haystacks(letters, haystack, context=None)
    for condition in (result.base, result.edited, result.controls[0]):
        losses = []
        for item in items:
            ids = torch.tensor([item.ids])
            with torch.no_grad(), applied(model, condition.edit, located):
                at = model(ids)[0].log_softmax(-1)
            answer = [i for i, scored in enumerate(item.scored) if scored]
            losses.append(-sum(at[i - 1, item.ids[i]].item() for i in answer) / len(answer))
        assert condition.overall.loss.value == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        short = losses[: len(losses) // 2]
        assert condition.by_length[0].loss.value == pytest.approx(sum(short) / 6, abs=1e-5)
        assert condition.cells[1].loss == pytest.approx(sum(losses[2:4]) / 2, abs=1e-5)
    moved = result.edited.overall.loss_delta.value
    assert moved == pytest.approx(
        result.edited.overall.loss.value - result.base.overall.loss.value, abs=1e-9
    )
    assert abs(moved) > 1e-4  # far over the tolerances above: the edit does something at all


def test_json_goes_there_and_back_and_every_style_draws(result, tmp_path):
    assert LongContext.from_json(result.to_json()) == result
    path = tmp_path / "long-context.json"
    path.write_text(result.to_json())
    again = load_result(path)
    assert len(again.rows()) == 6 * 6
    for style in FIGURES[LongContext]:
        assert again.plot(style).axes
    panels = again.plot("found").axes
    grid = panels[0].images[0].get_array()
    assert grid.shape == (3, 2)
    assert grid[1][0] == result.base.cell(260, 0.5).found / 2
    loss = again.plot("answer-loss").axes[1].images[0].get_array()
    assert loss[2][1] == result.edited.cell(320, 1.0).loss
    left, right = again.plot("positions").axes
    assert list(left.lines[0].get_ydata()) == [part.loss.value for part in result.base.bins]
    assert list(right.lines[0].get_ydata()) == [part.delta.value for part in result.edited.bins]
    assert "Controls: other layers" in result.summary()
    assert "Layers count from 0" in result.summary()


def test_a_result_that_no_run_can_have_made_is_refused(result):
    data = json.loads(result.to_json())
    data["base"]["cells"][0]["found"] = 1 - data["base"]["cells"][0]["found"] or 2
    with pytest.raises(ResultError, match="found must be what its cells hold"):
        LongContext.from_json(json.dumps(data))
    data = json.loads(result.to_json())
    data["edited"]["bins"][0]["delta"]["value"] += 1
    with pytest.raises(ResultError, match="differences of edited"):
        LongContext.from_json(json.dumps(data))


class _Killed(Exception):
    """Stands for a kill between two batches."""


def test_a_killed_run_goes_on_and_gives_the_same(result, model, located, tmp_path):
    path, haystack = tmp_path / "items.jsonl", replace(SMALL, bos=True)

    def run(progress=None, hay=haystack):
        run = Run(keep=path, progress=progress)
        return long_context(model, me_layer=located, haystack=hay, run=run)

    def kill(done, total):
        if done >= 6:
            raise _Killed

    with pytest.raises(_Killed):
        run(kill)
    kept = path.read_text()
    path.write_text(kept + '{"item": "half a li')
    fired = []
    again = run(lambda done, total: fired.append((done, total)))
    assert fired[-1] == (14, 14)
    assert path.read_text().startswith(kept)
    numbers = {"run", "items"}
    assert again.model_dump(exclude=numbers) == result.model_dump(exclude=numbers)
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert len(lines) == 14 * 6
    assert sum("prompt" in line["about"] for line in lines) == 14
    with pytest.raises(ResultError, match="of another evaluation"):
        run(hay=replace(haystack, seed=5))


@pytest.fixture(scope="module")
def folder(letters, tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "planted"
    _hf().save_pretrained(path)
    letters.save_pretrained(path)
    (path.parent / "text.txt").write_text(TEXT)
    return path


def _run(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        main(["long-context", *map(str, arguments)])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return done.value.code or 0, said.out, said.err


def test_the_command_writes_shows_and_goes_on(folder, capsys, tmp_path):
    arguments = (
        folder,
        "--text",
        folder.parent / "text.txt",
        "--lengths",
        "300",
        "--depths",
        "1,0",
        "--seeds",
        "1",
        "--texts",
        "1",
        "--bos",
        "-o",
        tmp_path,
    )
    code, out, err = _run(capsys, *arguments)
    assert code == 0, err
    assert "Found by length and depth" in out
    assert "Controls: " in out
    names = {file.name for file in tmp_path.iterdir()}
    assert {"long-context.json", "long-context.png", "items.jsonl", "locate.json"} <= names
    before = (tmp_path / "items.jsonl").read_text()
    code, out, _ = _run(capsys, *arguments, "--json")
    assert code == 0
    assert json.loads(out)["schema"] == "melens/long-context/1"
    assert (tmp_path / "items.jsonl").read_text() == before
    code, _, err = _run(capsys, *arguments, "--seed", "4")
    assert code == 2
    assert "of another evaluation" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lengths", "256,many"], "--lengths takes whole numbers with commas"),
        (["--lengths", "-5"], "lengths must be"),
        (["--depths", "0,2"], "depths must be numbers from 0 to 1"),
        (["--depths", "nan"], "depths must be"),
        (["--seeds", "0"], "--seeds"),
        (["--needles", "1"], "--needles"),
        (["--task", "hay"], "--task"),
        (["--text", "/nowhere.txt"], "cannot read the text"),
        (["--edit", "none"], "name an edit"),
        (["--mask-rate", "2"], "--mask-rate"),
        (["--chat", "--bos"], "leaves BOS to the chat template"),
        (["--lengths", "9000", "--bos"], "over the model's context of 640"),
        (["--lengths", "40"], "too short for passkey"),
        (["--lengths", "600", "--texts", "2", "--text", "TEXT"], None),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, says, folder, capsys):
    short = folder.parent / "short.txt"
    short.write_text("Too little. " * 4)
    arguments = [short if argument == "TEXT" else argument for argument in arguments]
    code, _, err = _run(capsys, folder, *arguments)
    assert code == 2, err
    assert (says or "loss by position needs") in err
    assert sum(line.startswith("melens: ") for line in err.splitlines()) == 1


@pytest.mark.weights
def test_a_real_model_finds_a_near_passkey_and_no_other(smol):
    near = Haystack(lengths=(112,), depths=(0.5,), seeds=2)
    first, second = haystacks(smol.tokenizer, near, context=smol.cfg.n_ctx)
    chat = replace(near, lengths=(192,), chat=True)
    for item in (first, second, *haystacks(smol.tokenizer, chat, context=smol.cfg.n_ctx)):
        assert len(item.ids) == item.about["length"]
        assert PASSKEY.findall(item.about["prompt"]) == [item.about["answer"]]
    scored = sum(first.scored)
    other = replace(first, id="other", ids=(*first.ids[:-scored], *second.ids[-scored:]))
    runner = Runner(smol, [EditCondition("base", "base", BASE)], None)
    outcome = runner.outcome((first, other), runner.conditions)
    found = [score_of(i, f)[0] for i, f in zip(outcome.items, outcome.found["base"], strict=True)]
    assert found == [1.0, 0.0]
