"""Rows of JSON: checked whole before any model is there; only answers are trained on."""

from __future__ import annotations

import json

import pytest

from melens.errors import PromptError
from melens.finetuning.data import IGNORED, read_training_data, tokenise


@pytest.fixture
def written(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


GOOD = {"question": "w5 w6", "answer": "w7"}
ASKED = {"role": "user", "content": "w5"}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([""], "nothing but blank lines"),
        ([GOOD, "{"], "line 2: no JSON object"),
        ([GOOD, [1]], "line 2: no JSON object"),
        ([GOOD, {"question": "w5"}], "line 2: no answer; the file's rows have question, answer"),
        ([GOOD, {"question": "w5", "answer": " "}], "line 2: answer must be a text"),
        ([{"text": "w5"}], "line 1: a row has text; give messages"),
        ([{"messages": []}], "line 1: the last message must be the assistant's"),
        ([{"messages": [ASKED]}], "line 1: the last message must be the assistant's"),
        ([{"messages": [{"role": "tool", "content": "x"}]}], "line 1: message 1 has the role 'to"),
        ([{"messages": [{"role": "user", "content": 3}]}], "line 1: message 1 must have"),
        ([{"prompt": "w5", "chosen": "w6", "rejected": "w6 "}], "line 1: chosen and rejected"),
        ([{"prompt": [ASKED, ASKED | {"role": "assistant"}], "completion": "w6"}], "the user's"),
    ],
)
def test_a_bad_line_is_named(written, rows, says):
    with pytest.raises(PromptError) as said:
        read_training_data(written(*rows))
    assert says in str(said.value)


def test_the_prompt_is_not_trained_on(written, tokenizer):
    rows = tokenise(read_training_data(written(GOOD)), tokenizer, max_tokens=32)
    (ids,), (labels,) = rows.ids, rows.labels
    trained = [token for token in labels if token != IGNORED]
    assert tokenizer.decode(trained) == f"w7 {tokenizer.eos_token}"
    assert ids[-len(trained) :] == tuple(trained)
    assert len(labels) == len(ids)


def test_a_template_frames_prompt_and_answer(written, tokenizer, monkeypatch):
    """Independent: the whole conversation in the template is the row."""
    made = "{% for m in messages %}{{ '<s> ' + m.content + ' ' }}{% endfor %}"
    made += "{% if add_generation_prompt %}{{ '<s> ' }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", made)
    turns = [ASKED, {"role": "assistant", "content": "w8 w9"}]
    rows = tokenise(read_training_data(written({"messages": turns})), tokenizer, max_tokens=32)
    assert rows.chat
    assert tokenizer.decode(rows.ids[0]) == "<s> w5 <s> w8 w9"
    assert tokenizer.decode([t for t in rows.labels[0] if t != IGNORED]) == "w8 w9"


def test_long_rows_are_counted_never_cut(written, tokenizer):
    pair = {"prompt": "w5 w6", "chosen": "w7", "rejected": "w8 " * 40}
    path = written({**pair, "rejected": "w8"}, pair)
    rows = tokenise(read_training_data(path), tokenizer, max_tokens=20)
    assert (rows.lines, rows.too_long) == ((1,), (2,))
    with pytest.raises(PromptError, match="all 2 rows"):
        tokenise(read_training_data(path), tokenizer, max_tokens=3)
    long = {"prompt": [ASKED, {"role": "assistant", "content": "w6"}, ASKED], "completion": "w7"}
    with pytest.raises(PromptError, match="line 1: a conversation of 4 messages needs a chat"):
        tokenise(read_training_data(written(long)), tokenizer, max_tokens=20)
