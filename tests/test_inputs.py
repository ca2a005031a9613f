"""A model is prepared once for whatever one call does with it."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from planted import batch, plant
from planted_faults import own_texts, tokenizer_for

from melens import inputs, progress
from melens.batches import Batch, prompts
from melens.checking import check
from melens.evaluating import evaluate
from melens.inputs import Inputs, prepare
from melens.isolating import isolate
from melens.models import load, loading, origin
from melens.settings import Compare, Items, Run
from melens.tuning import tune
from melens.tuning.space import Space

ONCE = {"adopt": 1, "check_contract": 1, "digest_of": 1}
"""Adopted, held to the contract and fingerprinted."""


@pytest.fixture(scope="module")
def planted():
    return plant("llama", "single", 1)


@pytest.fixture
def model(planted):
    """With a tokenizer, and not held to the contract yet."""
    made = load(planted.model, tokenizer=tokenizer_for())
    loading.CHECKED.discard(made)
    return made


@pytest.fixture
def counted(monkeypatch):
    """How often a model was looked at, wherever it was asked for."""
    counts = Counter()

    def count(module, name):
        plain = getattr(module, name)

        def call(*given, **options):
            counts[name] += 1
            return plain(*given, **options)

        monkeypatch.setattr(module, name, call)

    count(inputs, "adopt")
    count(loading, "check_contract")
    count(origin, "digest_of")
    return counts


def test_a_check_prepares_once_for_all_its_stages(model, planted, counted):
    report = check(model, own_texts(planted.model, n=2, length=8), budget="standard")
    assert [stage.name for stage in report.stages if stage.status != "done"] == []
    assert {"isolate", "super_weights", "eviction"} <= set(report.results)
    assert counted == ONCE


def test_an_evaluation_that_locates_first_prepares_once(model, counted, tmp_path):
    """Its rival by the mean measures that mean, and is entered again for every batch."""
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(f"w{i} " + "w7 w9 w11 w13 " * 6 for i in range(20, 24)))
    compare = Compare(rates=(), strengths=(), seeds=(0,), rivals=("mean",))
    result = evaluate(
        model,
        "perplexity",
        items=Items(path, n=4, length=20, bos=True),
        compare=compare,
        run=Run(batch_tokens=20),
    )
    assert [rival.name for rival in result.rivals] == ["mean"]
    assert result.n == 4
    assert counted == ONCE


def test_a_search_that_locates_first_prepares_once(model, planted, counted):
    space = Space(selects=("gamma",), layers=("after",), rates=(0.5,), strengths=(1.0,))
    result = tune(model, batch(planted, n=48, length=10), budget=2000, space=space)
    assert result.confirmed
    assert counted == ONCE


def test_an_isolation_that_locates_first_prepares_once(model, planted, counted):
    isolate(model, prompts=batch(planted, n=1, length=6))
    assert counted == ONCE


def test_ready_inputs_are_passed_on_and_other_texts_make_others(model, planted, counted):
    ready = prepare(model, batch(planted, n=2, length=8))
    assert prepare(ready) is ready
    assert Inputs.of(ready) is ready
    other = prepare(ready, Batch.of(batch(planted, n=3, length=6)))
    assert (other.total, other.model, other.weights) == (3, ready.model, ready.weights)
    assert other.settings == prepare(ready.model, batch(planted, n=3, length=6)).settings
    assert counted == {"adopt": 2, "check_contract": 1, "digest_of": 2}  # the last line's own


def test_a_model_without_texts_takes_those_it_is_given(model):
    ready = Inputs.of(model)
    assert not ready.batches
    made = prepare(ready, [[1, 5, 6, 7]])
    assert torch.equal(made.batches[0].ids, torch.tensor([[1, 5, 6, 7]]))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (["w3 w4 w5 w6 w7"], True),
        (prompts(["w3 w4 w5 w6 w7"]), True),
        (prompts(["w3 w4 w5 w6 w7"], bos=False), False),
        (prompts(["w3 w4 w5 w6 w7"], bos=True), False),
        (prompts(["w3 w4 w5 w6 w7"], chat=True), False),
        (torch.arange(3, 11)[None], False),
    ],
)
def test_another_beginning_than_transformer_lens_has_is_said_once(
    source, said, planted, capsys, monkeypatch
):
    """Only where nobody chose: not of ids, not of a chat template, not with bos=."""
    monkeypatch.setattr(progress, "_SAID", set())
    tokenizer = tokenizer_for()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    model = load(copy.deepcopy(planted.model), tokenizer=tokenizer)
    monkeypatch.setattr(model.cfg, "default_prepend_bos", True)
    for _ in range(2):
        prepare(model, source)
    assert capsys.readouterr().err.count("texts begin without BOS") == said
