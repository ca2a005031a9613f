"""The command line as a user meets it: one line on stderr, an exit code, never a traceback."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from planted import plant

from melens.cli import output
from melens.cli.app import main
from melens.results import load_result


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """A planted model with a tokenizer that knows all of its 128 ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("cli") / "planted"
    plant("llama", "single", 1).model.save_pretrained(folder)
    words = {{0: "<pad>", 1: "<s>", 2: "</s>"}.get(i, f"w{i}"): i for i in range(128)}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{10 + i % 100}" for i in range(200)))
    return str(path)


@pytest.fixture
def run(capsys):
    def go(*arguments):
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return done.value.code or 0, captured.out, captured.err

    return go


def test_locate_writes_its_files_and_says_one_sentence(run, model, text, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = run("locate", model, "--text", text, "--bos", "--length", 40, "-o", out)
    assert code == 0
    planted = plant("llama", "single", 1).truth
    assert f"ME Layer {planted.me_layer} of" in stdout
    assert "counted from 0" in stdout
    assert sorted(file.name for file in out.iterdir()) == [
        "locate.json",
        "profile.png",
        "profile.svg",
    ]
    code, stdout, _ = run("plot", out / "locate.json", "-o", out / "again.svg")
    assert code == 0
    assert (out / "again.svg").read_bytes() == (out / "profile.svg").read_bytes()
    code, stdout, _ = run("known", "Qwen/Qwen3-1.7B", out / "locate.json", "--json")
    assert code == 0
    assert json.loads(stdout)["verdict"] == "mismatch"
    code, stdout, _ = run("known", "nobody/nothing", out / "locate.json")
    assert "unknown" in stdout


@pytest.fixture(scope="module")
def located(model, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("located")
    with pytest.raises(SystemExit):
        main(["locate", model, "--text", text, "--bos", "--length", "40", "-q", "-o", str(out)])
    return out / "locate.json"


MEASURES = [
    ("describe", ["--first-tokens", "5"], "dimension"),
    ("collapse", [], "effective rank"),
    ("sinks", ["--t", "20"], "T = 20"),
    ("isolate", ["--n-seq", "2"], "is left with the gain"),
    ("super-weights", ["--n-seq", "2"], "super weight"),
    ("attention", ["--layer", "1", "--head", "0", "--head", "2"], "2 heads of layer 1"),
]


@pytest.mark.parametrize(("command", "options", "says"), MEASURES)
def test_measures_write_their_files_and_say_one_sentence(
    run, model, text, located, tmp_path, command, options, says
):
    """The first locates by itself and writes that too."""
    out, first = tmp_path / "out", command == MEASURES[0][0]
    texts = ("--text", text, "--bos", "--length", "40")
    given = () if first else ("--located", located)
    code, stdout, _ = run(command, model, *texts, *options, *given, "-o", out)
    assert code == 0
    assert says in stdout.splitlines()[-1]
    expected = {f"{command}.{end}" for end in ("json", "png", "svg")}
    expected |= {"locate.json", "profile.png", "profile.svg"} if first else set()
    expected |= {"attention.html"} if command == "attention" else set()
    assert {file.name for file in out.iterdir()} == expected
    saved = out / f"{command}.json"
    assert run("plot", saved, "-o", out / "again.svg")[0] == 0
    assert (out / "again.svg").read_bytes() == (out / f"{command}.svg").read_bytes()
    where = out / "locate.json" if first else located
    code, stdout, _ = run(command, model, *texts, *options, "--located", where, "--json")
    assert code == 0
    made, again = json.loads(saved.read_text()), json.loads(stdout)
    made.pop("run"), again.pop("run")
    assert made == again


def test_patch_writes_its_files_and_leaves_no_checkpoint(run, model, tmp_path):
    pair = ("--clean", "w5 w6 w7 w8 w9", "--corrupted", "w5 w16 w7 w8 w9")
    options = ("--metric", "logit_difference", "--answer", "w4", "--wrong", "w3", "--site", "z")
    code, _, _ = run("patch", model, *pair, *options, "-o", tmp_path)
    assert code == 0
    assert {file.name for file in tmp_path.iterdir()} == {"patch.json", "patch.png", "patch.svg"}
    saved = json.loads((tmp_path / "patch.json").read_text())
    assert {"axes", "values", "clean", "corrupted"} <= set(saved)
    code, again, _ = run("patch", model, *pair, *options, "--json")
    made = json.loads(again)
    assert made["values"] == saved["values"]


def test_an_older_locate_json_stays_and_other_texts_are_noted(run, model, located, tmp_path):
    words = " ".join(f"w{i}" for i in range(20, 50))
    (tmp_path / "locate.json").write_text("mine")
    assert run("sinks", model, "--prompt", words, "-q", "-o", tmp_path)[0] == 0
    assert (tmp_path / "locate.json").read_text() == "mine"
    code, _, stderr = run("sinks", model, "--prompt", words, "--located", located)
    assert code == 0
    assert "note: the ME Layer was located on other texts (with BOS) than these" in stderr

    older = json.loads(located.read_text())
    del older["run"]["settings"]["bos_first"]
    (tmp_path / "older.json").write_text(json.dumps(older))
    _, _, stderr = run("sinks", model, "--prompt", words, "--located", tmp_path / "older.json")
    assert "note: the ME Layer was located on other texts; whether they began with BOS is" in stderr


SAVED = Path(__file__).parents[2] / "docs" / "results"
SCAN = SAVED / "smollm2-135m.scan.json"


def test_quiet_prints_the_summary_line_alone_and_json_is_as_ever(capsys):
    from melens.progress import hush, one_command

    result = load_result(SCAN)
    with one_command():
        hush()
        output.show(result, as_json=False, folder=Path("out"))
        assert capsys.readouterr() == (f"{result.summary()}\n", "")
        output.show(result, as_json=True)
        assert capsys.readouterr().out == result.to_json()
    output.show(result, as_json=False, folder=Path("out"))
    loud = capsys.readouterr()
    assert loud.out.endswith(f"\n{result.summary()}\n")
    assert loud.out.count("\n") > 30
    assert loud.err == "melens: wrote out\n"


@pytest.mark.parametrize("name", ["smollm2-135m.scan", "gemma3-270m.super-weights"])
def test_the_rule_in_full_is_said_when_asked_for(capsys, name):
    result = load_result(SAVED / f"{name}.json")
    output.show(result, as_json=False)
    plain = capsys.readouterr().out
    assert result.rule not in plain
    assert "(in full: --explain)." in plain
    output.show(result, as_json=False, explain=True)
    assert f"\nRule: {result.rule}.\n" in capsys.readouterr().out


def test_plot_all_draws_a_folder(run, tmp_path):
    for name in ("describe", "sinks"):
        shutil.copy(SAVED / f"smollm2-135m.{name}.json", tmp_path / f"{name}.json")
    (tmp_path / "other.json").write_text("{}")
    code, stdout, stderr = run("plot", tmp_path, "--all", "--format", "svg", "--style", "curves")
    assert code == 0
    assert stdout.splitlines() == [f"{tmp_path}/{n}.curves.svg" for n in ("describe", "sinks")]
    assert f"note: left out: {tmp_path}/other.json names no schema" in stderr
    into = tmp_path / "into"
    code, stdout, _ = run("plot", tmp_path, "--all", "--style", "default", "-o", into)
    assert sorted(path.name for path in into.iterdir()) == ["describe.curves.png", "sinks.map.png"]
    assert code == 0
    for wrong, says in (
        ((tmp_path / "sinks.json", "--all"), "--all draws one folder of results"),
        ((tmp_path, "--all", "--style", "curve"), "no saved result with a style 'curve'"),
        ((tmp_path / "sinks.json",), "name the file with --out"),
        ((tmp_path / "sinks.json", "--format", "pdf"), "--format goes with --all"),
    ):
        code, stdout, stderr = run("plot", *wrong)
        assert (code, stdout) == (2, "")
        assert says in stderr


def test_a_check_has_its_figures_as_files(tmp_path, monkeypatch):
    report = load_result(SAVED.parent / "reports" / "smollm2-135m.json")
    held = report.model_copy(update={"results": {"sinks": report.results["sinks"]}})
    assert output.drawable(report)[:2] == ["attention", "collapse"]
    output.save_figures(held, tmp_path)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert names == ["figures/sinks.png", "figures/sinks.svg"]


def test_plot_help_names_every_style(run):
    from melens.figures import FIGURES

    _, stdout, _ = run("plot", "--help")
    said = " ".join(stdout.replace("│", " ").split())
    for kind, styles in FIGURES.items():
        name = kind.schema_id.split("/")[1]
        assert f"{name}: {', '.join(styles)}" in said


def test_plot_draws_other_styles_and_pages(run, model, text, tmp_path):
    texts = ("--text", text, "--bos", "--length", "40")
    assert run("sinks", model, *texts, "-q", "-o", tmp_path)[0] == 0
    assert (
        run("plot", tmp_path / "sinks.json", "--style", "curves", "-o", tmp_path / "c.pdf")[0] == 0
    )
    for arguments, says in (
        (("sinks.json", "--style", "curve", "-o", "x.png"), "Did you mean 'curves'"),
        (("sinks.json", "-o", "x.html"), "has no page"),
        (("sinks.json", "-o", "x.gif"), "end it in .png"),
    ):
        name, *rest = arguments
        code, _, stderr = run("plot", tmp_path / name, *rest)
        assert code == 2
        assert says in stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sinks", "MODEL", "--t", "1"], "--t"),
        (["describe", "MODEL", "--first-tokens", "-1"], "--first-tokens"),
        (["isolate", "MODEL", "--layer", "99", "--prompt", "w5 w6 w7 w8"], "layer 99 is outside"),
        (["isolate", "MODEL", "--ffn-edit", "top"], "--ffn-edit"),
        (["super-weights", "MODEL", "--most", "0"], "--most"),
        (["patch", "MODEL", "--clean", "w5 w6 w7", "--answer", "w4"], "--answer is for"),
        (["patch", "MODEL", "--clean", "w5 w6 w7 w8", "--site", "resid"], "unknown site 'resid'"),
        (["patch", "MODEL", "--clean", "w5 w6 w7 w8", "--corrupted", "w5 w6 w7 w8 w9"], "tokens"),
        (["collapse", "MODEL", "--located", "none.json"], "cannot read none.json"),
        (["attention", "MODEL", "--layer", "99", "--prompt", "w5 w6 w7 w8"], "layer 99 is outside"),
        (["attention", "MODEL", "--head", "9", "--prompt", "w5 w6 w7 w8"], "head 9 is outside"),
    ],
)
def test_mistakes_in_measures(run, model, arguments, says):
    arguments = [model if argument == "MODEL" else argument for argument in arguments]
    code, stdout, stderr = run(*arguments)
    assert code == 2
    assert says in stderr
    assert not stdout


