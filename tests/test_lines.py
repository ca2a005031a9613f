"""Readers of lines: files of items, of prompts and of texts, whatever is in them."""

from __future__ import annotations

import io
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from melens.batches import prompts, read_lines, read_text
from melens.cli.commands.export import prompts_of
from melens.errors import MelensError, PromptError
from melens.evaluating.harness.data import items
from melens.evaluating.scoring import read_prompts
from melens.evaluating.tasks import read_jsonl
from melens.inputs import prepare
from melens.settings import Items
from melens.store import is_text, json_object, lines_of

EXAMPLES = int(os.environ.get("MELENS_FUZZ", "100"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ODD = "a\u2028b\u0085c\x0bd\x0ce\x1cf\u2029g"
FIELDS = ("question", "answer")


class Stdin:
    def __init__(self, raw: bytes) -> None:
        self.buffer = io.BytesIO(raw)


def test_only_newlines_end_a_line():
    assert lines_of(f"{ODD}\r\nb\n\nc") == [ODD, "b", "", "c"]
    assert lines_of("a\n") == ["a"]
    assert lines_of("") == []
    assert lines_of("a\rb") == ["a\rb"]


def test_items_keep_the_separators_in_their_strings(tmp_path):
    row = {"question": ODD, "answer": f"{ODD} #### 4"}
    path = tmp_path / "gsm8k" / "test.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps(row) + "\n", "utf-8")
    assert read_jsonl(Items(path), "", FIELDS) == [row, row]
    assert [doc["question"] for doc in items("gsm8k", tmp_path)] == [ODD, ODD]


def test_prompts_and_texts_keep_them_too(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", Stdin(f"{ODD}\nw5\n\n".encode()))
    assert prompts_of(["-"]) == [ODD, "w5"]
    path = tmp_path / "texts.txt"
    path.write_bytes(f"{ODD}\r\n\n  \nw5 w6".encode())
    assert read_lines(path) == [ODD, "w5 w6"]


def test_a_line_that_is_too_short_is_named_and_so_is_a_file_of_blank_lines(tmp_path, tiny):
    path = tmp_path / "texts.txt"
    path.write_text("\nw5 w6 w7 w8\n  \nw5\nw5 w6 w7 w8 w9\n")
    with pytest.raises(PromptError, match=rf"^line 4 of {path} has 1 token\(s\); melens needs"):
        prepare(tiny, prompts(read_lines(path)))
    with pytest.raises(PromptError, match=r"^sequence 1 has 1 token"):
        prepare(tiny, ["w5 w6 w7 w8", "w5"])
    for raw, says in (("\n  \n", "holds nothing but blank lines"), ("", "is empty")):
        path.write_text(raw)
        for read in (read_lines, read_text):
            with pytest.raises(PromptError, match=f"^{path} {says}"):
                read(path)


def test_half_a_surrogate_pair_is_no_text(tmp_path, tokenizer):
    from melens.batches import encode

    assert not is_text(json.loads('"\\ud800"'))
    path = tmp_path / "items.jsonl"
    path.write_text('{"question": "\\ud800", "answer": "a"}\n')
    with pytest.raises(PromptError, match="line 1: no object"):
        read_jsonl(Items(path), "", FIELDS)
    with pytest.raises(PromptError, match="half of a surrogate pair"):
        encode(tokenizer, "w5 \ud800", bos=None)


def test_json_that_is_too_deep_is_no_object():
    assert json_object("[" * 100_000) is None
    assert json_object('{"a": ' * 100_000) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
ITEM = st.fixed_dictionaries(
    {}, optional={"question": JSON, "answer": JSON, "problem": JSON, "prompt": JSON, "key": JSON}
)
LINE = st.one_of(
    ITEM.map(lambda row: json.dumps(row).encode()),
    ITEM.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=40),
    st.integers(1, 5000).map(lambda n: b'{"question":' + b"[" * n),
)
FILE = st.lists(LINE, max_size=6).flatmap(
    lambda lines: st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r"]).map(lambda end: end.join(lines))
)


def calm(read):
    """Reads, or refuses in one line."""
    try:
        return read()
    except MelensError as error:
        if "\n" in str(error):
            raise AssertionError("more than one line") from error
        return None


@FUZZ
@given(raw=FILE)
def test_any_file_of_items_is_read_or_refused(raw, tmp_path):
    for task, name in (("gsm8k", "gsm8k/test.jsonl"), ("ifeval", "ifeval/input_data.jsonl")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(raw)
        found = calm(lambda path=path: read_jsonl(Items(path), "", FIELDS)) or []
        assert all(is_text(row[field]) for row in found for field in FIELDS)
        calm(lambda task=task: items(task, tmp_path))


@FUZZ
@given(raw=st.one_of(FILE, st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_any_file_of_prompts_is_read_or_refused(raw, tmp_path):
    path = tmp_path / "texts"
    path.write_bytes(raw)
    lines = calm(lambda: read_lines(path)) or []
    assert all(line.strip() and "\n" not in line for line in lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", Stdin(raw))
        calm(lambda: prompts_of(["-"]))
    path.write_bytes(b"id,prompt,label\n" + raw)
    calm(lambda: read_prompts(path))
