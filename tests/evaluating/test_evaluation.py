"""Evaluation: the estimates, the resumed runs, the rows on disk, the conditions, the command."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from planted import plant

from melens.errors import (
    InterventionError,
    PromptError,
    ResultError,
    UnknownNameError,
)
from melens.evaluating import evaluate
from melens.evaluating.edits import BASE, RIVALS, EditCondition, applied, conditions
from melens.evaluating.forced import Forced, Runner
from melens.evaluating.generated import row_of
from melens.evaluating.harness.data import GENERATION_TASKS
from melens.evaluating.harness.data import AnswerRow as Answer
from melens.evaluating.scores import score_of
from melens.evaluating.tasks import FORCED_TASKS
from melens.figures import FIGURES, save_figure
from melens.intervals import paired_difference, weighted_mean
from melens.item_rows import ItemRow, Rows
from melens.models import load
from melens.results import Edit, Evaluation, load_result
from melens.settings import Compare, Items, Run

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""float32; a batch and a sequence alone are summed in another order."""
MASK = Edit(select="activation", rate=0.5, layers=(1, 2))


# --- The estimates.


def test_the_weighted_mean_is_the_loss_of_all_tokens_together():
    values, weights = torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0])
    assert weighted_mean(values, weights).value == pytest.approx(1.5)
    assert weighted_mean(values, weights).interval is None


def test_equal_weights_give_the_plain_mean_and_its_normal_interval():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    found = weighted_mean(values, torch.full((400,), 2.0))
    half = 1.96 * values.std().item() / 20
    assert found.value == pytest.approx(values.mean().item())
    assert found.interval == pytest.approx((found.value - half, found.value + half), abs=half / 5)


def test_a_ratio_estimate_resamples_items_with_their_weights():
    # All weight on one item: every resample that has it gives its value, others the second's.
    values, weights = torch.tensor([1.0, 0, 0, 0, 0, 0]), torch.tensor([1.0, 0, 0, 0, 0, 0])
    found = weighted_mean(values, weights)
    assert found.value == 1
    assert found.interval == (0, 1)  # without it (p = 1/3) there is no weight at all


def test_what_is_paired_cancels():
    base = torch.randn(50, generator=torch.Generator().manual_seed(1)).double() * 100
    weights = torch.ones(50)
    apart = 0.25 + 0.01 * torch.arange(50).remainder(2).double()
    found = paired_difference(base + apart, base, weights)
    assert found.value == pytest.approx(0.255)
    low, high = found.interval
    assert 0.25 < low < 0.255 < high < 0.26
    alone = weighted_mean(base, weights).interval
    assert alone[1] - alone[0] > 10


# --- The runner, against a whole forward pass under the same edit.


@pytest.fixture
def model(make_tiny, tokenizer, request):
    """Random weights made large, so that an edit shows far above what rounding does."""
    hf = make_tiny(getattr(request, "param", "llama"))
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter *= 6
    return load(hf, tokenizer=tokenizer)


def item(name, ids, first=1):
    return Forced(name, tuple(ids), (*[False] * first, *[True] * (len(ids) - first)), {})


@pytest.fixture
def three(ids):
    rows = [ids[0].tolist(), ids[1][:7].tolist(), ids[2][:10].tolist()]
    return [
        item(str(i), row, first) for i, (row, first) in enumerate(zip(rows, (1, 3, 4), strict=True))
    ]


def expected(model, edit, one):
    """Loss, right, kl and agreement of one item from two whole passes, in float64 by hand."""
    ids = torch.tensor([one.ids])
    at = [i for i, scored in enumerate(one.scored) if scored]
    logits = []
    for made in (nullcontext(), applied(model, edit, None)):
        with torch.no_grad(), made:
            logits.append(model(ids, return_type="logits")[0].double())
    plain, edited = (x[[i - 1 for i in at]].softmax(-1) for x in logits)
    wanted = ids[0, at]
    rows = torch.arange(len(at))
    return (
        -edited[rows, wanted].log(),
        edited.argmax(-1) == wanted,
        (plain * (plain.log() - edited.log())).sum(-1),
        edited.argmax(-1) == plain.argmax(-1),
    )