def test_a_result_of_another_kind_or_model_is_not_a_located_layer(run, model, located, tmp_path):
    folder = tmp_path / "other"
    plant("llama", "single", 2).model.save_pretrained(folder)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    words = " ".join(f"w{i}" for i in range(20, 50))
    code, _, stderr = run("sinks", folder, "--prompt", words, "--located", located)
    assert code == 2
    assert "the model at hand has weights" in stderr
    assert run("sinks", model, "--prompt", words, "-q", "-o", tmp_path / "s")[0] == 0
    code, _, stderr = run("sinks", model, "--prompt", words, "--located", tmp_path / "s/sinks.json")
    assert code == 2
    assert "holds a result of 'sinks'; give a locate.json" in stderr


def test_json_stands_alone_on_stdout(run, model, text):
    code, stdout, _ = run("locate", model, "--text", text, "--bos", "--json", "--n-seq", 2)
    assert code == 0
    data = json.loads(stdout)
    assert data["verdict"] == "single"
    assert data["run"]["command"].startswith(("pytest", "__main__", "python", "-m", "-c"))


def test_texts_from_prompts(run, model):
    words = " ".join(f"w{i}" for i in range(20, 50))
    code, stdout, _ = run("locate", model, "--prompt", words, "--prompt", words, "--bos", "--json")
    assert code == 0
    assert json.loads(stdout)["stability"]["sequences"] == 2


