from __future__ import annotations

import inspect

import pytest

from melens import errors
from melens.registry import Registry


def test_registry_refuses_duplicates_and_suggests_what_was_meant():
    things: Registry[int] = Registry("metric")
    things.add("effective_rank", 1)
    assert things["effective_rank"] == 1
    assert "nothing" not in things
    with pytest.raises(errors.DuplicateNameError, match="'effective_rank' is registered already"):
        things.add("effective_rank", 2)
    with pytest.raises(errors.UnknownNameError) as caught:
        things["efective_rank"]
    assert str(caught.value) == (
        "unknown metric 'efective_rank'. Did you mean 'effective_rank'? Known: effective_rank."
    )

    for wrong in (3, None, [], {}):
        assert wrong not in things
        with pytest.raises(errors.UnknownNameError, match="a metric is chosen by its name, got"):
            things[wrong]


def test_every_error_has_an_exit_code_of_the_convention():
    classes = [k for _, k in inspect.getmembers(errors, inspect.isclass)]
    kinds = [k for k in classes if not issubclass(k, Warning)]
    assert len(kinds) > 10
    for kind in kinds:
        assert issubclass(kind, errors.MelensError)
        assert kind.exit_code in (errors.BAD_INPUT, errors.COULD_NOT_RUN)
