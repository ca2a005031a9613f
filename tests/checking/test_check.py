"""The check: planted faults are found, a clean model has none, a kill loses nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from planted import batch, plant
from planted_faults import (
    CHAT,
    CHAT_WITHOUT_BOS,
    add_sink,
    own_texts,
    scale_massive,
    sharpen,
    tokenizer_for,
)
from processes import ended, forked

from melens import store
from melens.batches import Batch, prompts
from melens.checking import (
    BUDGETS,
    RULES,
    STAGES,
    bench,
    check,
    junit_xml,
    read_policy,
    stages,
    trimming,
)
from melens.checking.findings import Measured, Unmeasured
from melens.checking.resuming import asked_of
from melens.checking.verdict import recommended
from melens.cli.app import main
from melens.errors import (
    InterventionError,
    OutputError,
    PolicyError,
    ResultError,
    UnknownNameError,
    WeightsError,
)
from melens.interventions import wemask
from melens.models import load
from melens.models.origin import Origin, remember
from melens.results import CheckReport, Comparison, Evaluation, KnownCheck, load_result
from melens.results.edit import Edit
from melens.results.evaluation import ConditionScore, Delta

SURE = 5.0
"""How far logits are sharpened, so that a lost token costs loss."""


def model_of(planted, chat=CHAT):
    return load(planted.model, tokenizer=tokenizer_for(chat))


@pytest.fixture
def no_isolation(monkeypatch):
    """The slowest stage left out; it has tests of its own."""
    monkeypatch.setattr(stages, "isolate", lambda *_args, **_options: failing("left out"))


@pytest.fixture
def lean(monkeypatch):
    """Stages left out that the fault at hand is not about."""
    for name in ("collapse", "attention", "cache_norms"):
        monkeypatch.setattr(stages, name, lambda *_args, **_options: failing("left out"))


def failing(reason="no\nsuch kernel"):
    raise RuntimeError(reason)


def found_in(report):
    return {finding.id for finding in report.findings}


def located_layers(report):
    return report.result("locate").n_layers


@pytest.fixture(scope="module")
def clean():
    """No massive token: every rule has something to pass on, or nothing to be about."""
    planted = plant("llama", "none", 0)
    sharpen(planted.model, SURE)
    return check(model_of(planted), own_texts(planted.model), budget="full")


@pytest.fixture(scope="module")
def sick():
    """A massive BOS that every later query attends to, with huge keys."""
    planted = plant("llama", "single", 1)
    add_sink(planted, 400.0)
    sharpen(planted.model, SURE)
    report = check(model_of(planted), own_texts(planted.model), budget="full")
    return planted.truth, report


def test_a_clean_model_has_no_finding(clean):
    assert (clean.findings, clean.verdict) == ((), "pass")
    assert {rule.id for rule in clean.rules} == set(RULES)
    statuses = {rule.id: rule.status for rule in clean.rules}
    assert statuses.pop("known-layer") == "not measured"
    assert set(statuses.values()) == {"passed"}
    skipped = [stage.name for stage in clean.stages if stage.status == "skipped"]
    assert skipped == ["cache_norms", "isolate", "edits", "eviction", "dose"]
    assert clean.recommendation is None
    assert "is within the policy 'default'" in clean.answer


def test_what_the_sick_model_has_is_found_with_its_numbers(sick):
    truth, report = sick
    assert found_in(report) == {
        "int8-per-tensor",
        "kv-quantisation",
        "sink-needs-bos",
        "sink-heads",
        "super-weight",
        "one-token",
        "kv-eviction",
        "rank-collapse",
    }
    assert report.verdict == "findings"
    held = {finding.id: finding for finding in report.findings}
    located = report.result("locate")
    assert held["int8-per-tensor"].evidence["layer"] >= truth.me_layer
    assert str(truth.dim) in str(held["int8-per-tensor"].evidence["massive_dimensions"])
    assert "at least half of the entries" in held["int8-per-tensor"].title
    assert "may not be enough" in held["int8-per-tensor"].advice
    weight = held["super-weight"].evidence
    assert (weight["layer"], weight["row"]) == (truth.me_layer, truth.dim)
    assert held["rank-collapse"].evidence["layer"] > truth.me_layer
    assert "control" not in {**held["super-weight"].evidence, **held["kv-eviction"].evidence}
    eviction = report.result("eviction")
    assert eviction.edited.edit.start == held["kv-eviction"].evidence["from_position"] == 12
    assert eviction.edited.edit.layers == tuple(range(located_layers(report)))
    assert eviction.weights == (11.0,) * eviction.n  # foreseen by positions 12 to 22 of 24
    low, high = (held["kv-eviction"].evidence[f"interval_{end}"] for end in ("low", "high"))
    assert low < held["kv-eviction"].value < high
    collapse = report.at(held["rank-collapse"].source)
    assert collapse["layer"] == held["rank-collapse"].evidence["layer"]
    assert collapse["head"] == held["rank-collapse"].evidence["lowest_head"]
    assert collapse["definition"] == "effective_rank"
    assert abs(held["one-token"].evidence["control"]) < 0.1 < held["one-token"].value
    assert report.result("edits").me_layer == located.me_layer == truth.me_layer
    assert [stage.status for stage in report.stages] == ["done"] * len(STAGES)


def test_every_number_is_where_its_pointer_says(sick, clean):
    _, report = sick
    for finding in report.findings:
        place = report.at(finding.source)
        if isinstance(place, float | int):
            assert place == finding.value
        else:
            assert place
    direct = {f.id for f in report.findings if isinstance(report.at(f.source), float)}
    assert direct == {"kv-quantisation", "sink-heads", "super-weight", "one-token", "kv-eviction"}
    located = report.result("locate").profile
    shown = next(f for f in report.findings if f.id == "int8-per-tensor")
    row = report.at(shown.source)
    assert shown.value == row["max"] / 254 / row["median"]
    assert shown.value == max(layer.max / 254 / layer.median for layer in located)
    assert report.at("/run/settings/context") == 256
    with pytest.raises(ResultError, match="nothing is at '/results/locate/nowhere'"):
        report.at("/results/locate/nowhere")


def test_a_whole_tensor_in_int8_does_lose_half_its_entries():
    """The claim of the finding, on the activations themselves."""
    planted = plant("llama", "single", 1)
    add_sink(planted, 400.0)
    at = planted.truth.me_layer
    texts = own_texts(planted.model)
    seen = []
    block = planted.model.model.layers[at]
    with (
        block.register_forward_hook(
            lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out)
        ),
        torch.no_grad(),
    ):
        planted.model(input_ids=texts.ids, use_cache=False)
    step = seen[0].abs().max() / 127
    assert ((seen[0] / step).round() == 0).double().mean() > 0.5


# --- One fault at a time, each beside the same model without it.


def test_float16_range(lean):
    planted = plant("llama", "single", 1)
    texts = Batch.of(batch(planted, n=4, length=24))
    before = check(model_of(planted), texts)
    assert "float16-range" not in found_in(before)
    largest = max(row.max for row in before.result("locate").profile)
    scale_massive(planted, 80_000 / largest)
    after = check(model_of(planted), texts)
    finding = next(f for f in after.findings if f.id == "float16-range")
    assert finding == after.findings[0]
    assert (finding.severity, finding.unit) == ("critical", "largest |x|, residual units")
    assert finding.value == pytest.approx(80_000, rel=0.01)
    assert finding.value == after.at(finding.source)
    assert finding.evidence["layer"] >= planted.truth.me_layer
    planted.model.half()
    with torch.no_grad():
        out = planted.model(input_ids=texts.ids[:1], use_cache=False).logits
    assert not out.isfinite().all()  # and so it is: float16 does not hold it


def test_sink_needs_bos(lean):
    """Where the texts' own first token does what BOS does, BOS is not needed."""

    def report(alike):
        planted = plant("llama", "single", 1)
        ids = batch(planted, n=4, length=16)
        ids[:, 1] = 9
        if alike:
            table = planted.model.get_input_embeddings().weight
            with torch.no_grad():
                table[9] = table[1]  # BOS
        return check(model_of(planted), Batch.of(ids))

    finding = next(f for f in report(alike=False).findings if f.id == "sink-needs-bos")
    assert (finding.value, finding.evidence["token"]) == (1.0, "w9")
    assert "Without BOS no first tokens" in finding.why
    assert "sinks do without BOS was not measured" in finding.why
    good = next(rule for rule in report(alike=True).rules if rule.id == "sink-needs-bos")
    assert (good.status, good.value) == ("passed", 0.0)


