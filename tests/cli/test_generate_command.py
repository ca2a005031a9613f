"""melens generate and export, and the options of an edit."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
import words
from planted import plant

from melens.cli.app import main
from melens.cli.options import EditKind, EditOptions, edit_of, layers_from
from melens.errors import InterventionError, ResultError
from melens.interventions import wemask
from melens.results.edit import Edit

MASK = ["--mask-layers", "1-2", "--mask-select", "product"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A planted model, whose BOS is massive, with a tokenizer that knows all of its 128 ids."""
    return words.save(
        plant("llama", "single", 1).model, tmp_path_factory.mktemp("models") / "planted"
    )


@pytest.fixture(scope="module")
def located(folder, tmp_path_factory):
    """locate.json of it, on two texts with BOS."""
    from melens.batches import prompts
    from melens.locating import locate
    from melens.models import load

    path = tmp_path_factory.mktemp("located") / "locate.json"
    text = " ".join(f"w{10 + i}" for i in range(100))
    path.write_text(locate(load(folder), prompts([text], n=2, length=40, bos=True)).to_json())
    return path


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    out = capsys.readouterr()
    return caught.value.code, out.out, out.err


def test_options_mean_one_edit():
    assert edit_of(EditOptions()) == Edit()
    assert edit_of(EditOptions(mask_rate=0.1, mask_layers="12-14,3")) == Edit(
        rate=0.1, layers=(3, 12, 13, 14)
    )
    assert edit_of(EditOptions(EditKind.drop_key, mask_strength=0.5)) == Edit(
        name="drop-key", strength=0.5
    )
    assert layers_from("next") == "next"
    for wrong in ("5-3", "x", "1,,2", "-1", ""):
        with pytest.raises(InterventionError, match=r"--mask-layers takes after, next, or layers"):
            layers_from(wrong)
    with pytest.raises(InterventionError, match=r"norm-flatten has no rate"):
        edit_of(EditOptions(EditKind.norm_flatten, mask_rate=0.5))


def test_a_folders_own_edit_is_the_default(tmp_path):
    (tmp_path / "melens.json").write_text(json.dumps({"edit": {"name": "wemask", "rate": 0.2}}))
    assert edit_of(EditOptions(), tmp_path) == Edit(rate=0.2)
    assert edit_of(EditOptions(mask_rate=0.3), tmp_path) == Edit(rate=0.3)
    (tmp_path / "melens.json").write_text("{}")
    with pytest.raises(ResultError, match=r"holds no edit that melens can read"):
        edit_of(EditOptions(), tmp_path)


def test_generate_shows_both_answers(folder, located, capsys):
    arguments = [
        "generate",
        folder,
        "-p",
        "w5 w6 w7",
        "-p",
        "w9 w8",
        "--bos",
        "--max-new-tokens",
        "6",
        "--json",
        "-q",
        "--located",
        located,
        *MASK,
    ]
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["prompt"] for row in rows] == ["w5 w6 w7", "w9 w8"]
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folder)

    def words(ids):
        made = hf.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
        return [f"w{i}" for i in made[0, len(ids) :].tolist()]

    for row, ids in zip(rows, ([1, 5, 6, 7], [1, 9, 8]), strict=True):
        without = words(ids)
        with wemask(hf, layers=(1, 2), rate=0.5, select="product"):
            edited = words(ids)
        assert row["without"].split() == [
            word for word in without if word not in ("w0", "w1", "w2")
        ]
        assert row["with"].split() == [word for word in edited if word not in ("w0", "w1", "w2")]
        differ = [i for i, (a, b) in enumerate(zip(without, edited, strict=True)) if a != b]
        assert row["first_difference"] == (differ[0] if differ else None)
    assert any(row["first_difference"] is not None for row in rows)
    _, again, _ = run(capsys, *arguments)
    assert again == out


