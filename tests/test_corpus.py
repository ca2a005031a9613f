"""Results saved before still load, and are saved again byte for byte."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from melens.results import base, load_result
from melens.results.base import Result

DOCS = Path(__file__).parent.parent / "docs"
SAVED = sorted([*DOCS.glob("results/*.json"), *DOCS.glob("reports/*.json")])
KINDS = {
    "locate",
    "describe",
    "collapse",
    "sinks",
    "isolate",
    "super-weights",
    "scan",
    "evaluate",
    "long-context",
    "check",
}


def test_saved_results_come_back_byte_for_byte():
    kinds = set()
    for path in SAVED:
        result = load_result(path)
        assert result.to_json() == path.read_text("utf-8"), path
        assert result.summary().endswith((".", ")")), path
        kinds.add(result.kind)
    assert len(SAVED) >= 40
    assert kinds >= KINDS


def test_a_result_inside_another_is_read_once(monkeypatch):
    """Loading a report validates what it holds; asking for it afterwards does not again."""
    read, parsed = Counter(), Counter()
    validated, loads = Result.validated.__func__, base.json.loads

    def counting(cls, text):
        read[cls.schema_id] += 1
        return validated(cls, text)

    def loading(text, *given, **options):
        parsed[len(text)] += 1
        return loads(text, *given, **options)

    monkeypatch.setattr(Result, "validated", classmethod(counting))
    monkeypatch.setattr(base.json, "loads", loading)
    path = next(path for path in SAVED if path.parent.name == "reports")
    report = load_result(path)
    held = [data["schema"] for data in report.results.values()]
    assert len(held) > 3
    assert read == {**Counter(held), report.schema_id: 1}
    assert parsed == {len(path.read_text("utf-8")): 1}
    first = {name: report.result(name) for name in report.results}
    assert all(report.result(name) is made for name, made in first.items())
    assert report.located() is first["locate"]
    assert read == {**Counter(held), report.schema_id: 1}
    assert load_result(path) == report
    other = report.model_copy(update={"results": {"sinks": dict(report.results["sinks"])}})
    assert other.result("sinks") is not first["sinks"]
    assert other.result("sinks") == first["sinks"]