def test_chat_first_token(lean):
    def report(chat):
        planted = plant("llama", "single", 1)
        return check(model_of(planted, chat), Batch.of(batch(planted, n=4, length=16)))

    assert "chat-first-token" not in found_in(report(CHAT))
    bad = report(CHAT_WITHOUT_BOS)
    finding = next(f for f in bad.findings if f.id == "chat-first-token")
    assert "'w9'" in finding.title
    assert bad.at(finding.source)["name"] == "chat template"
    rules = {rule.id: rule.status for rule in report(None).rules}
    assert rules["chat-first-token"] == "not measured"


def with_window(planted, window):
    """The same weights in a family that has a sliding window."""
    from transformers import MistralConfig, MistralForCausalLM

    known = planted.model.config.to_dict()
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "rms_norm_eps",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
    )
    config = MistralConfig(**{n: known[n] for n in names}, sliding_window=window)
    made = MistralForCausalLM(config)
    made.load_state_dict(planted.model.state_dict())
    return load(made.eval(), tokenizer=tokenizer_for())


def test_sink_window(lean):
    planted = plant("llama", "single", 1)
    add_sink(planted, 8.0)
    texts = Batch.of(batch(planted, n=4, length=24))
    wide = check(with_window(planted, 256), texts)
    assert next(r for r in wide.rules if r.id == "sink-window").value == 1.0
    assert "sink-window" not in found_in(wide)
    narrow = check(with_window(planted, 20), texts)
    finding = next(f for f in narrow.findings if f.id == "sink-window")
    assert finding.evidence["window"] == narrow.at(finding.source) == 20
    assert finding.value == pytest.approx(20 / 256)
    behind = [str(n) for n in range(planted.truth.me_layer + 1, len(planted.model.model.layers))]
    assert finding.evidence["layers"] == ", ".join(behind)
    without = plant("llama", "none", 0)
    no_sink = check(with_window(without, 20), Batch.of(batch(without, n=4, length=24)))
    assert "sink-window" not in found_in(no_sink)


