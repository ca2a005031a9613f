"""Checks made of saved results, with findings planted by hand: what the report is tested on."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from melens.provenance import RunInfo
from melens.reporting import html_page
from melens.results import AttentionMaps, HeadMap, TokenNorms, load_result
from melens.results.check import (
    CacheNorms,
    CacheRow,
    CheckReport,
    Finding,
    PolicyUsed,
    Recommendation,
    RuleOutcome,
    StageRecord,
)

SAVED = Path(__file__).parents[2] / "docs" / "results"
FILES = {
    "locate": "locate",
    "describe": "describe",
    "collapse": "collapse",
    "sinks": "sinks",
    "isolate": "isolate",
    "super_weights": "super-weights",
    "doses": "perplexity-activation.evaluate",
}
MODELS = {"smollm2": "smollm2-135m-bos", "gemma": "gemma3-270m"}
HOSTILE = (
    "</script><img src=x onerror=\"document.title='hacked'\">",
    "<b>bold</b>",
    "&lt;i&gt;",
    "'\"`|*_[x](https://example.org)",
    "<!-- melens check: end -->",
    "\u202egnp.exe",
    "\x00\x1b[31m",
    "שלום עולם",
    "مرحبا",
    "${alert(1)} {{ 7 * 7 }}",
    "\n",
    "   ",
)
HOSTILE_NAME = "a\"b'<c>`|\n</title></style><script>document.title='hacked'</script>\u202eשלום"


def run_info(**changes) -> RunInfo:
    facts = {
        "model": "planted",
        "model_revision": None,
        "weights": "0123",
        "dtype": "float32",
        "device": "cpu",
        "seed": 0,
        "settings": {"texts": 8},
        "command": "melens check planted",
        "versions": {"python": "3.11.7", "melens": "0.1.0"},
        "git": "0e1e009",
        "created": "2025-01-01T00:00:00+00:00",
    }
    return RunInfo.model_validate(facts | changes)


def maps(tokens=None, layers=(12, 20, 28), heads=9, run=None) -> AttentionMaps:
    """Query i gives 0.65 to token 0 and shares the rest."""
    tokens = tokens or ("<|im_start|>", *(f" word{i}" for i in range(1, 24)))
    n = len(tokens)
    rows = ((1.0,), *((0.6543, *((0.3457 / i,) * i)) for i in range(1, n)))
    return AttentionMaps(
        tokens=tuple(tokens),
        me_layer=11,
        massive_positions=(0,),
        heads=tuple(HeadMap(layer=x, head=h, rows=rows) for x in layers for h in range(heads)),
        norms=(TokenNorms(layer=11, norms=(24133.0, *(10.0,) * (n - 1))),),
        run=run or run_info(),
    )


def cache_norms() -> CacheNorms:
    rows = tuple(
        CacheRow(layer=i, site=site, head=i % 3, token=40.0 + i, others=8.0, ratio=(40.0 + i) / 8)
        for i in range(12, 16)
        for site in ("rot_k", "v")
    )
    return CacheNorms(me_layer=11, n_layers=30, rows=rows, missing=(), run=run_info())


@cache
def saved(model: str) -> dict[str, dict]:
    """All results of one real model, as JSON."""
    return {
        name: load_result(SAVED / f"{MODELS[model]}.{kind}.json").to_dict()
        for name, kind in FILES.items()
    }


def finding(id="int8-per-tensor", severity="critical", **changes) -> Finding:
    facts = {
        "id": id,
        "severity": severity,
        "title": "Most entries round to zero in int8",
        "value": 0.97,
        "unit": "share",
        "threshold": 0.5,
        "why": "One scale for the whole tensor is set by the massive entry.",
        "advice": "Quantise per channel, or keep dimension 507 in 16 bits.",
        "evidence": {"largest": 24926.0, "step": 196.3, "dimensions": "507", "none": None},
        "source": "/results/locate/profile/11/max",
    }
    return Finding.model_validate(facts | changes)


def rule(found: Finding | None = None, **changes) -> RuleOutcome:
    facts = {
        "id": "float16-range",
        "title": "Entries beyond float16",
        "status": "passed",
        "value": 0.38,
        "unit": "share",
        "threshold": 1.0,
        "reason": None,
        "source": "/results/locate/profile/11/max",
    }
    if found is not None:
        keys = ("id", "title", "value", "unit", "threshold", "source")
        facts |= {key: getattr(found, key) for key in keys} | {"status": "found"}
    return RuleOutcome.model_validate(facts | changes)


def report(model="smollm2", results=None, findings=None, **changes) -> CheckReport:
    """A check of a real model's saved results."""
    results = dict(saved(model)) if results is None else results
    if "attention" not in results:
        results["attention"] = maps().to_dict()
    if "cache_norms" not in results and "collapse" in results:
        results["cache_norms"] = cache_norms().to_dict()
    if findings is None:
        findings = (
            finding(),
            finding("sink-needs-bos", "warning", title="Sinks need BOS", unit="", value=0.12),
            finding("chat-first-token", "info", title="The chat template's first token is BOS"),
        )
    verdict = "findings" if any(f.severity == "critical" for f in findings) else "pass"
    run = RunInfo.model_validate(results["locate"]["run"])
    facts = {
        "model": run.model,
        "verdict": verdict,
        "budget": "full",
        "answer": f"{run.model} has one massive token that everything hangs on; keep BOS.",
        "policy": PolicyUsed(
            name="default",
            fail_on="critical",
            rules={f.id: {"severity": f.severity, "threshold": f.threshold} for f in findings},
        ),
        "stages": (
            StageRecord(name="locate", status="done", seconds=21.5, reason=None),
            StageRecord(name="tune", status="skipped", seconds=0, reason="not in this budget"),
        ),
        "findings": tuple(findings),
        "rules": (rule(), *map(rule, findings)),
        "results": results,
        "recommendation": Recommendation(
            action="leave it",
            text="No mask lowers the loss.",
            edit=None,
            delta=0.0041,
            interval=(-0.002, 0.01),
            tried=6,
            source="/results/doses/edited/delta",
        )
        if "doses" in results
        else None,
        "run": run,
    }
    return CheckReport(**(facts | changes))


