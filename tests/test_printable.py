"""Text from outside: nothing in a model, a tokenizer, a policy or a result moves the cursor."""

from __future__ import annotations

import ast
import json
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import pytest
from planted import plant
from planted_report import SAVED, report

from melens.cli.app import main
from melens.errors import MelensError, PromptError, UnknownNameError
from melens.formatting import brief, printable

EVIL = "\x1b[2J\x9b31m\u202egnp\u200b\ud800\u2028\x07"
SHOWN = r"\x1b[2J\x9b31m\u202egnp\u200b\ud800\u2028\x07"
SAVABLE = EVIL.replace("\ud800", "")
"""No file system, tokenizer or JSON of pydantic's holds a lone surrogate."""
CLI = Path(__file__).parent.parent / "melens" / "cli"


def is_safe(text: str) -> bool:
    """Independent of melens.formatting: no control but line breaks and tabs, nothing invisible."""
    bad = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return not [c for c in text if unicodedata.category(c) in bad and c not in "\n\t"]


def test_what_is_no_shape_is_escaped_and_escaping_twice_changes_nothing():
    assert printable(EVIL) == SHOWN == printable(SHOWN)
    assert printable("a\nb\tc\x7f") == r"a\nb\tc\x7f"
    assert printable("a\nb\tc\r", keep="\n\t") == "a\nb\tc\\r"
    assert printable("\U000e0041\ufeff\ufffe\U0001fffe") == r"\U000e0041\ufeff\ufffe\U0001fffe"


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "Größe, naïve\u00a0!",
        "日本語\u3000の",
        "می‌خواهم",
        "क्‍ष",
        "שלום",
        "مرحبا",
        "👩‍👩‍👧 ❤️‍🔥",
        "\u0661\u06dd",
        "C:\\x1b",
        "e\u0301",
        "\ue000",
    ],
)
def test_ordinary_text_of_any_script_is_left_alone(text):
    assert printable(text) == text


def test_a_joiner_that_joins_no_letters_is_shown():
    assert printable("pass\u200dword \u200c\u0645") == r"pass\u200dword \u200c" + "\u0645"
    assert printable("\u200c\u0645\u0645") == r"\u200c" + "\u0645\u0645"


def test_every_character_there_is():
    """Over all of Unicode: what stays in a lone character is a shape or one of the Arabic signs."""
    signs = set("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2")
    signs |= {"\U000110bd", "\U000110cd"}
    for code in (*range(0x3000), *range(0xD000, 0x11000), *range(0x1D000, 0x1E000), 0xE0001):
        c = chr(code)
        left_alone = printable(c) == c
        assert left_alone == (c in signs or (is_safe(c) and c not in "\n\t" and not _never(code)))


def _never(code: int) -> bool:
    return 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE


def test_a_value_is_cut_before_it_is_expanded():
    bomb: list = ["x"]
    for _ in range(60):  # 2 ** 60 strings, if somebody wrote them out
        bomb = [bomb, bomb]
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (bomb, deep, 10**100_000, -(10**100_000), {"k" * 10**6: bomb}, EVIL * 1000):
        assert len(brief(value)) <= 60
        assert is_safe(brief(value))
    assert brief("four") == "'four'"
    assert brief([1, 2.5, None, True]) == "[1, 2.5, None, True]"
    assert brief(12345678901234567890) == "12345678901234567890"


@pytest.mark.parametrize("kind", [MelensError, UnknownNameError, PromptError])
def test_an_error_is_safe_wherever_it_is_shown(kind):
    assert str(kind(f"bad {EVIL}")) == f"bad {SHOWN}"


