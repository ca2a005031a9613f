"""isolate() over every step of an emergence, and taken up again where it was killed."""

from __future__ import annotations

import functools
import json

import pytest
from planted import batch, plant

from melens.batches import Batch
from melens.cli.render import show_listings
from melens.cli.tables import TABLES
from melens.errors import ResultError
from melens.isolating import isolate
from melens.isolating.cause import steps_of
from melens.isolating.runs import LayerEdit
from melens.locating import locate
from melens.models import load
from melens.results import Isolation
from melens.settings import Run


@functools.cache
def two_steps():
    made = plant("llama", "multi-step", 0)
    model = load(made.model)
    texts = [Batch.of(batch(made, n=2, length=6))]
    me = locate(model, texts)
    return made, model, texts, me


class Killed(BaseException):
    """As an interrupt: nothing catches it."""


def test_the_run_goes_on_where_it_was_and_gives_the_same_bits(tmp_path, monkeypatch):
    made, model, texts, me = two_steps()
    keep = tmp_path / "steps.jsonl"
    ran = []
    enter = LayerEdit.__init__
    monkeypatch.setattr(
        LayerEdit,
        "__init__",
        lambda self, name, how: enter(self, name, lambda m, t: ran.append(name) or how(m, t)),
    )
    seen = []

    def stop(done, total):
        seen.append(total)
        if done > 0.8 * total:
            raise Killed

    with pytest.raises(Killed):
        isolate(model, me, texts, run=Run(keep=keep, progress=stop))
    before, lines = len(ran), len(keep.read_text("utf-8").splitlines()) - 1
    assert lines > 40
    with keep.open("a", encoding="utf-8") as file:
        file.write('{"item": "batch 0", "cond')  # a kill in the middle of a line
    with pytest.raises(ResultError, match="is of another isolation"):
        isolate(model, me, texts, ffn_edit="drop", run=Run(keep=keep))
    ran.clear()
    again = isolate(model, me, texts, run=Run(keep=keep))
    rest = len(ran)
    assert rest < 0.5 * before
    assert not keep.exists()
    whole = isolate(model, me, texts)
    a, b = json.loads(again.to_json()), json.loads(whole.to_json())
    a["run"].pop("created"), b["run"].pop("created")
    assert a == b
    _holds_every_step(made, me, whole)


def _holds_every_step(made, me, found):
    assert me.verdict == "multi-step"
    assert steps_of(me) == [made.truth.me_layer, made.truth.main_layer] or steps_of(me) == [
        *made.truth.layers
    ]
    assert [edited.layer for edited in found.edited] == steps_of(me)
    (step,) = found.steps
    # Planted by single neurons, and nothing reads the last one's write: without it, the rest.
    share = me.profile[step.layer].write_share
    assert step.factorial.kept_edited.left == pytest.approx(1 - share, abs=0.05)
    assert step.neurons_for["0.99"] == 1
    text = found.summary()
    assert f"at layer {found.layer} (the ME Layer)" in text
    assert f"at layer {step.layer} (the main step)" in text or "(another step)" in text
    old = json.loads(found.to_json())
    del old["steps"], old["main_layer"]
    before = Isolation.from_json(json.dumps(old))
    assert before.steps == ()
    assert f"layer {step.layer} (" not in before.summary().split("least is left")[0]
    show_listings(TABLES["isolate"](found))
