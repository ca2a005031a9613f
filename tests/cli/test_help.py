"""Help as a terminal of any width shows it, and what a shell completes."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest
import typer

from melens.cli import completing
from melens.cli.app import app
from melens.cli.help import help_of

GROUP = typer.main.get_command(app)
COMMANDS = {"melens": GROUP, **GROUP.commands}
STYLE = re.compile(r"\x1b\[[0-9;]*m")


def shown(name, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    command = COMMANDS[name]
    return STYLE.sub("", help_of(command, command.make_context(name, [], resilient_parsing=True)))


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_and_no_word_breaks(name, columns, monkeypatch):
    text = shown(name, columns, monkeypatch)
    lines = text.splitlines()
    assert max(map(len, lines)) <= columns
    words = set(text.split())
    command = COMMANDS[name]
    said = [inspect.cleandoc(command.help or ""), *(p.help or "" for p in command.params)]
    assert {word for one in said for word in one.split() if '"' not in word} <= words
    spelt = {part for p in command.params for part in (*p.opts, *p.secondary_opts)}
    assert {flag for flag in spelt if flag.startswith("-")} <= {word.rstrip(",") for word in words}
    assert not re.search(r"\d{7,}|\N{HORIZONTAL ELLIPSIS}", text)  # no bound of a computer's


def test_an_example_can_be_copied(monkeypatch):
    text = shown("patch", 80, monkeypatch)
    assert text.count('--corrupted "The') + text.count('"The capital of Italy is"') >= 1
    for quoted in ('"The capital of France is"', '"The capital of Italy is"', '" Rome"'):
        assert quoted in text
    example = text.split("Examples:\n")[1].split("\n\n")[0].splitlines()
    assert [line.endswith(" \\") for line in example] == [True] * (len(example) - 1) + [False]


def test_ranges_choices_and_defaults_are_said(monkeypatch):
    text = " ".join(shown("eval", 80, monkeypatch).split())
    assert (
        "--mask-rate NUMBER Share of the dimensions that is masked. Default: 0.5. [0 to 1]" in text
    )
    assert "[one of float32, bfloat16, float16, auto; environment: MELENS_DTYPE]" in text
    assert "--seed INT Of the bootstrap. [at least 0; default: 0]" in text
    assert "-o, --out PATH Folder for the JSON and the figures." in text


def test_models_results_and_metrics_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "more").mkdir()
    for name in ("m.gguf", "m.json", "m.txt", ".hidden.gguf"):
        (tmp_path / name).write_text("")
    assert completing.models("m") == ["m.gguf", "mine", "more/"]
    assert completing.models(f"{tmp_path}/mi") == [f"{tmp_path}/mine"]
    assert completing.models_and_results("m") == ["m.gguf", "m.json", "mine", "more/"]
    assert completing.models("smol") == completing.named_models("smol") == ["smollm2-135m"]
    assert completing.models("nowhere/x") == []
    assert "effective_rank" in completing.metrics("eff")


def test_a_shell_is_answered():
    code = "from melens.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            "PATH": "",
            "_MELENS_COMPLETE": "complete_bash",
            "COMP_WORDS": "melens locate smol",
            "COMP_CWORD": "2",
            "PYTHONPATH": ":".join(filter(None, sys.path)),
        },
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["smollm2-135m"], done.stderr