@pytest.mark.parametrize("model", ["llama", "gemma2", "gpt2", "qwen3-next"], indirect=True)
def test_a_resumed_run_is_a_whole_run_under_the_edit(model, three):
    last = max(load_layers(model))
    edits = [
        Edit(select="activation", rate=0.5, layers=(last,)),
        Edit(select="random", rate=0.5, strength=0.7, layers=tuple(load_layers(model))),
        Edit(name="drop-key", layers=(last,)),
    ]
    kept = [EditCondition("base", "base", BASE)]
    kept += [EditCondition(f"e{i}", "edited", edit) for i, edit in enumerate(edits)]
    outcome = Runner(model, kept, None).outcome(three, kept)
    changed = dict.fromkeys((c.name for c in kept), 0.0)
    for condition in kept:
        for one, found in zip(outcome.items, outcome.found[condition.name], strict=True):
            loss, right, kl, agree = expected(model, condition.edit, one)
            torch.testing.assert_close(found.loss.double(), loss, **CLOSE)
            torch.testing.assert_close(found.kl.double(), kl, **CLOSE)
            assert found.right.tolist() == right.tolist()
            assert found.agree.tolist() == agree.tolist()
            plain = expected(model, BASE, one)[0]
            apart = (loss - plain).abs().max().item()
            changed[condition.name] = max(changed[condition.name], apart)
    assert changed.pop("base") == 0
    assert min(changed.values()) > 0.01, changed  # 500 times what rounding does


def load_layers(model):
    from melens.models.decoder import decoder_of

    return decoder_of(model).attentions


def test_company_and_padding_change_nothing(model, three):
    kept = (EditCondition("base", "base", BASE), EditCondition("edited", "edited", MASK))
    together = Runner(model, kept, None).outcome(three, kept)
    for i, one in enumerate(three):
        alone = Runner(model, kept, None).outcome([one], kept)
        for name in ("base", "edited"):
            torch.testing.assert_close(
                alone.found[name][0].loss, together.found[name][i].loss, **CLOSE
            )


def test_batches_hold_every_item_once_and_no_more_than_their_tokens(model, three):
    batches = list(
        Runner(model, (EditCondition("base", "base", BASE),), None, batch_tokens=20).batches(three)
    )
    assert sorted(one.id for batch in batches for one in batch) == ["0", "1", "2"]
    assert [len(batch) for batch in batches] == [1, 2]


@pytest.mark.parametrize("scored", [(True, True), (False, False), (False,)])
def test_an_item_without_anything_to_foresee_is_refused(scored):
    with pytest.raises(PromptError, match="at least one scored token"):
        Forced("x", (4, 5), scored, {})


# --- A located model.


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(" ".join(f"w{rng.randint(6, 127)}" for _ in range(300)))
    return path