def test_known_layer(lean, monkeypatch):
    """Published as layer 6: one of these models fits the name, the other cannot be it."""
    row = {"model": "Qwen/Qwen3-4B", "n_layers": 10, "d_model": 64, "me_layer": 6, "bos": None}
    row |= {"source": "a paper", "exactness": "exact"}
    rows = [{**row, "n_layers": 36, "me_layer": 5}, row]  # the first is of another size
    monkeypatch.setattr("melens.published.holding.published_rows", lambda _: rows)

    def report(seed):
        planted = plant("llama", "single", seed)
        model = model_of(planted)
        remember(model, Origin("Qwen/Qwen3-4B"))
        return planted.truth.me_layer, check(model, Batch.of(batch(planted, n=4, length=16)))

    layer, good = report(1)
    assert layer == 6
    assert "known-layer" not in found_in(good)
    assert next(rule for rule in good.rules if rule.id == "known-layer").status == "passed"
    layer, bad = report(0)
    assert layer != 6
    finding = bad.findings[0]
    assert (finding.id, finding.severity, finding.value) == ("known-layer", "critical", 1)
    assert finding.evidence == {"ME Layer": f"published 6, measured {layer}"}
    assert "the same ME Layer." in finding.why
    assert "dimension" not in finding.why


def view_of(results, **settings):
    run = plant_run()
    return Measured(results, run.model_copy(update={"settings": {**run.settings, **settings}}))


def answer(rule, view, threshold=None):
    says = read_policy().rules[rule].threshold if threshold is None else threshold
    return RULES[rule].judge(view, says)


def test_a_size_or_a_stage_that_differs_is_no_finding():
    """As healthy weights have it on a text of digits, and on one repeated word."""

    def known(*rows):
        made = [
            Comparison(what=a, published="1", measured="2", verdict=b, place=c) for a, b, c in rows
        ]
        return KnownCheck(model="x", verdict="mismatch", comparisons=tuple(made), source="paper")

    good, place = ("ME Layer", "match", True), ("ME Layer", "mismatch", True)
    size, stages_ = ("|x| in dimension 5", "mismatch", False), ("stages", "mismatch", False)
    assert answer("known-layer", view_of({"known": known(good, size, stages_)})).found is False
    unsure = known(("ME Layer", "unknown", True), size)
    assert isinstance(answer("known-layer", view_of({"known": unsure})), Unmeasured)
    found = answer("known-layer", view_of({"known": known(place, size)}))
    assert (found.found, found.value, list(found.evidence)) == (True, 1.0, ["ME Layer"])


def test_int8_claims_half_of_the_entries_only_from_one_on(small):
    view = Measured({"locate": small().result("locate")}, plant_run())
    value = answer("int8-per-tensor", view).value
    located = view.results["locate"]
    rows = [row.model_copy(update={"median": row.median * value * 2}) for row in located.profile]
    low = Measured({"locate": located.model_copy(update={"profile": tuple(rows)})}, plant_run())
    found = answer("int8-per-tensor", low, threshold=0.1)
    assert found.found
    assert found.value == pytest.approx(0.5)
    assert "half of the entries" not in found.title


def test_a_window_without_a_context_is_not_judged():
    assert answer("sink-window", view_of({}, sliding_window=None)).value is None
    found = answer("sink-window", view_of({}, sliding_window=20, context=None))
    assert isinstance(found, Unmeasured)
    assert "names no context" in found.reason


def test_sinks_keys_and_ranks_come_with_the_sink(no_isolation):
    """Without the planted sink the same massive token costs little and draws nothing."""
    planted = plant("llama", "single", 1)
    sharpen(planted.model, 1.0)
    report = check(model_of(planted), own_texts(planted.model), budget="standard")
    assert found_in(report) == {"int8-per-tensor", "sink-needs-bos"}


# --- Policy, verdict, answer.