def test_no_edit_gives_the_same_answer_and_stdin_is_read(folder, capsys, monkeypatch):
    class Stdin:
        buffer = io.BytesIO(b"w5 w6\n\nw7\n")

    monkeypatch.setattr(sys, "stdin", Stdin)
    code, out, err = run(
        capsys,
        "generate",
        folder,
        "-p",
        "-",
        "--edit",
        "none",
        "--temperature",
        "1",
        "--json",
        "-q",
    )
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["prompt"] for row in rows] == ["w5 w6", "w7"]
    assert all(row["first_difference"] is None for row in rows)
    code, out, _ = run(capsys, "generate", folder, "-p", "w5", "--edit", "none", "-q")
    assert code == 0
    assert "the same answer" in out


def test_export_and_load_again(folder, located, capsys, tmp_path):
    target = tmp_path / "out"
    code, out, err = run(
        capsys,
        "export",
        folder,
        "-o",
        target,
        "--bos",
        "--mask-rate",
        "0.25",
        "--json",
        "-q",
        "--located",
        located,
    )
    assert code == 0, err
    assert json.loads(out)["edit"]["rate"] == 0.25
    for quiet in ((), ("-q",)):
        short = ("--n-seq", 1, "--length", 16, *quiet)
        code, _, err = run(capsys, "locate", target, "--bos", "-o", tmp_path / "located", *short)
        assert code == 0
        assert ("has a melens.json; its edit is not applied here" in err) == (not quiet)
        assert ("melens: " in err) == (not quiet)
    code, _, err = run(capsys, "locate", target, "--prompt", "w5", "-q")
    assert code == 2
    assert "melens: sequence 0 has 1 token" in err
    code, out, err = run(
        capsys, "generate", target, "-p", "w5", "--bos", "--json", "-q", "--max-new-tokens", "2"
    )
    assert code == 0, err
    assert "rate 0.25" in json.loads(out)["edit"]
    chosen = tmp_path / "edit.json"  # as melens tune writes it
    chosen.write_text(json.dumps({"edit": {"name": "wemask", "rate": 0.75, "layers": [1]}}))
    code, out, err = run(
        capsys,
        "generate",
        folder,
        "-p",
        "w5",
        "--bos",
        "--json",
        "-q",
        "--max-new-tokens",
        "2",
        "--edit-file",
        chosen,
    )
    assert code == 0, err
    assert json.loads(out)["edit"] == "wemask gamma rate 0.75 layer 1"
    assert "not applied" not in err
    code, out, err = run(
        capsys,
        "export",
        folder,
        "--format",
        "prefix",
        "-o",
        tmp_path / "p",
        "--first-token",
        "<s>",
        "--located",
        located,
    )
    assert code == 0, err
    assert "'<s>'" in out


def test_bad_input_is_one_line_and_exit_2(folder, capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("a")
    for arguments, said in (
        (["generate", folder], "give at least one --prompt"),
        (["generate", folder, "-p", " "], "a prompt is empty"),
        (["generate", folder, "-p", "w5", "--chat"], "has no chat template"),
        (["generate", folder, "-p", "w5", "--max-new-tokens", 999], "over the model's context"),
        (["generate", folder, "-p", "w5", "--edit", "zero", "--mask-rate", "0.1"], "has no rate"),
        (["export", folder, "-o", tmp_path / "mine"], "holds a.txt, which no earlier export wrote"),
        (["export", folder, "-o", tmp_path / "x", "--first-token", "w5"], "belongs to the formats"),
        (["export", folder, "--format", "peft", "-o", tmp_path / "x"], "puts no fixed token first"),
        (["generate", folder, "-p", "w5", "--edit-file", tmp_path / "no.json"], "cannot read"),
        (["generate", folder, "-p", "w5", "--edit-file", tmp_path / "mine/a.txt"], "holds no edit"),
        (
            ["generate", folder, "-p", "w5", "--edit-file", "e.json", "--mask-rate", "0.1"],
            "drop --edit and --mask-*",
        ),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, ""), err
        assert said in err.splitlines()[-1]
        assert "Traceback" not in err


def test_a_prompt_that_no_edit_touched_is_said_with_quiet_too(capsys):
    from melens.cli.app import _edits_said
    from melens.cli.commands.export import _require_edited
    from melens.progress import hush, one_command

    rows = [{"prompt": "a", "tokens_edited": 2}, {"prompt": "b", "tokens_edited": 0}]
    with one_command(), _edits_said():
        hush()
        _require_edited(rows, Edit())
    assert capsys.readouterr().err == (
        "melens: note: no token was edited in 'b': none of theirs is massive.\n"
    )


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("generate", "--prompt", "w5 w64 w6", "--max-new-tokens", "1"), "vocabulary is 0 to 63"),
        (("export", "--format", "prefix", "--first-token", "w64", "-o", "out"), "is 0 to 63"),
        (
            (
                "patch",
                "--clean",
                "w5 w6 w7",
                "--metric",
                "logit_difference",
                "--answer",
                "w64",
                "--wrong",
                "w5",
            ),
            "answer token 64 is outside the vocabulary, 0 to 63",
        ),
    ],
)
def test_an_id_beyond_the_embedding_is_one_line(
    make_tiny, tokenizer, tmp_path, monkeypatch, capsys, command, says
):
    """These take ids by themselves, past the readers of texts."""
    import copy

    from melens.cli.app import _run

    made = copy.deepcopy(tokenizer)
    made.add_tokens(["w64"])
    make_tiny("llama").save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    name, *rest = command
    edit = ["--mask-layers", "1"] if name != "patch" else []
    code = _run([name, str(tmp_path), *rest, *edit], debug=False)
    assert (code, says in capsys.readouterr().err) == (2, True)