@pytest.fixture(scope="module")
def big_tokenizer():
    """Knows all ids of a planted model; its chat template begins with BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {{0: "<pad>", 1: "<s>", 2: "</s>"}.get(i, f"w{i}"): i for i in range(128)}
    made = Tokenizer(models.WordLevel(known, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="w3",
        chat_template="<s>{% for m in messages %} {{ m['content'] }}{% endfor %}",
    )


@pytest.fixture(scope="module")
def massive(big_tokenizer, words):
    """A model with a planted massive activation, and its ME Layer."""
    from melens.batches import prompts
    from melens.locating import locate

    made = load(plant("llama", "single", 1).model, tokenizer=big_tokenizer)
    found = locate(made, prompts(words, bos=True, length=40))
    assert found.me_layer == 6
    return made, found


@pytest.fixture(scope="module")
def held(massive, words):
    """evaluate() of that model on ten short texts, compared with little unless told.

    The same call is made once: results are frozen. One that keeps items or says its progress is
    made each time.
    """
    made, found = massive
    kept = {}

    def go(edit=None, *, task="perplexity", items=None, compare=None, **run):
        compare = compare or Compare(rates=(0.9,), seeds=(0,))
        items = items or Items(words, n=10, length=20, bos=True)
        key = repr((edit, task, items, compare, run))
        if not {"progress", "keep"} & run.keys() and key in kept:
            return kept[key]
        kept[key] = evaluate(
            made,
            task,
            edit,
            me_layer=found,
            items=items,
            compare=compare,
            run=Run(**run),
        )
        return kept[key]

    return go


def test_dose_and_both_controls_are_there_unasked(massive):
    made, found = massive
    kept = conditions(made, Edit(), found)
    roles = [c.role for c in kept]
    assert roles[:2] == ["base", "edited"]
    assert [c.edit.rate for c in kept if c.role == "dose"] == [0.1, 0.25, 0.75, 0.9]
    other, *drawn = [c.edit for c in kept if c.role == "control"]
    edited = [at for at in range(made.cfg.n_layers) if at > found.me_layer]
    assert len(other.layers) == min(len(edited), found.me_layer + 1)
    assert max(other.layers) <= found.me_layer
    assert [(edit.select, edit.seed) for edit in drawn] == [("random", s) for s in (0, 1, 2)]
    assert len({c.edit for c in kept}) == len(kept)


def test_equal_conditions_are_there_once(massive):
    made, found = massive
    compare = Compare(rates=(0.5, 0.9), seeds=(0, 1), rivals=("zero",))
    kept = conditions(made, Edit(select="random", rate=0.5, seed=1), found, compare)
    assert [c.name for c in kept] == [
        "base",
        "edited",
        "rate 0.9",
        "other layers",
        "random dims, seed 0",
        "zero",
    ]
    kept = conditions(made, Edit(name="zero"), found, Compare(rivals=("zero", "mean")))
    assert [c.name for c in kept if c.role == "rival"] == ["mean"]
    assert [c.edit.strength for c in kept if c.role == "dose"] == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("edit", [Edit(name="none"), Edit(rate=0.0), Edit(strength=0.0)])
def test_an_edit_that_changes_nothing_is_refused_before_the_model_loads(edit):
    with pytest.raises(InterventionError, match=r"changes nothing|against none"):
        evaluate("no-such-model", "perplexity", edit)


def test_values_are_those_of_whole_passes_over_all_texts(massive, held, words):
    made, found = massive
    result = held(compare=Compare(rates=(), seeds=(0,), rivals=RIVALS))
    items = FORCED_TASKS["perplexity"](made.tokenizer, Items(words, 10, 20, True)).items
    for condition in result.conditions:
        losses = []
        for one in items:
            with torch.no_grad(), applied(made, condition.edit, found):
                logits = made(torch.tensor([one.ids]), return_type="logits")[0].double()
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits[:-1], torch.tensor(one.ids[1:]), reduction="none"
                )
            )
        assert condition.value == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)
    assert result.weight == sum(len(one.ids) - 1 for one in items)
    assert {c.name for c in result.rivals} == set(RIVALS)


def test_perplexity_is_the_exponential_of_the_mean(held):
    result = held()
    rows = {row["condition"]: row for row in result.rows()}
    assert rows["edited"]["perplexity"] == pytest.approx(math.exp(result.edited.value))
    assert (rows["base"]["kl"], rows["base"]["agreement"]) == (0, 1)
    assert rows["edited"]["kl"] > 0
    assert 0 < result.edited.energy < 1


def test_a_planted_effect_is_found_and_named_worse(held):
    """Without its massive activation read, this model's loss rises in every text."""
    made = held(Edit(name="zero"), compare=Compare(strengths=(), seeds=(0, 1)))
    assert made.delta.value == pytest.approx(made.edited.value - made.base.value)
    assert made.edited.also["kl"] > 10 * max(
        c.also["kl"] for c in made.controls if "random" in c.name
    )


def test_a_located_layer_of_another_model_is_refused(massive, model):
    _, found = massive
    with pytest.raises(ResultError, match="located on"):
        evaluate(model, "perplexity", me_layer=found)