def changed(name, **settings):
    policy = read_policy()
    rules = {**policy.rules, name: policy.rules[name].model_copy(update=settings)}
    return policy.model_copy(update={"rules": rules})


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A planted model, texts, and a folder where its quick stages are kept."""
    planted = plant("llama", "single", 1)
    folder = tmp_path_factory.mktemp("kept")
    texts = Batch.of(batch(planted, n=4, length=24))
    model = model_of(planted)
    check(model, texts, out=folder)

    def go(policy=None, **more):
        return check(model, texts, policy=policy, out=folder, **more)

    return go


def test_the_policy_decides(small):
    default = small()
    assert (default.verdict, len(default.counted())) == ("findings", 1)
    assert "has 1 finding under the policy 'default'" in default.answer
    graver = small(changed("int8-per-tensor", severity="warning"))
    assert (len(graver.counted()), "has 2 findings" in graver.answer) == (2, True)
    research = small("research")
    assert (research.verdict, found_in(research)) == ("pass", found_in(default))
    assert "2 remarks" in research.answer
    off = small(changed("int8-per-tensor", severity="off"))
    assert found_in(off) == {"sink-needs-bos"}
    rule = next(rule for rule in off.rules if rule.id == "int8-per-tensor")
    assert (rule.status, rule.threshold, rule.reason) == ("off", None, "the policy turns it off")
    value = next(f.value for f in default.findings if f.id == "int8-per-tensor")
    assert "int8-per-tensor" in found_in(small(changed("int8-per-tensor", threshold=value * 0.99)))
    assert "int8-per-tensor" not in found_in(small(changed("int8-per-tensor", threshold=value)))
    assert [f.severity for f in default.findings] == ["warning", "info"]
    assert "1 remark of lesser severity" in default.answer
    assert default.policy.rules["one-token"] == {"severity": "warning", "threshold": 1.0}


def test_what_is_not_measured_says_which_budget_measures_it(small):
    rules = {rule.id: rule for rule in small().rules}
    assert rules["one-token"].status == "not measured"
    assert rules["one-token"].reason == "it needs the stage edits (--budget standard)"


def test_bad_requests_are_refused_before_the_model_loads(tmp_path):
    with pytest.raises(UnknownNameError, match=r"unknown budget 'quik'. Did you mean 'quick'"):
        check("no-such-model", budget="quik")
    with pytest.raises(PolicyError, match="unknown policy 'lax'"):
        check("no-such-model", policy="lax")
    assert list(BUDGETS) == ["quick", "standard", "full"]


def test_a_stage_that_cannot_run_is_recorded(small, no_isolation, monkeypatch):
    monkeypatch.setattr(stages, "super_weights", lambda *_args, **_options: failing())
    report = small(changed("int8-per-tensor", severity="info"), budget="standard")
    failed = [stage for stage in report.stages if stage.status == "failed"]
    assert [(s.name, s.reason) for s in failed] == [
        ("isolate", "RuntimeError: left out"),
        ("super_weights", "RuntimeError: no such kernel"),
    ]
    rule = next(rule for rule in report.rules if rule.id == "super-weight")
    assert (rule.status, rule.reason) == ("not measured", "the stage super_weights could not run")
    assert "edits" in report.results
    policy = read_policy("research")
    assert small(policy, budget="standard").verdict == "incomplete"
    assert "could not be checked in full" in small(policy, budget="standard").answer


# --- The report.


def test_json_goes_there_and_back(sick, tmp_path):
    _, report = sick
    path = tmp_path / "report.json"
    path.write_text(report.to_json(), "utf-8")
    again = load_result(path)
    assert isinstance(again, CheckReport)
    assert again == report
    assert again.to_json() == report.to_json()
    assert len(again.rows()) == len(report.findings)
    assert len(again.shown()) == len(RULES)
    assert "<img alt=" in report._repr_html_()
    assert "single" in report.plot().axes[0].get_title(loc="left")
    with pytest.raises(ResultError, match="holds no result 'nope'; it holds locate"):
        report.result("nope")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data.update(verdict="pass"), "the verdict must be 'findings'"),
        (lambda data: data["findings"].pop(), "findings and the rules that found"),
        (lambda data: data["findings"][0].update(source="/results/x"), "nothing is at"),
        (lambda data: data["results"]["locate"].update(n_layers=3), "one row a layer"),
        (lambda data: data["results"]["locate"].update(schema="melens/check/1"), "no report can"),
    ],
)
def test_edited_reports_are_refused(sick, change, says):
    data = json.loads(sick[1].to_json())
    change(data)
    with pytest.raises(ResultError, match=says):
        CheckReport.from_json(json.dumps(data))


def test_junit_has_one_case_a_rule(sick, clean):
    _, report = sick
    evil = report.stages[0].model_copy(
        update={"name": "evil", "status": "failed", "reason": '<b>&\x00\x1b[31m"]]>'}
    )
    report = report.model_copy(update={"stages": (*report.stages, evil)})
    suite = ElementTree.fromstring(junit_xml(report))
    cases = {case.get("name"): case for case in suite}
    assert set(cases) == {*RULES, "stage evil"}
    failed = {name for name, case in cases.items() if case.find("failure") is not None}
    assert failed == {finding.id for finding in report.counted()}
    assert (suite.get("failures"), suite.get("errors")) == (str(len(failed)), "1")
    assert cases["sink-heads"].find("system-out") is not None
    assert cases["known-layer"].find("skipped") is not None
    assert "<b>&" in cases["stage evil"].find("error").get("message")
    assert list(cases["float16-range"]) == []
    suite = ElementTree.fromstring(junit_xml(clean))
    assert suite.get("failures") == "0"


def test_a_large_collapse_is_averaged_over_heads_and_says_so(sick, monkeypatch):
    whole = sick[1].result("collapse")
    assert trimming.compact(whole) is whole
    monkeypatch.setattr(trimming, "MOST_ROWS", len(whole.rows_) - 1)
    small = trimming.compact(whole)
    assert len(small.rows_) < len(whole.rows_) / 2
    for site in whole.sites:
        for definition in ("effective_rank", "stable_rank_centred"):
            assert small.curve(site, definition) == whole.curve(site, definition)
    assert "stages/collapse.json" in small.missing[-1]
    assert type(whole).from_json(small.to_json()) == small


# --- The recommendation.


def dose_of(doses, controls, *, texts=24):
    """An evaluation; name -> what it changes on each of them."""
    doses, controls = ({k: x[:texts] for k, x in each.items()} for each in (doses, controls))
    n = texts
    weights = (1.0,) * n
    plain = ConditionScore(
        name="base", role="base", edit=Edit(name="none"), value=2.0, interval=None, delta=None
    )

    def score(name, role, rate, changes):
        mean = sum(changes) / n
        return ConditionScore(
            name=name,
            role=role,
            edit=Edit(rate=rate),
            value=2.0 + mean,
            interval=None,
            delta=Delta(value=mean, interval=None),
        )

    tried = [score(name, "dose", 0.1 + i / 10, x) for i, (name, x) in enumerate(doses.items())]
    held = [score(name, "control", 0.05, x) for name, x in controls.items()]
    edited = tried[0].model_copy(update={"role": "edited"})
    base = plant_run()
    return Evaluation(
        task="perplexity",
        unit="nats a token",
        higher_is_better=False,
        n=n,
        weight=24.0,
        edit=edited.edit,
        me_layer=1,
        base=plain,
        edited=edited,
        delta=edited.delta,
        dose=tuple(tried[1:]),
        controls=tuple(held),
        rivals=(),
        items=None,
        about="made up",
        differences={**doses, **controls},
        weights=weights,
        run=base,
    )


def plant_run():
    from melens.provenance import ModelFacts, RunInfo

    facts = ModelFacts("made-up", None, None, "float32", "cpu")
    return RunInfo.collect(facts, seed=0, settings={})


WORSE = (0.1, 0.2, 0.1, 0.3, 0.1, 0.2, 0.1, 0.1) * 3
BETTER = tuple(-x for x in WORSE)
MIXED = (0.5, -0.6, 0.5, -0.4, 0.3, -0.5, 0.2, -0.3) * 3
NOTHING = (0.01, -0.01, 0.01, -0.01, 0.0, 0.01, -0.01, 0.0) * 3


def test_a_mask_is_recommended_only_beyond_doubt():
    assert recommended(dose_of({"a": WORSE, "b": WORSE}, {"c": NOTHING})).action == "leave it"
    few = recommended(dose_of({"a": WORSE, "b": BETTER}, {"c": NOTHING}, texts=19))
    assert (few.action, few.interval) == ("leave it", None)
    assert "takes 20 texts or more" in few.text
    unsure = recommended(dose_of({"a": WORSE, "b": MIXED}, {"c": NOTHING}))
    assert (unsure.action, unsure.tried) == ("leave it", 2)
    assert "beyond doubt" in unsure.text
    helped = recommended(dose_of({"a": WORSE, "b": BETTER}, {"c": NOTHING}))
    assert "over 24 texts" in helped.text
    assert "each of 1 controls lowers it less" in helped.text
    assert "tasks was not measured" in helped.text
    alone = recommended(dose_of({"a": WORSE, "b": BETTER}, {}))
    assert (alone.action, alone.edit) == ("leave it", None)
    assert "compared with no control" in alone.text
    assert (helped.action, helped.source) == ("mask", "/results/dose/dose/0/delta")
    assert helped.interval[1] < 0
    assert helped.delta == pytest.approx(-0.15)
    as_good = recommended(dose_of({"a": WORSE, "b": BETTER}, {"c": BETTER}))
    assert as_good.action == "leave it"
    assert "no more than a control does (c)" in as_good.text
    first = recommended(dose_of({"a": BETTER, "b": WORSE}, {"c": NOTHING}))
    assert first.source == "/results/dose/edited/delta"


def test_full_ends_with_a_recommendation(sick):
    report = sick[1]
    assert report.recommendation is not None
    assert report.at(report.recommendation.source)["value"] == report.recommendation.delta
    assert report.recommendation.tried == len(report.result("dose").dose) + 1


# --- Interruptions, disks.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A planted model on disk, so that another process can read it."""
    folder = tmp_path_factory.mktemp("model") / "planted"
    planted = plant("llama", "single", 1)
    planted.model.save_pretrained(folder)
    tokenizer_for().save_pretrained(folder)
    return folder


