from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from melens import batches
from melens.batches import Batch, bundled_texts, prompts, read_lines, strings_of
from melens.errors import PromptError

WORDS = " ".join(f"w{i}" for i in range(10, 30))


def test_positions_count_real_tokens_whatever_the_padding_side():
    for side in ("right", "left"):
        batch = Batch.pad([[5, 6, 7], [8]], side=side)
        assert batch.padded
        assert batch.positions[0].tolist() == [0, 1, 2]
        assert batch.positions[1][batch.mask[1]].tolist() == [0]
        assert set(batch.positions[1][~batch.mask[1]].tolist()) == {-1}
    with pytest.raises(PromptError, match="'middle' is neither"):
        Batch.pad([[1]], side="middle")


def test_batches_refuse_empty_rows():
    with pytest.raises(PromptError, match=r"\[batch, pos\] and not empty"):
        Batch.of(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(PromptError, match="a real token in every row"):
        Batch.of(torch.ones(2, 2, dtype=torch.long), torch.tensor([[True, True], [False, False]]))


def test_long_texts_are_cut_and_every_piece_keeps_the_bos(tokenizer):
    rows = prompts(WORDS, n=10, length=6, bos=True).token_rows(tokenizer)
    assert [len(row) for row in rows] == [6, 6, 6, 6]
    assert all(row[0] == 1 for row in rows)
    assert [i for row in rows for i in row[1:]] == list(range(10, 30))


def test_bos_follows_the_tokenizer_unless_forced(tokenizer):
    assert prompts("w5 w6").token_rows(tokenizer) == [[5, 6]]
    assert prompts("w5 w6", bos=True).token_rows(tokenizer) == [[1, 5, 6]]
    assert prompts("<s> w5", bos=True).token_rows(tokenizer) == [[1, 5]]
    assert prompts("<s> w5", bos=False).token_rows(tokenizer) == [[5]]


def test_first_pieces_of_all_texts_come_before_second_ones(tokenizer):
    rows = prompts(["w5 w6 w7 w8", "w9 w10 w11"], n=3, length=2).token_rows(tokenizer)
    assert rows == [[5, 6], [9, 10], [7, 8]]


def test_a_tail_of_a_few_tokens_is_dropped_but_a_short_text_is_not(tokenizer):
    text = " ".join(f"w{i}" for i in range(40, 63))
    assert [len(r) for r in prompts(text, n=9, length=10).token_rows(tokenizer)] == [10, 10]
    assert [len(r) for r in prompts("w5 w6", length=10).token_rows(tokenizer)] == [2]


def test_one_token_texts_make_one_token_rows_and_overlong_lengths_are_refused(tokenizer):
    assert prompts("w5").token_rows(tokenizer) == [[5]]
    with pytest.raises(PromptError, match="length 128 is over the model's context of 64"):
        prompts("w5", length=128).token_rows(tokenizer, max_length=64)
    long = " ".join(["w5"] * 300)
    assert len(prompts(long).token_rows(tokenizer, max_length=64)[0]) == 64
    assert len(prompts(long).token_rows(tokenizer)[0]) == 128


@pytest.mark.parametrize("wrong", [[], [1, 2], {"a": "b"}])
def test_what_is_no_text_is_refused(wrong):
    with pytest.raises(PromptError, match="texts must be a string, a Path or a list"):
        strings_of(wrong)


def test_a_file_name_given_as_text_is_caught(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("w5 w6")
    with pytest.raises(PromptError, match=r"'corpus\.txt' is a file here; to read it pass"):
        prompts("corpus.txt")


@pytest.mark.parametrize("text", ["", "  \n", ["w5", ""]])
def test_empty_texts_are_refused(text):
    with pytest.raises(PromptError, match="is empty; give at least one character"):
        prompts(text)


def test_stdin_is_read_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(batches, "TEXT", 1000)
    for read in (prompts, read_lines):
        with Path("/dev/zero").open() as endless, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", endless)
            with pytest.raises(PromptError, match="more than 1,000 bytes"):
                read("-")


def test_files_and_stdin(tmp_path, monkeypatch, tokenizer):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfw5 w6")  # a byte order mark is no text
    assert prompts(file).token_rows(tokenizer) == [[5, 6]]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"w7")))
    assert prompts("-").token_rows(tokenizer) == [[7]]
    with pytest.raises(PromptError, match="cannot read the text"):
        prompts(Path("no such file"))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match=r"is not UTF-8 \(byte 0\)"):
        prompts(file)


def test_names_that_no_file_can_have():
    with pytest.raises(PromptError, match=r"cannot read the text .*null"):
        prompts(Path("a\0b"))
    long = "\u4e00" * 199  # 597 bytes
    assert prompts(long).texts == (long,)


def test_bad_arguments_are_refused(tokenizer):
    with pytest.raises(PromptError, match="n must be a whole number, at least 1, got 0"):
        prompts("w5", n=0)
    with pytest.raises(PromptError, match="drop bos"):
        prompts("w5", chat=True, bos=True)
    with pytest.raises(PromptError, match="no chat template"):
        prompts("w5", chat=True).token_rows(tokenizer)
    with pytest.raises(PromptError, match="batch_size must be a whole number, at least 1, got 0"):
        prompts("w5").pack(tokenizer, batch_size=0)


def test_packing_keeps_the_order(tokenizer):
    batches = prompts(["w5 w6", "w7", "w8 w9"]).pack(tokenizer, batch_size=2)
    assert [len(batch) for batch in batches] == [2, 1]
    assert batches[0].ids.tolist() == [[5, 6], [7, 0]]
    assert batches[1].ids.tolist() == [[8, 9]]


def test_a_repr_is_short_and_says_how_texts_are_cut():
    made = prompts(n=16, length=64, bos=True)
    assert repr(made) == "<Prompts: 15 texts, n=16, length=64, bos=True, chat=False>"
    assert made == prompts(n=16, length=64, bos=True) != prompts(n=16, length=64)


def test_bundled_texts_are_varied_and_whole():
    texts = bundled_texts()
    assert len({text[0] for text in texts[:8]}) == 8
    assert all(len(text) > 400 for text in texts)
    folder = Path(__file__).parent.parent / "melens" / "texts"
    assert json.loads((folder / "json.txt").read_text("utf-8"))
    compile((folder / "code_1.txt").read_text("utf-8"), "code_1", "exec")
    assert len(bundled_texts(chat=True)) == 3