def test_names_data_and_counts_are_refused_before_the_model_loads(tmp_path, words):
    with pytest.raises(UnknownNameError, match=r"'gsm8'. Did you mean 'gsm8k'.*perplexity.*xstest"):
        evaluate("no-such-model", "gsm8")
    for task, data, says in (
        ("perplexity", tmp_path / "no.txt", "cannot read"),
        ("gsm8k-likelihood", None, "give --data"),
        ("gsm8k-likelihood", words, "line 1: no object with question and answer"),
        ("gsm8k", None, "give --data FOLDER"),
        ("xstest", words, "holds no xstest/xstest_prompts.csv"),
    ):
        with pytest.raises(PromptError, match=says):
            evaluate("no-such-model", task, items=Items(data))


@pytest.mark.parametrize("given", ["", "gsm8k", "gsm8k/test.jsonl"])
def test_a_solution_is_scored_behind_its_question(massive, tmp_path, given):
    made, _ = massive
    (tmp_path / "gsm8k").mkdir()
    line = {"question": "w9 w10", "answer": "w11 w12"}
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(line))
    (one,) = FORCED_TASKS["gsm8k-likelihood"](
        made.tokenizer, Items(tmp_path / "gsm8k/test.jsonl")
    ).items
    assert one.ids == (1, 9, 10, 11, 12)
    assert one.scored == (False, False, False, True, True)
    from melens.evaluating.sources import data_folder

    assert data_folder(GENERATION_TASKS["gsm8k"], Items(tmp_path / given)) == tmp_path


# --- Rows on disk.


def test_a_killed_run_goes_on_and_gives_the_same_result(held, tmp_path, monkeypatch):
    path = tmp_path / "items.jsonl"
    whole = held(keep=path, batch_tokens=60)
    lines = path.read_text().splitlines(keepends=True)
    kept = len(lines) // 2
    path.write_text("".join(lines[:kept]) + lines[kept][:40])
    done = {(json.loads(line)["item"], json.loads(line)["condition"]) for line in lines[1:kept]}
    ran, plain = [], Runner.outcome

    def outcome(self, items, conditions):
        ran.append([one.id for one in items])
        return plain(self, items, conditions)

    monkeypatch.setattr(Runner, "outcome", outcome)
    again = held(keep=path, batch_tokens=60)
    names = [c.name for c in again.conditions]
    unfinished = {i for i in map(str, range(10)) if any((i, name) not in done for name in names)}
    assert 0 < len(unfinished) < 10
    # Whole batches run again, so that sums are of the same company; finished batches do not.
    assert all(set(batch) & unfinished for batch in ran)
    assert len(ran) < 4
    assert without_run(again) == without_run(whole)
    assert sorted(path.read_text().splitlines()) == sorted("".join(lines).splitlines())
    ran.clear()
    assert without_run(held(keep=path, batch_tokens=60)) == without_run(whole)
    assert not ran


def without_run(result):
    return {key: value for key, value in result.to_dict().items() if key != "run"}


def test_items_hold_the_text_and_the_scores_of_every_condition(held, tmp_path):
    result = held(keep=tmp_path / "items.jsonl")
    head, *rows = map(json.loads, (tmp_path / "items.jsonl").read_text().splitlines())
    assert head["key"] == result.run.settings["items"]
    assert len(rows) == 10 * len(result.conditions)
    assert all(row["about"]["text"].startswith("<s> w") for row in rows)
    mine = [row for row in rows if row["condition"] == "edited"]
    mean = sum(row["value"] * row["weight"] for row in mine) / sum(row["weight"] for row in mine)
    assert mean == pytest.approx(result.edited.value)


def test_another_evaluations_or_any_other_file_is_refused_and_left_alone(held, tmp_path):
    path = tmp_path / "items.jsonl"
    held(keep=path)
    before = path.read_bytes()
    with pytest.raises(ResultError, match="of another evaluation"):
        held(Edit(rate=0.3), keep=path)
    assert path.read_bytes() == before
    path.write_text("my own notes")
    with pytest.raises(ResultError, match=r"damaged|no file of items"):
        held(keep=path)
    assert path.read_text() == "my own notes"


def test_a_file_without_any_finished_item_is_begun_anew(tmp_path):
    path = tmp_path / "items.jsonl"
    Rows(path, {"task": "a"})
    rows = Rows(path, {"task": "b"})
    rows.add([ItemRow("0", "base", 1.0, 1.0)])
    assert Rows(path, {"task": "b"}).has("0", "base")