def words(n=60):
    return " ".join(f"w{10 + i * 7 % 100}" for i in range(n))


def _killed_in(stage, model, texts, out):
    def tick(now, _done, _total):
        if now == stage:
            os.kill(os.getpid(), signal.SIGKILL)

    check(str(model), texts, budget="quick", out=out, progress=tick)


@pytest.fixture(scope="module")
def whole(saved):
    """The report of a run that nothing stopped, and its texts."""
    from melens.batches import prompts

    texts = prompts([words()], bos=True, length=24, n=2)
    return check(str(saved), texts), texts


def test_a_killed_process_loses_only_its_stage(saved, whole, tmp_path):
    """The one with a real signal; the next test stops in every stage."""
    report, texts = whole
    stage = "sinks"
    folder = tmp_path / "killed"
    assert ended(forked(_killed_in, stage, saved, texts, folder)) == [-signal.SIGKILL]
    kept = sorted(path.stem for path in (folder / "stages").glob("*.key"))
    quick = [name for name in STAGES if STAGES[name].budget == "quick"]
    assert kept == sorted(quick[: quick.index(stage)])
    assert not (folder / "report.json").exists()
    times = {path: path.stat().st_mtime_ns for path in (folder / "stages").glob("*")}
    again = check(str(saved), texts, out=folder)
    assert again.timeless() == report.timeless()
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_the_key_of_a_model_is_the_same_by_another_path(saved, tmp_path):
    from melens.checking.keeping import config_of

    shutil.copytree(saved, tmp_path / "moved")
    assert config_of(load(saved)) == config_of(load(tmp_path / "moved"))