def test_texts_from_stdin_offline(run, model, monkeypatch):
    words = " ".join(f"w{i}" for i in range(20, 50))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(words.encode())))
    monkeypatch.setenv("MELENS_OFFLINE", "")
    code, stdout, _ = run("locate", model, "--text", "-", "--bos", "--json", "--offline")
    assert code == 0
    settings = json.loads(stdout)["run"]["settings"]
    assert (settings["tokens"], settings["bos_first"]) == (31, True)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["evalu"], 2, "Did you mean 'eval'? See: melens --help"),
        (["locate"], 2, "Missing argument"),
        (["locate", "smollm2-13b"], 2, "Did you mean 'smollm2-135m'"),
        (["locate", "./nowhere"], 2, "there is no file or folder"),
        (["locate", "some-org/some-model"], 3, "offline was asked for"),
        (["locate", "MODEL", "--text", "no-such.txt"], 2, "cannot read the text"),
        (["locate", "MODEL", "--prompt", " "], 2, "is empty"),
        (["locate", "MODEL", "--prompt", "w5"], 2, "needs at least 4"),
        (["locate", "MODEL", "--prompt", "a", "--text", "b"], 2, "exclude each other"),
        (["locate", "MODEL", "--chat"], 2, "no chat template"),
        (["locate", "MODEL", "--length", "0"], 2, "--length"),
        (["locate", "MODEL", "--dtype", "int4"], 2, "'int4'"),
        (["locate", "MODEL", "--dtype", "float23"], 2, "'auto'. Did you mean 'float32'? See: mel"),
        (["eval", "MODEL", "--edit", "wemsk"], 2, "Did you mean 'wemask'?"),
        (["eval", "MODEL", "--rivals", "zero,men"], 2, "Did you mean 'mean'?"),
        (["locate", "MODEL", "--device", "warp"], 2, "device 'warp' cannot be used"),
        (["locate", "MODEL", "--out", "/dev/null/x"], 3, "cannot make the folder"),
        (["known", "x", "no-such.json"], 2, "cannot read no-such.json"),
        (["plot", "no-such.json", "-o", "x.png"], 2, "cannot read no-such.json"),
        (["models", "get", "smollm"], 2, "unknown model 'smollm'"),
        (["models", "rm", "nothing"], 2, "unknown model 'nothing'"),
        (["models", "get"], 2, "get needs the NAME of a model"),
        (["models", "ls", "x"], 2, "ls takes no name"),
        (["models", "get", "smollm2-135m", "--accept-license", "gemma"], 2, "does not ask for"),
        (["locate", ""], 2, "name is empty"),
        (["locate", "MODEL", "--out", ""], 2, "'-o': it is empty; give a value, or leave it out"),
        (["locate", "MODEL", "--out="], 2, "it is empty"),
        (["export", "MODEL", "-o", ""], 2, "it is empty; give a value. See: melens export"),
        (["quantise", "MODEL", "--scheme", ""], 2, "'--scheme': it is empty"),
        (["locate", "MODEL", "--prompt", "w5 w6 w7 w8", "--prompt", ""], 2, "it is empty"),
        (["known", "smollm2-135m", ""], 2, "it is empty"),
        (["locate", "MODEL", "--seed", "99999999999999999999"], 2, "--seed"),
        (["plot", "no-such.json", "-o", "."], 2, "cannot read no-such.json"),
    ],
)
def test_mistakes_end_in_one_line_and_the_right_code(run, model, arguments, code, says):
    arguments = [model if argument == "MODEL" else argument for argument in arguments]
    found, stdout, stderr = run(*arguments)
    assert found == code
    lines = [line for line in stderr.splitlines() if line.startswith("melens: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert not stdout


def test_an_interrupt_ends_with_130(run, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("melens.models.named.on_this_machine", stop)
    code, _, stderr = run("models")
    assert code == 130
    assert "interrupted" in stderr


@pytest.fixture
def broken(monkeypatch):
    def break_down(*_, **__):
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr("melens.models.named.on_this_machine", break_down)


def test_surprises_are_one_line_without_debug(run, broken):
    code, _, stderr = run("models")
    assert code == 3
    assert "could not run (ZeroDivisionError: deep inside)" in stderr


def test_debug_shows_the_traceback(capsys, broken):
    with pytest.raises(SystemExit):
        main(["models", "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_models_and_env_are_readable_by_programs(run):
    code, stdout, _ = run("models", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(stdout)}
    assert rows["smollm2-135m"]["licence"] == "Apache-2.0"
    assert rows["gemma3-270m"]["here"] in ("no", "fetched", "ready")
    code, stdout, _ = run("env", "--json")
    assert json.loads(stdout)["python"] == sys.version.split()[0]
    code, stdout, _ = run("--version")
    assert stdout.startswith("melens ")
