"""Results saved before still load, and are saved again byte for byte."""

from __future__ import annotations

from pathlib import Path

from melens.results import load_result

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