def replaced(value, old: dict[str, str]):
    """JSON with texts replaced wherever they stand as a whole."""
    return json.loads(
        json.dumps(value),
        object_hook=lambda held: {
            key: old.get(part, part) if isinstance(part, str) else part
            for key, part in held.items()
        },
    )


def hostile() -> CheckReport:
    """Every text that a model, a tokenizer or a user has a say in, at its worst."""
    name = HOSTILE_NAME
    bad = {"<|im_start|>": HOSTILE[0], "smollm2-135m": name}
    kept = ("locate", "describe", "sinks")
    results = replaced({name: saved("smollm2")[name] for name in kept}, bad)
    for i, entry in enumerate(results["describe"]["first_tokens"]):
        entry["token"] = HOSTILE[i % len(HOSTILE)]
    run = run_info(model=name, command=f"melens check '{name}'", versions={name: name})
    results["attention"] = maps(HOSTILE, layers=(12,), heads=2, run=run).to_dict()
    found = finding(
        title=HOSTILE[0],
        why=HOSTILE[1],
        advice=" ".join(HOSTILE),
        evidence={HOSTILE[0]: HOSTILE[3], "a/b~c": HOSTILE[4]},
    )
    return report(
        results=results,
        findings=(found,),
        model=name,
        answer=" ".join(HOSTILE),
        run=run,
        stages=(StageRecord(name="x", status="failed", seconds=0, reason=HOSTILE[0]),),
    )


@cache
def checked(which: str) -> CheckReport:
    """One of the checks by name: of a model in MODELS, or the hostile one."""
    return hostile() if which == "hostile" else report(which)


@cache
def page(which: str) -> str:
    """Its page, drawn once for all tests of a process."""
    return html_page(checked(which))
