"""What is said where a result is not of the model that was named, or of another kind."""

from __future__ import annotations

from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("smollm2-135m", "smollm2-135m", True),
        ("Qwen3-8B", "Qwen/Qwen3-8B", True),
        ("/tmp/Qwen3-8B/", "qwen3-8b", True),
        ("m.gguf", "M", True),
        ("gemma3-270m", "smollm2-135m", False),
        ("Qwen3-8B", "Qwen/Qwen3-8B-Base", False),
    ],
)
def test_names_are_the_same_without_what_stands_before_them(one, other, same):
    from melens.published import same_name

    assert same_name(one.rstrip("/"), other) is same


def known(model, file, capsys):
    from melens.cli.app import _run

    code = _run(["known", model, str(RESULTS / file)], debug=False)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_result_of_another_model_is_said(capsys):
    own = known("smollm2-135m", "smollm2-135m.locate.json", capsys)
    assert (own[0], own[2]) == (0, "")
    other = known("gemma-7b", "smollm2-135m.locate.json", capsys)
    assert "is a result of smollm2-135m; it is held against gemma-7b" in other[2]


def test_a_name_on_record_without_such_a_number_is_not_called_unknown(capsys):
    _, out, _ = known("Qwen/Qwen2.5-7B-Instruct", "smollm2-135m-bos.sinks.json", capsys)
    assert "is on record, but without a number of this kind and size" in out
    _, out, _ = known("smollm2-135m", "smollm2-135m-bos.super-weights.json", capsys)
    assert "known compares locate, scan, super-weights" in out
    _, out, _ = known("qwen-nowhere-12x", "smollm2-135m-bos.sinks.json", capsys)
    assert "nothing published is on record for this name" in out
