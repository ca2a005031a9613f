"""melens diff: planted changes are found, and what is the same stays the same."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from planted import BOS_ID, MARK, ORDINARY, batch, plant

from melens.batches import Batch
from melens.cli.app import main
from melens.comparing import Side, Tolerances, diff
from melens.comparing.differences import compare
from melens.comparing.rows import profile_change
from melens.errors import ModelNotFoundError, ResultError
from melens.figures import save_figure
from melens.locating import locate
from melens.results import Difference, MELayer, load_result
from melens.results.check import CheckReport
from melens.results.diff import SideRow

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PLANTED = plant("llama", "single", 1)
TRUTH = PLANTED.truth
TEXTS = [Batch.of(batch(PLANTED))]


def planted():
    """A copy that was never bridged."""
    return plant("llama", "single", 1).model


@pytest.fixture(scope="module")
def base():
    return Side.of_model(planted(), TEXTS)


def against(base, model, **options):
    return compare(base, Side.of_model(model, TEXTS), **options)


def row(result, what):
    (found,) = [change for change in result.changes if change.what == what]
    return found


def test_the_same_model_has_no_change(base):
    result = diff(base, planted(), TEXTS)
    assert result.verdict == "same"
    assert not result.changed()
    assert row(result, "massive value").value == 1.0
    assert row(result, "massive token's direction").value == pytest.approx(1.0, abs=1e-12)
    assert all(line.ratio == 1.0 and line.cosine > 1 - 1e-12 for line in result.profile)
    assert f"did not move: {TRUTH.me_layer} in both" in result.summary()
    assert "same weights" in " ".join(result.notes)
    assert Difference.from_json(result.to_json()) == result


def test_bf16_is_within_tolerance(base):
    result = against(base, planted().to(torch.bfloat16))
    assert result.verdict == "same", result.changed()
    assert 0 < abs(row(result, "massive value").value - 1) < 0.03
    assert any("bfloat16" in note for note in result.notes)


def test_a_moved_layer_is_found(base):
    model = planted()
    layers, here = model.model.layers, TRUTH.me_layer
    layers[here], layers[here + 1] = layers[here + 1], layers[here]
    for index, block in enumerate(layers):
        block.self_attn.layer_idx = index
    result = against(base, model)
    change = row(result, "ME Layer")
    assert (change.a, change.b, change.changed) == (here, here + 1, True)
    assert f"the ME Layer moved from {here} to {here + 1}" in result.summary()
    assert not row(result, "token").changed
    assert not row(result, "dimension").changed
    late = result.profile[here]
    assert late.ratio < 0.1


@pytest.mark.parametrize(("factor", "changed"), [(1.3, True), (0.7, True), (1.05, False)])
def test_a_scaled_value_is_found(base, factor, changed):
    model = planted()
    with torch.no_grad():
        model.model.layers[TRUTH.me_layer].mlp.down_proj.weight[TRUTH.dim] *= factor
    result = against(base, model)
    assert row(result, "massive value").value == pytest.approx(factor, rel=0.01)
    assert row(result, "massive value").changed is changed
    assert result.verdict == ("changed" if changed else "same")
    assert not row(result, "ME Layer").changed
    wide = against(base, model, tolerances=Tolerances(value=0.5))
    assert wide.verdict == "same"


def test_a_changed_sign_is_a_change(base):
    model = planted()
    with torch.no_grad():
        model.model.layers[TRUTH.me_layer].mlp.down_proj.weight[TRUTH.dim] *= -1
    result = against(base, model)
    assert row(result, "massive value").value == pytest.approx(-1, rel=0.01)
    assert row(result, "massive value").changed
    assert row(result, "massive token's direction").value < -0.9
    assert row(result, "massive token's direction").changed


def test_a_changed_dimension_is_found(base):
    model, other = planted(), (TRUTH.dim + 1) % 64
    with torch.no_grad():
        down = model.model.layers[TRUTH.me_layer].mlp.down_proj.weight
        down[other], down[TRUTH.dim] = down[TRUTH.dim].clone(), 0.0
    result = against(base, model)
    change = row(result, "dimension")
    assert (change.a, change.b, change.changed) == (TRUTH.dim, other, True)
    assert row(result, "massive token's direction").changed
    assert "dimension" in result.summary()


def test_a_changed_token_is_found(base):
    model = planted()
    other = int(TEXTS[0].ids[0, 1])
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        (marker,) = torch.nonzero(
            (weight[BOS_ID] == MARK) & (weight[BOS_ID + 1] == ORDINARY)
        ).flatten()
        weight[BOS_ID, marker], weight[other, marker] = ORDINARY, MARK
    result = against(base, model)
    change = row(result, "token")
    assert (change.a, change.b, change.changed) == (f"<{BOS_ID}>", f"<{other}>", True)
    assert row(result, "token's position").changed
    assert all(line.cosine is None for line in result.profile)  # other tokens, so no angle
    assert not row(result, "dimension").changed


def test_appearing_and_vanishing(base):
    nothing = Side.of_model(plant("llama", "none", 2).model, TEXTS)
    gone, back = compare(base, nothing), compare(nothing, base)
    assert gone.verdict == back.verdict == "changed"
    assert "the massive token is gone" in gone.summary()
    assert "a massive token appeared" in back.summary()
    assert row(gone, "ME Layer").b is None
    assert any("not both have a massive token" in line for line in gone.cannot)
    neither = compare(nothing, nothing)
    assert neither.verdict == "same"
    assert "neither has a massive token" in neither.summary()
    assert "nothing else that was compared changed" in neither.summary()
    assert any("neither has a massive token, so only" in line for line in neither.cannot)
    for result in (gone, back, neither):
        assert Difference.from_json(result.to_json()) == result


def test_turned_around_it_says_the_inverse(base):
    model = planted()
    with torch.no_grad():
        model.model.layers[TRUTH.me_layer].mlp.down_proj.weight[TRUTH.dim] *= 3
    there = against(base, model)
    back = compare(Side.of_model(copy.copy(model), TEXTS), base)
    for one, two in zip(there.profile, back.profile, strict=True):
        assert (one.max_a, one.max_b) == (two.max_b, two.max_a)
        assert one.ratio * two.ratio == pytest.approx(1)
        assert one.cosine == pytest.approx(two.cosine)
    assert {c.what for c in there.changed()} == {c.what for c in back.changed()}


@pytest.mark.parametrize(("a", "b"), [((8.0, 5.0, 6.0), (8.0, 0.0, 1.0)), ((8.0, 0.0), (8.0, 5.0))])
def test_a_layer_that_is_0_in_one_of_the_two_differs_most(a, b):
    lines = tuple(
        SideRow(
            layer=i,
            max_a=one,
            max_b=two,
            ratio=two / one if one else None,
            share_a=None,
            share_b=None,
            cosine=None,
        )
        for i, (one, two) in enumerate(zip(a, b, strict=True))
    )
    (change,) = profile_change(lines, Tolerances())
    assert change.note == "layer 1, where it differs most"
    assert (change.a, change.b, change.changed) == (a[1], b[1], True)
    assert change.value == (0.0 if a[1] else None)  # JSON has no infinity


def test_two_dead_layers_are_the_same():
    line = SideRow(
        layer=0, max_a=0.0, max_b=0.0, ratio=None, share_a=None, share_b=None, cosine=None
    )
    (change,) = profile_change((line,), Tolerances())
    assert (change.value, change.changed) == (1.0, False)


def test_a_block_that_died_is_a_change(base):
    side = copy.deepcopy(base.located.to_dict())
    side["profile"][-1]["max"] = 0.0
    died = Side(MELayer.from_json(json.dumps(side)), "locate")
    change = row(compare(base, died), "largest |x| of a layer")
    assert change.changed
    assert change.note.startswith(f"layer {base.located.n_layers - 1},")
    assert Difference.from_json(compare(died, base).to_json()).verdict == "changed"


def test_other_weights_and_families_are_said_where_nothing_is_massive(make_tiny):
    texts = [Batch.of(torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1)))]
    sides = [Side.of_model(make_tiny(family), texts) for family in ("llama", "gpt2")]
    notes = compare(*sides).notes
    assert "two families: LlamaForCausalLM and GPT2LMHeadModel" in notes
    assert "the weights differ (by a sample of every tensor)" in notes


def test_hashes_of_two_dtypes_do_not_say_that_the_weights_differ(base):
    side = copy.deepcopy(base.located.to_dict())
    side["run"] |= {"dtype": "bfloat16", "weights": "other"}
    notes = compare(base, Side(MELayer.from_json(json.dumps(side)), "locate")).notes
    assert not [note for note in notes if note.startswith("the weights differ")]
    assert any("float32 and in bfloat16, and hashes of two dtypes" in note for note in notes)


def test_other_shapes_are_said_and_not_judged_by_number(base, make_tiny):
    deeper = next(
        side
        for seed in range(2, 9)
        if (side := Side.of_model(plant("llama", "single", seed).model, TEXTS)).located.n_layers
        != base.located.n_layers
    )
    result = compare(base, deeper)
    assert row(result, "number of layers").changed
    assert row(result, "ME Layer").changed is None
    assert "another number of layers" in row(result, "ME Layer").note
    assert row(result, "largest |x| of a layer").changed is None
    assert any("layers by number" in line for line in result.cannot)
    assert len(result.profile) == max(base.located.n_layers, deeper.located.n_layers)
    low = (base, deeper) if base.located.n_layers < deeper.located.n_layers else (deeper, base)
    assert compare(*low).profile[-1].max_a is None
    narrow = Side.of_model(make_tiny("llama"), [Batch.of(torch.randint(3, 60, (2, 12)))])
    result = compare(base, narrow)
    assert row(result, "d_model").changed
    assert any(line.startswith("direction: d_model 64 against") for line in result.cannot)
    assert all(line.cosine is None for line in result.profile)
    assert any("other tokens" in note for note in result.notes)


def test_the_figure_shows_both_profiles(base, tmp_path):
    result = against(base, planted().to(torch.bfloat16))
    top, bottom = result.plot().axes
    drawn = [line.get_ydata().tolist() for line in top.lines[::2]]
    assert drawn == [[r.max_a for r in result.profile], [r.max_b for r in result.profile]]
    assert [r.ratio for r in result.profile] == bottom.lines[1].get_ydata().tolist()
    first = save_figure(result.plot(), tmp_path / "a.svg").read_bytes()
    assert save_figure(result.plot(), tmp_path / "b.svg").read_bytes() == first
    assert f"ME Layer {TRUTH.me_layer}" in first.decode()
    assert "did not move" in result._repr_html_()


def test_published_results_side_by_side():
    with_bos = RESULTS / "smollm2-135m-bos.locate.json"
    without = RESULTS / "smollm2-135m.locate.json"
    with pytest.raises(ResultError, match=r"other tokens .*without BOS.*any_texts=True"):
        diff(with_bos, without)
    result = diff(with_bos, without, any_texts=True)
    assert "the ME Layer did not move: 11 in both" in result.summary()
    assert row(result, "token").changed
    assert row(result, "dimension").a == row(result, "dimension").b == 507
    assert row(result, "massive value").value == pytest.approx(24133 / 24926, rel=1e-3)
    assert not row(result, "massive value").changed
    assert any("a saved result does not hold them" in line for line in result.cannot)
    assert "on other tokens" in " ".join(result.notes)
    gemma = diff(with_bos, RESULTS / "gemma3-270m.locate.json", any_texts=True)
    assert "ME Layer 11 of 30 against 3 of 18" in gemma.summary()
    assert gemma.verdict == "changed"


def test_what_cannot_be_compared_is_refused(base, tmp_path):
    with pytest.raises(ResultError, match="holds a result of 'sinks'"):
        diff(RESULTS / "smollm2-135m.sinks.json", base)
    with pytest.raises(ModelNotFoundError, match="no file or folder"):
        diff(base, tmp_path / "nowhere")
    with pytest.raises(ResultError, match="cannot read"):
        diff(base, tmp_path / "nowhere.json")
    other = Batch.of(batch(PLANTED, seed=5))
    with pytest.raises(ResultError, match="other tokens"):
        diff(Side.of_result(base.located), planted(), [other])
    for wrong in ({"value": 0.0}, {"cosine": 1.5}, {"profile": 1.0}):
        with pytest.raises(ResultError, match="between 0 and 1"):
            Tolerances(**wrong)


def test_a_changed_verdict_needs_a_changed_row(base):
    data = diff(base, base).to_dict()
    data["verdict"] = "changed"
    with pytest.raises(ResultError, match="only there"):
        Difference.from_json(json.dumps(data))


def _report(locate_name, sinks_name, **changes):
    """A report around published results, with one rule."""
    held = {
        "locate": load_result(RESULTS / locate_name).to_dict(),
        "sinks": load_result(RESULTS / sinks_name).to_dict(),
    }
    rule = {
        "id": "sink-needs-bos",
        "title": "t",
        "status": "passed",
        "value": 0.0,
        "unit": "share",
        "threshold": 0.5,
        "reason": None,
        "source": None,
    }
    finding = {key: rule[key] for key in ("id", "title", "unit", "threshold")} | {
        "severity": "warning",
        "value": 1.0,
        "why": "w",
        "advice": "a",
        "evidence": {},
        "source": "/results/sinks/t",
    }
    rule["status"] = changes.get("status", "passed")
    found = rule["status"] == "found"
    return CheckReport.model_validate(
        {
            "model": "m",
            "verdict": "findings" if found else "pass",
            "answer": "a",
            "budget": changes.get("budget", "quick"),
            "stages": (),
            "results": held,
            "policy": {"name": changes.get("policy", "default"), "fail_on": "warning", "rules": {}},
            "findings": (finding,) if found else (),
            "rules": (rule,),
            "recommendation": None,
            "run": held["locate"]["run"],
        }
    )


def test_reports_add_sinks_and_findings(tmp_path):
    names = "smollm2-135m-bos.locate.json", "smollm2-135m-bos.sinks.json"
    clean, found = _report(*names), _report(*names, status="found")
    assert diff(clean, clean).verdict == "same"
    result = diff(clean, found)
    assert row(result, "rule sink-needs-bos").changed
    assert not row(result, "first layer with sinks").changed
    assert row(result, "share of heads with a sink (eps 0.3)").value == 0
    unknown = clean.rules[0].model_copy(update={"status": "not measured"})
    off = diff(found, clean.model_copy(update={"rules": (unknown,)}))
    assert row(off, "rule sink-needs-bos").changed is None
    strict = found.policy.model_copy(update={"name": "strict"})
    other = diff(clean, found.model_copy(update={"policy": strict}))
    assert row(other, "policy").changed is None
    assert other.verdict == "same"
    without = load_result(RESULTS / "smollm2-135m.sinks.json").to_dict()
    swapped = clean.model_copy(update={"results": {**clean.results, "sinks": without}})
    assert row(diff(clean, swapped), "first layer with sinks").changed
    (tmp_path / "report.json").write_text(clean.to_json())
    folder = diff(tmp_path, RESULTS / names[0])
    assert folder.a.source == "check"
    assert any("only one of the two is a report" in line for line in folder.cannot)
    with pytest.raises(ResultError, match="locate stage did not finish"):
        diff(clean.model_copy(update={"results": {}}), clean)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A planted model, and one whose massive value is three times as large."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {{0: "<pad>", 1: "<s>", 2: "</s>"}.get(i, f"w{i}"): i for i in range(128)}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    here = tmp_path_factory.mktemp("diff")
    louder = planted()
    with torch.no_grad():
        louder.model.layers[TRUTH.me_layer].mlp.down_proj.weight[TRUTH.dim] *= 3
    for name, model in (("base", planted()), ("louder", louder)):
        model.save_pretrained(here / name)
        tokenizer.save_pretrained(here / name)
    (here / "words.txt").write_text(" ".join(f"w{10 + i % 100}" for i in range(200)))
    return here


@pytest.fixture
def run(capsys):
    def go(*arguments):
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return done.value.code or 0, captured.out, captured.err

    return go


def test_the_command(run, folders, tmp_path):
    own = ("--text", folders / "words.txt", "--bos", "--length", 40)
    out = tmp_path / "out"
    code, stdout, _ = run(
        "diff", folders / "base", folders / "base", *own, "--dtype-b", "bfloat16", "--out", out
    )
    assert code == 0
    assert "computed in float32 and in bfloat16" in stdout
    assert f"the ME Layer did not move: {TRUTH.me_layer} in both" in stdout
    assert "counted from 0" in stdout
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.json")) == [
        "a/locate.json",
        "b/locate.json",
        "diff.json",
    ]
    code, again, _ = run("diff", out / "a" / "locate.json", folders / "louder", *own, "--json")
    assert code == 1
    found = Difference.from_json(again)
    assert found.a.source == "locate"
    assert row(found, "massive value").value == pytest.approx(3, rel=0.01)
    code, _, _ = run("plot", out / "diff.json", "-o", tmp_path / "again.svg")
    assert code == 0
    assert (tmp_path / "again.svg").read_bytes() == (out / "diff.svg").read_bytes()


def test_the_command_refuses_in_one_line(run, folders, tmp_path):
    own = ("--text", folders / "words.txt", "--bos", "--length", 40)
    run("locate", folders / "base", *own, "--out", tmp_path)
    saved = tmp_path / "locate.json"
    for arguments, said in (
        ((saved, folders / "base", "--text", folders / "words.txt", "--no-bos"), "other tokens"),
        ((saved, tmp_path / "no" / "model" / "here"), "no file or folder"),
        ((folders / "base", tmp_path / "missing.json"), "cannot read"),
        ((folders / "base", saved, "--tolerance", 2), "tolerance"),
    ):
        code, stdout, stderr = run("diff", *arguments)
        assert code == 2, said
        assert not stdout
        assert said in stderr
        assert len(re.findall(r"^melens: ", stderr, re.MULTILINE)) == 1


def test_texts_are_cut_as_the_saved_ones_were(folders):
    from melens.comparing.sides import texts_like

    found = locate(folders / "base", texts_like(None, n=3, length=24, bos=True))
    made = texts_like(Side.of_result(found))
    assert (made.n, made.length, made.bos, made.chat) == (3, 24, True, False)
    assert diff(found, folders / "base").verdict == "same"
    assert texts_like(Side.of_result(found), n=2).n == 2


@pytest.mark.weights
def test_smollm2_in_bf16_is_the_same(smol):
    from melens.models import load

    texts = [Batch.of(torch.tensor([[1, 504, 338, 260, 3575, 282, 4649, 30]]))]
    half = load("smollm2-135m", device="cpu", dtype="bfloat16")
    result = diff(smol, half, texts)
    assert result.verdict == "same", result.changed()
    assert "did not move: 11 in both" in result.summary()
    assert row(result, "massive token's direction").value > 0.999
