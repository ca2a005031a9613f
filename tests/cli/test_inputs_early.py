"""Inputs that are refused before a model is loaded, and lines as texts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from full_disk import FullDisk

from melens.cli.app import main
from melens.cli.output import source
from melens.errors import PromptError
from melens.framing import require_known
from melens.settings import Items
from melens.tuning import tune
from melens.tuning.items import check_enough

FAR = "no-such-model"
"""Loading it would be another error."""
SAVED = Path(__file__).parents[2] / "docs" / "results" / "smollm2-135m.locate.json"


@pytest.mark.parametrize(
    "texts",
    [
        ["w5 w6"] * 20,
        "w5 w6 w7 w8",
        torch.arange(5, 45).reshape(10, 4),
        Items(n=12),
    ],
)
def test_too_few_items_are_refused_before_the_model(texts):
    with pytest.raises(PromptError, match=r"different items make .* it takes at least 10 and 20"):
        tune(FAR, texts)


def test_what_may_be_enough_is_not_refused(tmp_path):
    check_enough(None, "loss", 0.5)
    check_enough([f"w{i} w7 w8 w9" for i in range(40)], "loss", 0.5)
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "w5", "answer": "w6"}\n' * 38)
    with pytest.raises(PromptError, match="38 different items"):
        tune(FAR, path, "gsm8k-likelihood")
    path.write_text('{"question": "w5", "answer": "w6"}\n' * 40)
    check_enough(path, "gsm8k-likelihood", 0.5)


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", FAR, "-o", "OUT"],
        ["export", FAR, "--bake", "neuron:1,2", "-o", "OUT"],
        ["export", FAR, "--format", "prefix", "--search-prefix", "2", "-o", "OUT"],
        ["locate", FAR, "-o", "OUT"],
        ["sidecar", FAR, "-o", "OUT.json"],
        ["census", FAR, "--parquet", "OUT.parquet"],
        ["plot", str(SAVED), "-o", "OUT.png"],
        ["results", "no-such-sweep", "--csv", "OUT.csv"],
        ["finetune", FAR, "--data", "no-such-rows", "-o", "OUT"],
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("tempfile.TemporaryFile", FullDisk)
    monkeypatch.setattr("melens.figures.save_figure", lambda *_: pytest.fail("drawn"))
    with pytest.raises(SystemExit) as done:
        main([word.replace("OUT", str(tmp_path / "out")) for word in arguments])
    said = capsys.readouterr().err
    assert done.value.code == 3
    assert said.count("\n") == 1
    assert re.match(rf"melens: cannot write .*{tmp_path}.*: No space left on device; ", said)


def test_a_folder_is_no_file_to_write(tmp_path, capsys):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(SystemExit) as done:
        main(["sidecar", FAR, "-o", str(tmp_path / "a.json")])
    assert done.value.code == 2
    assert "a.json is a folder; name a file to write" in capsys.readouterr().err


def test_lines_are_texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("w5 w6\u2028w7\n\nw8 w9 w10\n", "utf-8")
    assert source(path, None, lines=True) == ["w5 w6\u2028w7", "w8 w9 w10"]
    assert source(path, None) == path
    for text, prompt in ((None, None), (None, ["w5"])):
        with pytest.raises(PromptError, match=r"--lines makes every line of --text a text"):
            source(text, prompt, lines=True)
    with pytest.raises(PromptError, match="cannot read"):
        source(Path("nowhere.txt"), None, lines=True)


def test_ids_beyond_the_embedding_are_named():
    require_known([[0, 63], [5]], 64)
    for rows in ([[5, 64]], [[-1, 5]]):
        with pytest.raises(PromptError, match="the vocabulary is 0 to 63"):
            require_known(rows, 64)


def test_the_harness_works_without_any_special_token(make_tiny):
    pytest.importorskip("lm_eval")  # comes with melens[eval]
    from lm_eval.api.instance import Instance
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from melens.evaluating.harness.model import Generator

    bare = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w3"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=bare)
    assert not made.all_special_ids
    lm = Generator(make_tiny("llama"), made, batch_size=2)
    assert lm.tok_decode(None) is None
    asked = [
        Instance(
            request_type="generate_until",
            doc={},
            idx=0,
            metadata=("t", 0, 1),
            arguments=(text, {"until": ["w99"], "max_gen_toks": 3, "do_sample": False}),
        )
        for text in ("w5 w6 w7", "w8")
    ]
    assert all(len(answer.split()) == 3 for answer in lm.generate_until(asked, disable_tqdm=True))
    assert not made.all_special_ids