def test_progress_counts_items(held):
    seen = []
    held(progress=lambda done, total: seen.append((done, total)), batch_tokens=60)
    assert seen[-1] == (10, 10)
    assert seen == sorted(seen)


# --- The result.


def scored(condition, values, base):
    def rows(name, column):
        return [ItemRow(str(i), name, float(x), 1.0) for i, x in enumerate(column)]

    return score_of(condition, rows(condition.name, values), rows("base", base), 0)


def result_of(held, deltas, *, higher=False):
    """A result with given differences: the edit's, then each control's."""
    old = held(compare=Compare(rates=(), seeds=()))
    base = [float(i % 7) for i in range(40)]
    made = [scored(EditCondition("base", "base", BASE), base, base)]
    for i, delta in enumerate(deltas):
        role = "control" if i else "edited"
        condition = EditCondition(f"c{i}" if i else "edited", role, old.edit.changed(seed=i))
        noise = [x + delta + 0.1 * math.sin(17 * j) for j, x in enumerate(base)]
        made.append(scored(condition, noise, base))
    return Evaluation.model_validate(
        {
            **old.to_dict(),
            "n": 40,
            "weight": 40.0,
            "higher_is_better": higher,
            "base": made[0],
            "edited": made[1],
            "delta": made[1].delta,
            "dose": (),
            "controls": made[2:],
            "differences": {},
            "weights": (),
        }
    )


@pytest.mark.parametrize(
    ("deltas", "higher", "says"),
    [
        ((-1.0,), False, ", better (1 conditions tried"),
        ((1.0,), False, ", worse ("),
        ((1.0,), True, ", better ("),
        ((-1.0,), True, ", worse ("),
        ((0.0, 2.0), False, "which the items cannot tell from none"),
        ((-1.0, -2.0), False, "better, but no more than a control (c1)"),
        ((-1.0, 2.0), False, ", better (2 conditions tried"),
        ((1.0, 0.3, 1.5), False, "worse, but no more than a control (c2)"),
    ],
)
def test_the_sentence_says_what_the_interval_and_the_controls_say(held, deltas, higher, says):
    result = result_of(held, deltas, higher=higher)
    assert says in result.summary()
    assert "Layers count from 0" in result.summary()


def test_too_few_items_say_nothing(held, words):
    assert "too few" in held(items=Items(words, n=3, length=20, bos=True)).summary()


def test_json_there_and_back_and_inconsistent_numbers_are_refused(held, tmp_path):
    result = held()
    (tmp_path / "evaluate.json").write_text(result.to_json())
    assert load_result(tmp_path / "evaluate.json") == result
    data = json.loads(result.to_json())
    assert data["delta"]["paired"] is True
    assert {"task", "n", "base", "edited", "delta", "dose", "controls"} <= set(data)
    for path, value, says in (
        (("edited", "value"), 0.0, "must be its value"),
        (("delta", "value"), 0.0, "needs its delta"),
        (("differences", "edited"), [0.0] * 10, "must average to its delta"),
        (("differences", "edited"), [0.0] * 9, "a difference for each of 10"),
    ):
        broken = json.loads(result.to_json())
        broken[path[0]][path[1]] = value
        with pytest.raises(ResultError, match=says):
            Evaluation.from_json(json.dumps(broken))


def test_doses_of_several_rules_are_drawn_together(held, tmp_path, words):
    from melens.figures.evaluation import draw_dose_grid

    made = [
        held(Edit(select=select, layers=layers))
        for select in ("gamma", "activation")
        for layers in ("after", "next")
    ]
    drawn = save_figure(draw_dose_grid(made), tmp_path / "grid.svg").read_text()
    for said in ("gamma", "activation", "all layers after", "the next layer alone"):
        assert said in drawn
    with pytest.raises(ResultError, match="no evaluation"):
        draw_dose_grid([])
    fewer = held(items=Items(words, n=6, length=20, bos=True))
    with pytest.raises(ResultError, match="2 sets of items"):
        draw_dose_grid([made[0], fewer])