def test_commands_print_through_one_module():
    """`print`, `typer.echo` and bare streams stand in render.py alone."""
    for path in sorted(CLI.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or path.name == "render.py":
                continue
            called = ast.unparse(node.func)
            assert called not in ("print", "typer.secho", "console.print"), path.name
            if called == "typer.echo":  # the version, which is ours
                assert "__version__" in ast.unparse(node), path.name
            if called in ("sys.stdout.write", "sys.stderr.write"):
                assert "printable(" in ast.unparse(node), path.name


def _poisoned(value):
    """Every token, name and sentence of a saved result ends in the worst text there is."""
    if isinstance(value, dict):
        return {key: _poisoned_text(key, part) for key, part in value.items()}
    return [_poisoned(part) for part in value] if isinstance(value, list) else value


def _poisoned_text(key: str, part):
    names = ("token", "model", "command", "dtype", "reason", "prompt", "label", "source", "text")
    if isinstance(part, str) and key in names:
        return f"{part}{SAVABLE}$x^"
    return _poisoned(part)


def _results():
    """The smallest published result of each kind."""
    from melens.results import load_result

    smallest: dict[str, Path] = {}
    paths = [path for path in SAVED.glob("*.*.json") if path.stat().st_size < 100_000]
    for path in sorted(paths, key=lambda path: path.stat().st_size):
        smallest.setdefault(path.suffixes[-2], path)
    found = [load_result(path) for path in smallest.values()]
    assert len(found) >= 7
    return found


def test_tables_figures_and_repr_of_hostile_results(capsys):
    from melens.cli.output import show

    for result in _results():
        kind = type(result)
        data = _poisoned(result.to_dict())
        try:
            bad = kind.from_json(json.dumps(data))
        except MelensError:  # this kind checks its words; then only the model's name is foreign
            data = result.to_dict()
            data["run"]["model"] += SAVABLE
            bad = kind.from_json(json.dumps(data))
        show(bad, as_json=False)
        show(bad, as_json=True)
        shown = capsys.readouterr()
        assert is_safe(shown.out + shown.err + repr(bad) + str(bad)), kind


def test_hostile_answers_as_json(capsys):
    from melens.cli.commands.export import show_answers

    row = {"prompt": EVIL, "without": EVIL, "with": EVIL, "first_difference": None}
    show_answers([row], label=EVIL, as_json=True)
    shown = capsys.readouterr().out
    assert is_safe(shown)
    assert json.loads(shown)["rows"] == [row]


def test_svg_text_is_xml(tmp_path):
    import matplotlib as mpl

    from melens.figures import draw

    for result in _results()[:4]:
        kind = type(result)
        data = result.to_dict()
        data["run"]["model"] += SAVABLE
        path = tmp_path / f"{kind.__name__}.svg"
        with mpl.rc_context({"svg.fonttype": "none"}):
            draw(kind.from_json(json.dumps(data))).savefig(path)
        text = "".join(ElementTree.fromstring(path.read_text("utf-8")).itertext())
        assert is_safe(text), kind


def test_junit_is_xml_and_shows_what_was_there():
    from melens.checking.junit import junit_xml

    made = junit_xml(report().model_copy(update={"model": f"m{EVIL}"}))
    assert ElementTree.fromstring(made.encode()).attrib["name"] == f"melens check m{SHOWN}"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A planted model in a hostile folder, whose tokens are hostile too."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    evil = SAVABLE
    folder = tmp_path_factory.mktemp("printable") / f"m{evil}"
    plant("llama", "single", 1).model.save_pretrained(folder)
    words = {{0: "<pad>", 1: "<s>", 2: "</s>"}.get(i, f"w{i}{evil}"): i for i in range(3, 128)}
    words |= {"<pad>": 0, "<s>": 1, "</s>": 2, "w": 127}
    words.pop(f"w127{evil}")
    made = Tokenizer(models.WordLevel(words, unk_token="w"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder, " ".join(f"w{3 + i % 100}{evil}" for i in range(60))


def test_a_walk_over_commands(hostile, tmp_path, capsys):
    from transformers.utils import logging

    folder, text = hostile
    policy = tmp_path / "p.toml"
    policy.write_text('name = "\\u001b[2J\\u202e"\n[rules.nothing-"\\u001b"]\n', "utf-8")
    named = tmp_path / "\x1b[2Jq\u202e.toml"
    named.write_text('[rules."\\u001b[2J"]\nthreshold = 1\n', "utf-8")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(
        json.dumps({"architectures": [f"A{EVIL}"], "model_type": f"t{EVIL}"})
    )
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps({"schema": f"x{EVIL}"}))
    out = tmp_path / "out\x1b[2J"
    short = ["--prompt", text, "--length", "20", "--bos"]
    few = ["--max-new-tokens", "3", "--located", out / "locate.json"]
    logging.disable_progress_bar()
    codes, said = {}, {}
    for name, command in {
        "locate": ["locate", folder, *short, "-o", out],
        "stream": ["locate", folder, *short, "--stream"],
        "scan": ["scan", folder],
        "generate": ["generate", folder, "--prompt", f"<s>{text[:40]}", *few],
        "known": ["known", "smollm2-135m", out / "locate.json"],
        "diff": ["diff", out / "locate.json", out / "locate.json"],
        "plot": ["plot", out / "locate.json", "-o", tmp_path / "a\x1b[2J.png"],
        "ending": ["plot", out / "locate.json", "-o", tmp_path / "a.\x1b[2J"],
        "odd": ["plot", odd, "-o", tmp_path / "a.png"],
        "broken": ["locate", broken],
        "broken scan": ["scan", broken],
        "missing": ["locate", f"no{EVIL}"],
        "policy": ["check", folder, "--policy", policy],
        "policy name": ["check", folder, "--policy", named],
        "option": ["locate", f"--no{EVIL}"],
        "debug": ["--debug", "plot", odd, "-o", tmp_path / "a.png"],
    }.items():
        with pytest.raises(SystemExit) as done:
            main([str(part) for part in command])
        shown = capsys.readouterr()
        codes[name] = done.value.code or 0
        assert is_safe(shown.out + shown.err), name
        said[name] = shown.err
    good = {"locate", "stream", "scan", "generate", "diff", "plot", "known"}
    assert not {name: said[name] for name in good if codes[name]}
    assert {codes[name] for name in codes.keys() - good} <= {2, 3}


def test_every_error_is_one_line_whatever_it_quotes():
    """A key of a config or of a result may be a line break; found by 5,000 examples."""
    from melens.errors import MelensError, ResultError

    for kind in (MelensError, ResultError):
        assert str(kind("the key '\n' of\ta file")) == r"the key '\n' of\ta file"