def test_an_interruption_in_every_stage_ends_with_the_same_report(small, tmp_path):
    planted = plant("llama", "single", 1)
    texts, model = Batch.of(batch(planted, n=4, length=24)), model_of(planted)
    quick = [name for name in STAGES if STAGES[name].budget == "quick"]
    times: dict = {}

    def stop_at(stage):
        def tick(now, _done, _total):
            if now == stage:
                raise KeyboardInterrupt

        return tick

    for i, stage in enumerate(quick):
        with pytest.raises(KeyboardInterrupt):
            check(model, texts, out=tmp_path, progress=stop_at(stage))
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").glob("*")}
        assert sorted(path.stem for path in kept if path.suffix == ".key") == sorted(quick[:i])
        assert times.items() <= kept.items()  # what was done is not done again
        assert not (tmp_path / "report.json").exists()
        times = kept
    assert len(quick) == 7
    assert check(model, texts, out=tmp_path).timeless() == small().timeless()
    assert not list(tmp_path.rglob("*.tmp"))


def test_other_texts_weights_or_damage_are_measured_again(tmp_path, lean):
    planted = plant("llama", "single", 1)
    texts = Batch.of(batch(planted, n=4, length=24))
    first = check(model_of(planted), texts, out=tmp_path)
    located = tmp_path / "stages" / "locate.json"
    old = located.read_text("utf-8")
    check(model_of(planted), Batch.of(batch(planted, n=4, length=20)), out=tmp_path)
    assert json.loads(located.read_text("utf-8"))["run"]["settings"]["length"] == 20
    check(model_of(planted), texts, out=tmp_path)
    scale_massive(planted, 1.5)  # one entry of one matrix
    heavier = check(model_of(planted), texts, out=tmp_path)
    tops = [max(row.max for row in r.result("locate").profile) for r in (first, heavier)]
    assert tops[1] == pytest.approx(1.5 * tops[0], rel=0.05)
    located.write_text(old[: len(old) // 2], "utf-8")
    assert check(model_of(planted), texts, out=tmp_path).timeless() == heavier.timeless()


def test_a_changed_config_or_chat_template_is_measured_again(tmp_path, saved, lean):
    """Neither is a weight; both change what is measured."""
    planted = plant("llama", "single", 1)
    texts = Batch.of(batch(planted, n=4, length=24))
    model = model_of(planted)
    first = check(model, texts, out=tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").glob("*.key")}
    assert "chat-first-token" not in found_in(first)
    model.tokenizer.chat_template = CHAT_WITHOUT_BOS
    other = check(model, texts, out=tmp_path)
    assert "chat-first-token" in found_in(other)
    assert all(path.stat().st_mtime_ns > time for path, time in times.items())
    folder = tmp_path / "saved"
    shutil.copytree(saved, folder)
    config = folder / "config.json"
    before = check(str(folder), texts, out=tmp_path / "b")
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 1.0}))
    after = check(str(folder), texts, out=tmp_path / "b")
    assert before.result("locate").profile != after.result("locate").profile
    assert after.timeless() == check(str(folder), texts).timeless()


def test_a_check_that_is_all_kept_needs_no_model(saved, tmp_path, monkeypatch):
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(saved, folder)
    first = check(str(folder), [words()], out=out)
    monkeypatch.setattr(bench.Bench, "of", lambda *_: failing("the model is loaded"))
    seen = []
    again = check(str(folder), [words()], out=out, progress=lambda *at: seen.append(at))
    assert again.timeless() == first.timeless()
    assert seen[-1][1:] == (1000, 1000)
    strict = check(str(folder), [words()], out=out, policy="strict")
    assert strict.policy.name == "strict"
    with pytest.raises(RuntimeError, match="the model is loaded"):
        check(str(folder), [words(50)], out=out)
    with pytest.raises(RuntimeError, match="the model is loaded"):
        check(str(folder), [words()], out=out, budget="standard")
    kept = out / "stages" / "sinks.json"
    kept.write_text(kept.read_text("utf-8") + " ", "utf-8")
    with pytest.raises(RuntimeError, match="the model is loaded"):
        check(str(folder), [words()], out=out)
    kept.write_text(kept.read_text("utf-8")[:-1], "utf-8")
    assert check(str(folder), [words()], out=out).timeless() == first.timeless()
    shutil.copytree(folder, tmp_path / "other")  # the same bytes by another name
    with pytest.raises(RuntimeError, match="the model is loaded"):
        check(str(tmp_path / "other"), [words()], out=out)
    with (folder / "model.safetensors").open("r+b") as file:  # one bit of one weight
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with pytest.raises(RuntimeError, match="the model is loaded"):
        check(str(folder), [words()], out=out)