@pytest.mark.parametrize("style", list(FIGURES[Evaluation]))
@pytest.mark.parametrize("edit", [Edit(), Edit(name="norm-flatten")])
def test_every_figure_draws_from_the_json_alone(held, style, edit, tmp_path):
    result = Evaluation.from_json(held(edit).to_json())
    saved = [save_figure(result.plot(style), tmp_path / f"{i}.svg").read_bytes() for i in (0, 1)]
    assert saved[0] == saved[1]
    assert b"nats a token" in saved[0]


def test_sinks_inside_the_edit_change_after_it_only(massive, words, tmp_path):
    from melens.batches import prompts
    from melens.figures.sinks import draw_sink_change
    from melens.interventions import wemask
    from melens.measuring import sinks

    made, found = massive
    texts = prompts(words, bos=True, length=40)
    before = sinks(made, found, texts)
    with wemask(made, found, rate=0.9, select="activation"):
        after = sinks(made, found, texts)
    same = [
        a == b for a, b in zip(before.attention_to_token, after.attention_to_token, strict=True)
    ]
    assert same == [layer <= found.me_layer for layer in range(before.n_layers)]
    assert save_figure(draw_sink_change(before, after), tmp_path / "change.png").stat().st_size
    with pytest.raises(ResultError, match="other texts"):
        draw_sink_change(before, sinks(made, found, prompts(words, bos=True, length=20)))


# --- Generated answers.


def answer(name, **scores):
    return Answer(
        task="xstest",
        condition="none",
        key="k",
        item=name,
        prompt="p",
        answer="a",
        gold=None,
        scores=scores,
        counts={},
        metric="refused_safe",
    )


def test_harmful_prompts_stand_beside_the_refusals_of_harmless_ones():
    task = GENERATION_TASKS["xstest"]
    edited = [
        answer("0", refused_safe=1.0),
        answer("1", refused_unsafe=0.0),
        answer("2", refused_safe=0.0),
    ]
    base = [
        answer("0", refused_safe=0.0),
        answer("1", refused_unsafe=1.0),
        answer("2", refused_safe=0.0),
    ]
    rows = [
        [row_of(a, name, task) for a in answers]
        for name, answers in (("edited", edited), ("base", base))
    ]
    found = score_of(EditCondition("edited", "edited", MASK), rows[0], rows[1], 0)
    assert (found.value, found.delta.value) == (0.5, 0.5)
    assert found.also == {"refused_unsafe": 0.0}
    assert found.also_delta["refused_unsafe"].value == -1.0
    with pytest.raises(ResultError, match="none of gsm8k"):
        row_of(edited[0], "edited", GENERATION_TASKS["gsm8k"])


def test_items_that_do_not_count_do_not_widen_the_interval():
    values = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    condition = EditCondition("base", "base", BASE)
    counted = [ItemRow(str(i), "base", x, 1.0) for i, x in enumerate(values)]
    more = [ItemRow(f"u{i}", "base", 0.0, 0.0) for i in range(30)]
    alone, together = (score_of(condition, rows, rows, 0) for rows in (counted, counted + more))
    assert together == alone
    with pytest.raises(ResultError, match="no item counts"):
        score_of(condition, more, more, 0)


def test_judgements_of_one_answer_weigh_as_many():
    task = GENERATION_TASKS["ifeval"]
    one = answer("0", prompt_level_strict_acc=0.0, inst_level_strict_acc=0.5)
    one = one.model_copy(update={"task": "ifeval", "counts": {"inst_level_strict_acc": 4}})
    made = row_of(one, "base", task)
    assert (made.value, made.weight) == (0.0, 1.0)
    assert made.also == {"inst_level_strict_acc": (0.5, 4.0)}