def test_a_prompt_that_begins_with_bos_twice_is_refused(folder, located, capsys, tmp_path):
    import shutil

    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    put = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = put
    tokenizer.save_pretrained(other)
    arguments = ["--max-new-tokens", "2", "--located", located, *MASK]
    code, _, err = run(capsys, "generate", str(other), "-p", "w5", "-p", "<s> w6 w7", *arguments)
    assert code == 2
    assert "the prompt '<s> w6 w7' begins with BOS twice: it is written in the prompt" in err
    code, _, err = run(capsys, "generate", str(other), "-p", "w6 w7", *arguments)
    assert code == 0, err


BAKED = ["--bake", "neuron:1,9", "--bake", "gain:1,ln2,3,2"]


def test_weights_are_baked_on_the_command_line(folder, capsys, tmp_path):
    out = tmp_path / "baked"
    code, said, err = run(capsys, "export", folder, *BAKED, "-o", out, "-q")
    assert code == 0, err
    assert "layer 1: neuron 9 x 0; layer 1: gain of ln2 in dimension 3 x 2" in said
    assert "WITHOUT" not in err
    code, said, err = run(capsys, "generate", out, "-p", "w5 w6", "--max-new-tokens", "2", "--json")
    assert code == 0, err
    assert json.loads(said)["edit"] == "none"
    for wrong, message in (
        (["--mask-rate", "0.2"], "drop --mask-rate"),
        (["--format", "prefix"], "drop --format"),
        (["--bake", "neuron:1"], "must be neuron:LAYER,NEURON"),
        (["--format", "gguf"], "convert_hf_to_gguf.py of llama.cpp"),
    ):
        code, _, err = run(capsys, "export", folder, *BAKED, *wrong, "-o", tmp_path / "no")
        assert code == 2
        assert message in err
    assert not (tmp_path / "no").exists()


def test_a_gguf_is_baked_on_the_command_line(make_tiny, capsys, tmp_path, monkeypatch):
    import planted_gguf as planted

    monkeypatch.setenv("MELENS_CACHE", str(tmp_path / "cache"))
    hf, out = make_tiny("llama"), tmp_path / "out"
    fields, tensors = planted.fields_of(hf.config, "llama"), planted.tensors_of(hf, "llama")
    path = planted.write(tmp_path / "m.gguf", "llama", fields, tensors)
    code, _, err = run(capsys, "export", path, "--format", "gguf", "-o", out)
    assert (code, "changes of weights alone; give --bake" in err) == (2, True)
    code, said, err = run(capsys, "export", path, *BAKED, "--format", "gguf", "-o", out, "-q")
    assert code == 0, err
    assert "m.gguf with changed weights" in said
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "melens.json", "model.gguf"]
