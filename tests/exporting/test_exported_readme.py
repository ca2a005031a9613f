"""An exported model folder says what it is without melens, and how to load it right."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from melens.exporting import export
from melens.models.files import check_folder
from melens.results.edit import Edit

EDIT = Edit(rate=0.5, select="product", layers=(1, 2))


@pytest.fixture
def plain(make_tiny, tokenizer, tmp_path):
    make_tiny("llama").save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def folder(plain):
    return export(plain, EDIT, out=plain.parent / "masked")


def test_the_readme_warns_and_its_lines_put_the_edit_in_force(folder, monkeypatch, capsys):
    text = (folder / "README.md").read_text("utf-8")
    assert "is the model WITHOUT the edit" in " ".join(text.split())
    assert EDIT.label in text
    for way in ("melens.load", "--format prefix", "--format peft"):
        assert way in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code, names)
    ids = torch.tensor([[1, 5, 9, 12, 7, 30]])
    with torch.no_grad():
        edited = names["model"](ids)
        alone = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        names["model"].melens_edit.close()
        closed = names["model"](ids)
    assert not torch.allclose(edited, alone, atol=1e-3)
    torch.testing.assert_close(closed, alone, rtol=1e-4, atol=1e-4)
    assert EDIT.label in capsys.readouterr().out


def test_export_says_it_aloud_and_a_second_export_replaces_it(folder, capsys, plain):
    from melens.cli.commands.export import show_export

    show_export(folder, as_json=False)
    said = capsys.readouterr().err
    assert "WITHOUT the edit" in said
    assert os.fspath(folder / "README.md") in said
    export(plain, Edit(name="none"), out=folder)
    assert not (folder / "README.md").exists()
    show_export(folder, as_json=True)
    assert "WITHOUT" not in capsys.readouterr().err


def test_the_config_says_that_the_edit_is_not_applied(folder, plain):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    said = config.pop("melens_edit")
    assert said["applied"] is False
    assert said["name"] == "wemask"
    assert said["label"] == EDIT.label
    assert "WITHOUT the edit" in said["note"]
    before = json.loads((plain / "config.json").read_text("utf-8"))
    assert config == before
    read = AutoModelForCausalLM.from_pretrained(folder)
    assert read.config.melens_edit == said  # whatever reads the config can see it
    check_folder(folder, trust_remote_code=False)
    again = export(folder, EDIT, out=folder.parent / "again")
    assert (again / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_an_edit_that_is_no_constant_prefix_is_not_said_to_be_one(plain, tmp_path):
    edit = Edit(name="drop-key", layers=(1,))
    text = (export(plain, edit, out=tmp_path / "made") / "README.md").read_text("utf-8")
    assert "cannot hold `drop-key`" in text
    assert "load_prefix" not in text