@pytest.fixture(scope="module")
def answers_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "gsm8k").mkdir()
    rows = [{"question": f"w{i} w{i + 1}", "answer": f"w8 #### {i}"} for i in range(10, 16)]
    (folder / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_generated_answers_become_the_same_result_and_go_on(
    held, answers_data, tmp_path, monkeypatch
):
    pytest.importorskip("lm_eval")
    from melens.evaluating import generated

    path = tmp_path / "items.jsonl"
    settings = {"keep": path, "max_new_tokens": 3, "compare": Compare(rates=(), seeds=(0,))}
    source = Items(answers_data, n=5)
    asked, plain = [], generated.run_task

    def once_then_die(*args, **options):
        asked.append(options["edit"].label)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(generated, "run_task", once_then_die)
    with pytest.raises(KeyboardInterrupt):
        held(task="gsm8k", items=source, **settings)
    seen = []
    result = held(task="gsm8k", items=source, progress=lambda *at: seen.append(at), **settings)
    assert asked == ["none", Edit().label, Edit().label, *[c.edit.label for c in result.controls]]
    assert seen[-1] == (20, 20)
    assert (result.n, result.unit) == (5, "share correct")
    assert result.edited.energy > 0
    assert "lm_eval_strict_match" in result.edited.also
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert len(rows) == 5 * 4
    assert rows[0]["about"]["prompt"].startswith("<s> w10 w11")
    assert rows[0]["about"]["gold"] == "10"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["items.jsonl"]


def test_a_task_that_generates_can_go_without_the_template(answers_data):
    pytest.importorskip("lm_eval")
    from melens.cli.commands.evaluate import _refuse_early

    given = {"length": None, "max_new_tokens": None}
    source = Items(answers_data, chat=False)
    _refuse_early("gsm8k", source, Edit(), **given)
    with pytest.raises(PromptError, match="makes its prompts itself; drop --bos"):
        _refuse_early("gsm8k", replace(source, bos=True), Edit(), **given)


# --- The command.


@pytest.fixture(scope="module")
def folder(massive, big_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("eval")
    plant("llama", "single", 1).model.save_pretrained(path / "planted")
    big_tokenizer.save_pretrained(path / "planted")
    return path


@pytest.fixture
def run(capsys):
    def go(*arguments):
        from melens.cli.app import main

        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return done.value.code or 0, captured.out, captured.err

    return go


def asked_for(folder, words, *more):
    return (
        "eval",
        folder / "planted",
        "--data",
        words,
        "--bos",
        "-n",
        6,
        "--length",
        20,
        "-q",
        "--rates",
        "0.9",
        "--control-seeds",
        "0",
        *more,
    )


def test_the_command_says_keeps_and_takes_up(run, folder, words, tmp_path):
    asked = asked_for(folder, words, "-o", tmp_path, "--rivals", "zero")
    code, stdout, _ = run(*(word for word in asked if word != "-q"))  # which prints no tables
    assert code == 0
    for name in ("edited", "rate 0.9", "other layers", "random dims, seed 0", "zero", "agreement"):
        assert name in stdout
    assert "difference" in stdout
    assert {"evaluate.json", "items.jsonl", "dose.png", "paired.png"} <= {
        file.name for file in tmp_path.iterdir()
    }
    before = (tmp_path / "items.jsonl").read_bytes()
    code, stdout, _ = run(*asked_for(folder, words, "-o", tmp_path, "--rivals", "zero", "--json"))
    data = json.loads(stdout)
    assert (code, data["schema"], data["n"]) == (0, "melens/evaluate/1", 6)
    assert data["delta"]["paired"] is True
    assert [c["name"] for c in data["controls"]] == ["other layers", "random dims, seed 0"]
    assert (tmp_path / "items.jsonl").read_bytes() == before
    for more in (("--mask-rate", 0.3), ("--rivals", "none")):  # told early, and by the items' key
        code, _, stderr = run(*asked_for(folder, words, "-o", tmp_path, *more))
        assert code == 2
        assert "of another evaluation" in stderr
        assert stderr.count("melens: ") == 1
    assert (tmp_path / "items.jsonl").read_bytes() == before
    code, stdout, _ = run(
        *asked_for(folder, words, "-o", tmp_path, "--mask-rate", 0.3, "--force", "--json")
    )
    assert (code, json.loads(stdout)["edit"]["rate"]) == (0, 0.3)
    assert (
        run("plot", tmp_path / "evaluate.json", "--style", "paired", "-o", tmp_path / "x.pdf")[0]
        == 0
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--task", "gsm8"), "Did you mean 'gsm8k'"),
        (("--data", "no-such.txt"), "cannot read"),
        (("--task", "gsm8k-likelihood"), "give --data"),
        (("--rates", "0.5,2"), "--rates must be above 0"),
        (("--rates", "half"), "--rates takes shares"),
        (("--control-seeds", "-1"), "--control-seeds must be from 0"),
        (("--control-seeds", "0.5"), "--control-seeds takes whole numbers"),
        (("--rivals", "zero,nothing"), "unknown rival 'nothing'"),
        (("--edit", "none"), "name an edit"),
        (("--mask-rate", "0"), "changes nothing"),
        (("--edit", "zero", "--mask-rate", "0.2"), "zero has no rate"),
        (("--max-new-tokens", "4"), "generates nothing"),
        (("-n", "0"), "--n"),
    ],
)
def test_mistakes_are_one_line_before_the_model_loads(run, arguments, says, tmp_path):
    code, stdout, stderr = run("eval", "./no-such-model", *arguments, "-o", tmp_path / "out")
    assert (code, stdout) == (2, "")
    assert says in stderr
    assert len([line for line in stderr.splitlines() if line.startswith("melens: ")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_one_line_and_code_3(run, answers_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, stderr = run("eval", "./no-such-model", "--task", "gsm8k", "--data", answers_data)
    assert code == 3
    assert "pip install 'melens[eval]'" in stderr


def test_a_result_without_its_items_is_not_written_over(run, tmp_path):
    (tmp_path / "evaluate.json").write_text("{}")
    code, _, stderr = run("eval", "./no-such-model", "-o", tmp_path)
    assert code == 2
    assert "overwrite it with --force" in stderr


def test_an_exported_folders_edit_is_the_default_and_its_base_is_unedited(
    run, folder, massive, words, tmp_path
):
    import melens

    edit = Edit(select="activation", rate=0.9)
    melens.export(str(folder / "planted"), edit, out=tmp_path / "planted", me_layer=massive[1])
    code, stdout, _ = run(*asked_for(tmp_path, words, "--json"))
    found = json.loads(stdout)
    assert (code, found["edit"]["select"], found["edit"]["rate"]) == (0, "activation", 0.9)
    _, stdout, _ = run(*asked_for(folder, words, "--mask-select", "activation", "--json"))
    assert found["base"]["value"] == pytest.approx(json.loads(stdout)["base"]["value"])
    assert found["edited"]["also"]["kl"] > 0
    opened = melens.load(tmp_path / "planted")
    with pytest.raises(InterventionError, match="is open on this model"):
        evaluate(opened, "perplexity", edit)
    opened.melens_edit.close()


def test_help_needs_no_torch_and_names_every_task():
    code = (
        "import sys\nfrom melens.cli.app import main\n"
        "try:\n    main(['eval', '--help'])\nexcept SystemExit:\n"
        "    assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "PATH": ""},
    )
    for task in (*FORCED_TASKS, *GENERATION_TASKS):
        assert task in done.stdout


def test_token_changes_say_what_a_mean_hides():
    from melens.evaluating.forced import Foreseen
    from melens.evaluating.run import token_changes

    def foreseen(*losses):
        here = torch.tensor(losses)
        return Foreseen(here, here > 0, here, here > 0)

    found = token_changes(foreseen(1.0, 2.5, 3.005, 1.0), foreseen(2.0, 1.5, 3.0, 1.0))
    assert found == {  # a mean of 0.001: one better, one worse, two as they were
        "token_change": (pytest.approx(2.005 / 4, abs=1e-6), 4.0),
        "tokens_better": (0.25, 4.0),
        "tokens_worse": (0.25, 4.0),
    }


def test_every_token_s_loss_is_saved_and_averages_to_the_item_s(held, tmp_path):
    path = tmp_path / "items.jsonl"
    result = held(keep=path)
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    for row in rows:
        losses = row["about"]["token_loss"]
        assert len(losses) == row["weight"]
        assert sum(losses) / len(losses) == pytest.approx(row["value"], abs=1e-5)
    assert result.base.also["token_change"] == 0
    assert result.edited.also["token_change"] > 0
