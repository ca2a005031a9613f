"""What is of the wrong type is one of melens' own errors, said before any work."""

from __future__ import annotations

import pytest

import melens
from melens.errors import MelensError
from melens.exporting.folder import check_out
from melens.models.anatomy import check_layer
from melens.published import known, published_profile
from melens.results import load_result
from melens.tuning import Budget

SAVED = "docs/results/smollm2-135m.locate.json"
FAR = "no-such-model"
"""Loading it would be another error."""


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: melens.load(None), r"got a NoneType; give a name, a path or a model"),
        (lambda: melens.scan(5), r"scan\(\) reads files, and got a int"),
        (lambda: known("x", 5), "got int"),
        (lambda: known(5, load_result(SAVED)), "as text, got 5"),
        (lambda: published_profile(None), "as text, got None"),
        (lambda: melens.check(FAR, out=5), "out must be a path, got 5"),
        (lambda: melens.check(FAR, out=""), "out must be a path, got ''"),
        (lambda: melens.finetune(FAR, "x.jsonl", out=5), "out must be a path, got 5"),
        (lambda: check_out(5), "out must be a path, got 5"),
        (lambda: check_out(""), "out must be a path, got ''"),
        (lambda: melens.comparing.census(5), "models must be names and paths, got 5"),
        (lambda: melens.comparing.census(FAR, out=5), "out must be a path, got 5"),
        (lambda: Budget("x"), "one of them and over 0; got evaluations='x'"),
        (lambda: Budget(True), "got evaluations=True"),
        (lambda: Budget(5, confirm="x"), "confirm must be a whole number, at least 1, got 'x'"),
        (lambda: load_result(SAVED).to_frame(columns=5), "columns must be a list of names, got 5"),
    ],
)
def test_a_wrong_type_is_one_sentence(call, says, monkeypatch):
    monkeypatch.chdir(__file__.rsplit("/", 2)[0])
    with pytest.raises(MelensError, match=says):
        call()


def test_a_layer_that_is_not_a_number_names_no_bound_of_a_computers(bridged):
    for wrong in ("x", 1.5, None, True):
        with pytest.raises(MelensError, match=rf"^layer must be a whole number, got {wrong!r}\.$"):
            check_layer(bridged("llama"), wrong)
