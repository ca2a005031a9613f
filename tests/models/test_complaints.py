"""Damaged tokenizers and configs: one line that names the file, the setting and what to do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from melens.cli.app import _run
from melens.models import complaints
from melens.models.complaints import with_setting

TOKENIZER, SETTINGS, CONFIG = "tokenizer.json", "tokenizer_config.json", "config.json"
READS = {CONFIG: ("locate", "locate --stream", "scan"), "generation_config.json": ("locate",)}
DAMAGE = {
    "cut": (TOKENIZER, 200, "Expecting value"),
    "empty": (TOKENIZER, 0, "Expecting value"),
    "a list": (TOKENIZER, "[]", "not a JSON object"),
    "nothing in it": (TOKENIZER, "{}", "Model missing"),
    "a model of a wrong type": (TOKENIZER, {"model": 3}, "ModelUntagged"),
    "no added tokens": (TOKENIZER, {"added_tokens": None}, "added_tokens|sequence"),
    "a token without an id": (TOKENIZER, {"added_tokens": [{}]}, "missing field `id`"),
    "not UTF-8": (TOKENIZER, b"\xff\xfe", "utf-8"),
    "no file": (TOKENIZER, None, "holds no tokenizer.json; put the files"),
    "settings cut": (SETTINGS, 5, "line 2"),
    "settings are a number": (SETTINGS, "3", "not a JSON object"),
    "class": (SETTINGS, {"tokenizer_class": 3}, "tokenizer_class = 3"),
    "bos": (SETTINGS, {"bos_token": 3}, "bos_token"),
    "length": (SETTINGS, {"model_max_length": "x"}, "model_max_length is 'x'"),
    "map": ("special_tokens_map.json", "[]", "not a JSON object"),
    "template": ("chat_template.jinja", b"\xff", "utf-8"),
    "config cut": (CONFIG, 50, "double quotes|Expecting|delimiter"),
    "no type": (CONFIG, {"model_type": None}, "has no model_type"),
    "activation": (CONFIG, {"hidden_act": "nope"}, "hidden_act = 'nope'; KeyError"),
    "rope": (CONFIG, {"rope_parameters": {"rope_type": "nope"}}, "rope_parameters = "),
    "dtype": (CONFIG, {"dtype": "nope"}, "dtype = 'nope'"),
    "layer types": (CONFIG, {"layer_types": 3}, "layer_types = 3"),
    "quantised": (CONFIG, {"quantization_config": 3}, "quantization_config = 3"),
    "code": (CONFIG, {"auto_map": 3}, "auto_map = 3"),
    "generation": ("generation_config.json", "[]", "not a JSON object"),
}


@pytest.fixture(scope="module")
def saved(make_tiny, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make_tiny("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def damage(path, how):
    if how is None:
        path.unlink()
    elif isinstance(how, int):
        path.write_bytes(path.read_bytes()[:how])
    elif isinstance(how, bytes):
        path.write_bytes(how)
    elif isinstance(how, dict):
        path.write_text(json.dumps({**json.loads(path.read_text()), **how}))
    else:
        path.write_text(how)


PAIRS = [
    (command, name)
    for name, (file, _, _) in DAMAGE.items()
    for command in READS.get(file, ("locate", "locate --stream"))
]


@pytest.mark.parametrize(("command", "name"), PAIRS)
def test_one_line_names_the_file_and_the_setting(name, command, saved, tmp_path, capfd):
    file, how, says = DAMAGE[name]
    folder = shutil.copytree(saved, tmp_path / "model")
    damage(folder / file, how)
    capfd.readouterr()
    assert _run([command.split()[0], str(folder), *command.split()[1:]], debug=False) == 2
    (said,) = re.findall(r"^melens: .*", capfd.readouterr().err, re.MULTILINE)
    assert file in said
    assert re.search(says, said)
    assert "tokenizer=" not in said


def test_the_setting_named_is_the_one_without_which_all_is_right():
    def attempt(settings):
        if "bad" in settings:
            raise ValueError("no such thing")
        if "size" not in settings:
            raise TypeError("needs more")

    settings = {"size": 3, "bad": "x", "more": 1}
    assert with_setting(ValueError("no such thing"), settings, attempt) == (
        "bad = 'x'; ValueError: no such thing"
    )

    def starved(settings):
        raise MemoryError

    with pytest.raises(MemoryError):
        with_setting(ValueError("no such thing"), settings, starved)


@pytest.mark.parametrize("why", ["no links", "remote code", "large"])
def test_a_tokenizers_setting_is_not_looked_for_where_it_cannot_be(
    why, saved, tmp_path, monkeypatch
):
    folder = shutil.copytree(saved, tmp_path / "model")
    damage(folder / SETTINGS, {"tokenizer_class": 3})
    tried = []

    def no_link(self, target):
        raise OSError("no privilege")

    if why == "no links":
        monkeypatch.setattr(Path, "symlink_to", no_link)
    if why == "large":
        monkeypatch.setattr(complaints, "LARGE", 10)
    read = None if why == "remote code" else tried.append
    said = str(complaints.no_tokenizer(folder, TypeError("not this"), read))
    assert "tokenizer_config.json is not right (TypeError: not this)" in said
    assert not tried