def test_what_a_check_is_asked_is_told_from_files_where_they_say_all(saved, tmp_path):
    """Options count; where files do not say all of it, nothing is taken up, and no pipe is read."""
    plain = asked_of(saved, ["w1"], dtype="float32")
    assert plain is not None
    assert plain == asked_of(saved, ["w1"], dtype="float32")
    assert len({plain, asked_of(saved, ["w1"], dtype="bfloat16"), asked_of(saved, [""])}) == 3
    assert asked_of(saved, None) != asked_of(saved, "")
    for unsure in ({"chat": True}, {"trust_remote_code": True}):
        assert asked_of(saved, ["w1"], **unsure) is None
    assert asked_of(saved, prompts(["w1"], chat=True)) is None
    assert asked_of("somebody/model", ["w1"]) is None
    os.mkfifo(tmp_path / "pipe")
    for text in (tmp_path / "pipe", Path("/dev/zero")):
        assert asked_of(saved, text) is None


def test_a_check_that_is_all_kept_loads_no_torch(saved, tmp_path):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text(words(), "utf-8")
    asked = ["check", str(saved), "--text", str(text), "--out", str(out), "--json"]
    with pytest.raises(SystemExit):
        main(asked)
    code = "import atexit, sys; from melens.cli.app import main; "
    code += "atexit.register(lambda: print('torch' in sys.modules)); main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *asked], capture_output=True, text=True, check=False
    )
    assert done.stdout.rstrip().endswith("False"), done.stderr


def test_nothing_is_kept_of_an_edited_model(small, tmp_path):
    planted = plant("llama", "single", 1)
    texts = Batch.of(batch(planted, n=4, length=24))
    model = model_of(planted)
    with wemask(model, 1, rate=0.5, tokens="first", select="activation"):
        model(texts.ids)
        with pytest.raises(InterventionError, match="an edit is open"):
            check(model, texts, out=tmp_path)


def test_progress_rises_to_the_end(small, tmp_path):
    seen = []
    planted = plant("llama", "single", 1)
    check(
        model_of(planted),
        Batch.of(batch(planted, n=4, length=24)),
        progress=lambda *at: seen.append(at),
    )
    assert list(dict.fromkeys(name for name, _, _ in seen)) == [
        name for name in STAGES if STAGES[name].budget == "quick"
    ]
    parts = [done for _, done, _ in seen]
    assert parts == sorted(parts)
    assert (parts[0], parts[-1]) == (0, 1000)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(path, data, **how):
        path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    planted = plant("llama", "single", 1)
    texts = Batch.of(batch(planted, n=4, length=24))
    monkeypatch.setattr(store.disk, "_write_new", full)
    with pytest.raises(OutputError, match="No space left on device"):
        check(model_of(planted), texts, out=tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --- The command.


@pytest.fixture
def run(capsys):
    def go(*arguments):
        with pytest.raises(SystemExit) as done:
            main(["check", *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return done.value.code or 0, captured.out, captured.err

    return go


def test_the_command_writes_its_files_and_ends_with_a_code(run, saved, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text(words(80))
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n# Planted\n")
    usual = (
        saved,
        "--text",
        text,
        "--bos",
        "--length",
        24,
        "--n-seq",
        3,
        "--out",
        tmp_path / "out",
    )
    code, stdout, stderr = run(*usual, "--junit", tmp_path / "a.xml", "--card", card)
    assert code == 1
    assert "has 1 finding under the policy 'default'" in stdout
    assert "melens: collapse: " in stderr
    for name in ("report.json", "report.html", "report.md"):
        assert (tmp_path / "out" / name).stat().st_size > 500
    assert ElementTree.parse(tmp_path / "a.xml").getroot().get("failures") == "1"
    assert card.read_text().startswith("---\nlicense: mit\n---\n# Planted\n")
    assert "int8-per-tensor" in card.read_text()
    code, stdout, stderr = run(*usual, "--policy", "research", "--json", "-q")
    assert (code, "melens:" in stderr) == (0, False)
    assert CheckReport.from_json(stdout).verdict == "pass"
    assert CheckReport.from_json(stdout).policy.name == "research"


def test_the_command_refuses_early(run, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text("\nfail_on = 'loud'\n")
    code, _, stderr = run("no-such-model", "--policy", policy)
    assert (code, stderr.count("\n")) == (2, 1)
    assert "policy.toml, line 2: fail_on" in stderr
    assert run("no-such-model", "--budget", "huge")[0] == 2
    assert run("no-such-model", "--card", tmp_path / "none.md")[0] == 2
    (tmp_path / "file").write_text("")
    code, _, stderr = run("no-such-model", "--out", tmp_path / "file" / "out")
    assert (code, stderr.count("\n")) == (3, 1)
    assert "cannot make the folder" in stderr
    assert run("no-such-model", "--junit", tmp_path)[0] == 2


def test_a_disk_that_fills_up_is_one_line_and_code_3(run, saved, tmp_path, monkeypatch):
    write = store.disk._write_new

    def full(path, data, **how):
        if "collapse" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data, **how)

    monkeypatch.setattr(store.disk, "_write_new", full)
    out = tmp_path / "out"
    code, stdout, stderr = run(saved, "--prompt", words(30), "--bos", "--out", out, "-q")
    assert (code, stdout) == (3, "")
    assert "collapse.json: No space left on device" in stderr.splitlines()[-1]
    assert sorted(path.stem for path in out.rglob("*.key")) == ["describe", "known", "locate"]
    assert not list(out.rglob("*.tmp"))
    monkeypatch.undo()
    assert run(saved, "--prompt", words(30), "--bos", "--out", out, "-q")[0] == 1


def test_a_folder_that_may_not_be_written_is_refused_early(run, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("root may write everywhere; un-skip: run as another user")
    code, _, stderr = run("no-such-model", "--out", closed / "out")
    assert (code, stderr.count("\n")) == (3, 1)
    assert "closed" in stderr


def test_incomplete_is_could_not_run(run, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "collapse", lambda *_args, **_options: failing())
    usual = (saved, "--prompt", words(30), "--bos", "--policy", "research")
    code, stdout, _ = run(*usual)
    assert code == 3
    assert "Stage collapse could not run: RuntimeError: no such kernel" in stdout


@pytest.mark.weights
def test_smollm2_quick(smol):
    from melens.batches import prompts

    report = check(smol, prompts(n=2, length=64))
    statuses = {rule.id: rule.status for rule in report.rules}
    assert found_in(report) == {"int8-per-tensor", "sink-heads"}
    assert statuses["known-layer"] == "passed"
    assert statuses["sink-needs-bos"] == statuses["chat-first-token"] == "passed"
    assert report.findings[0].evidence["layer"] == 11
    assert "507" in str(report.findings[0].evidence["massive_dimensions"])
    assert all(stage.status == "done" for stage in report.stages)


@pytest.mark.weights
@pytest.mark.parametrize(
    ("text", "n", "status"),
    [(" ".join(map(str, range(1, 21))), 1, "passed"), (" the" * 300, 5, "not measured")],
    ids=["digits", "one repeated word"],
)
def test_known_smollm2_is_itself_on_any_text(smol, lean, monkeypatch, text, n, status):
    """Sizes and stages differ there; the model is the same."""
    from melens.batches import prompts

    monkeypatch.setattr(stages, "sinks", lambda *_args, **_options: failing("left out"))
    report = check(smol, prompts([text], length=50, n=n))
    rule = next(rule for rule in report.rules if rule.id == "known-layer")
    assert rule.status == status


def test_a_published_row_that_a_model_is_too_small_for_is_of_another_model(clean):
    from melens.published import known

    located = clean.result("locate")
    assert located.n_layers > 2
    assert known("gpt2", located).comparisons  # deep enough for layer 2
    found = known("gpt2", located, d_model=64)  # but it has no dimension 447
    assert (found.verdict, found.comparisons) == ("unknown", ())


def test_zero_weights_are_refused(make_tiny, tokenizer):
    hf = make_tiny("llama")
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
    with pytest.raises(WeightsError, match="every activation is 0"):
        check(load(hf, tokenizer=tokenizer), ["w5 w6 w7 w8 w9"])


def test_the_policys_formats_are_measured_and_others_again(tmp_path, no_isolation, lean):
    model, out = model_of(plant("llama", "none", 0)), tmp_path / "out"
    texts = own_texts(model.original_model)

    def under(schemes):
        policy = tmp_path / "own.toml"
        policy.write_text(f"schemes = {schemes}\n", "utf-8")
        report = check(model, texts, budget="standard", policy=policy, out=out)
        rule = next(rule for rule in report.rules if rule.id == "quantised-loss")
        stage = next(stage for stage in report.stages if stage.name == "quantise")
        return report, rule, stage

    first, rule, _ = under('["w8a16"]')
    assert [one.scheme for one in first.result("quantise").schemes] == ["w8a16"]
    assert rule.value == first.at(rule.source)
    again, _, stage = under('["w8a16"]')
    assert again.timeless() == first.timeless()
    other, rule, _ = under('["w8a8-tensor"]')
    assert [one.scheme for one in other.result("quantise").schemes] == ["w8a8-tensor"]
    assert rule.value == other.result("quantise").schemes[0].as_is.damage.value
    _, rule, stage = under("[]")
    assert (stage.status, rule.status, rule.value) == ("skipped", "passed", None)
    assert "names no number format" in rule.reason
    with pytest.raises(PolicyError, match=r"line 1: unknown scheme 'w8'"):
        under('["w8"]')


def test_a_model_that_cannot_be_rounded_is_no_failed_check(no_isolation, lean, monkeypatch):
    from melens.errors import ModelError

    def refuse(*_args, **_options):
        raise ModelError("this model is quantised already.")

    monkeypatch.setattr(stages, "quantise", refuse)
    model = model_of(plant("llama", "none", 0))
    report = check(model, own_texts(model.original_model), budget="standard")
    stage = next(stage for stage in report.stages if stage.name == "quantise")
    assert (stage.status, stage.reason) == ("skipped", "this model is quantised already.")
    rule = next(rule for rule in report.rules if rule.id == "quantised-loss")
    assert (rule.status, rule.value, rule.reason) == ("passed", None, stage.reason)
