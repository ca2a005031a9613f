"""The top of a report: whether the model ships, what to do; evidence in words; small drawings."""

from __future__ import annotations

import ast
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import planted_report as planted
import pytest

import melens.checking.findings as findings
from melens.reporting.evidence import ENDS, EVIDENCE, evidence_facts
from melens.reporting.pictures import smaller
from melens.reporting.shipping import head_facts, nothing_to_do, ship_answer, to_do
from melens.reporting.source import Addressed
from melens.results.check import PolicyUsed, StageRecord

LOCATE = {"locate": planted.saved("smollm2")["locate"]}
GRAVE, WARNED, REMARK = (
    planted.finding(f"rule-{severity}", severity) for severity in ("critical", "warning", "info")
)
FAILED = StageRecord(name="sinks", status="failed", seconds=0, reason="no attention")


def checked(found, fail_on="warning", **changes):
    policy = PolicyUsed(name="default", fail_on=fail_on, rules={})
    facts = {"recommendation": None, "policy": policy, **changes}
    return planted.report(results=dict(LOCATE), findings=found, **facts)


@pytest.mark.parametrize(
    ("found", "changes", "level", "says", "first"),
    [
        ((GRAVE, WARNED), {"verdict": "findings"}, "critical", "Not as it is: 1 critical", GRAVE),
        ((WARNED, REMARK), {"verdict": "findings"}, "warning", "Only with care: 1 warn", WARNED),
        ((WARNED,), {"fail_on": "critical", "verdict": "pass"}, "pass", "Yes, as far as", WARNED),
        ((REMARK,), {"fail_on": "info", "verdict": "findings"}, "info", "Yes, with rem", REMARK),
        ((REMARK,), {"verdict": "pass"}, "pass", "Yes, as far as the policy 'default'", None),
        ((), {"verdict": "incomplete", "stages": (FAILED,)}, "incomplete", "Not known yet", None),
        ((REMARK, WARNED), {"fail_on": "never"}, "warning", "Your decision: the policy", WARNED),
        (
            (REMARK,),
            {"fail_on": "info", "verdict": "findings", "stages": (FAILED,)},
            "info",
            "Not known yet: 1 remark under the policy 'default'. sinks could not run.",
            REMARK,
        ),
    ],
)
def test_the_first_line_answers_and_the_list_says_what_to_do(found, changes, level, says, first):
    report = checked(found, **changes)
    answer = ship_answer(report)
    assert (answer.level, answer.text[: len(says)]) == (level, says)
    assert (to_do(report) or (None,))[0] == first
    if level == "incomplete":
        assert "sinks could not run" in answer.text
        assert "Run the check again" in nothing_to_do(report)


def test_a_yes_says_how_many_rules_have_no_answer():
    asked = planted.rule(status="not measured", value=None, reason="no BOS", id="sink-needs-bos")
    report = checked((), verdict="pass", rules=(planted.rule(), asked))
    assert ship_answer(report).text.endswith("1 of 2 rules was not measured.")
    source = Addressed(report.to_dict())
    said = {fact.label: str(fact.value) for fact in head_facts(report, source)}
    assert said["Rules measured"] == "1 of 2"
    assert said["Rules not measured"] == "1: sink-needs-bos"
    assert said["Model or path"] == report.run.model
    assert said["Hash of the weights"] == report.run.weights
    assert said["Number format (dtype)"] == report.run.dtype
    assert report.run.created.startswith(said["Date"].replace(" ", "T"))


def test_every_number_that_a_rule_gives_has_words():
    """Names are read from the rules' code: none is left in the program's own words."""
    given: set[str] = set()
    for path in Path(findings.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Dict):
                given |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
            if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("evidence"):
                given |= {node.slice.value} if isinstance(node.slice, ast.Constant) else set()
    other = {"text", "chat", "k", "q", *ENDS}  # values of other dicts; the interval is one fact
    given = {name for name in given if isinstance(name, str) and re.fullmatch("[a-z_0-9]+", name)}
    known = {name for names in EVIDENCE.values() for name in names}
    assert given - other - known - {"chat_template"} <= {"texts"}
    assert known <= given | {"texts"}
    assert set(EVIDENCE) <= set(findings.RULES)


def test_evidence_stands_in_its_order_with_object_and_unit():
    evidence = {"column": 3, "interval_high": 2.5, "interval_low": 1.8, "layer": 11, "new": 1}
    found = planted.finding("super-weight", unit="nats", evidence=evidence)
    data = {"findings": [found.model_dump()]}
    facts = evidence_facts(found, "/findings/0", Addressed(data))
    assert [fact.label for fact in facts] == [
        "Measured: nats",
        "Policy's threshold, in the same unit",
        "Loss added, 95 % interval (nats a token)",
        "Layer of the weight (from 0)",
        "Its column of the down projection (FFN neuron, from 0)",
        "new",
    ]
    assert re.sub("<[^>]*>", "", str(facts[2].value)) == "1.8 to 2.5"


def test_a_smaller_drawing_is_the_same_drawing():
    """Closed form: places to two decimals, names that are used, no comment; scales stay."""
    svg = """<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "x" "y">
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">
 <metadata>by hand</metadata>
 <g id="spare"><!-- a -- name --><path id="used" d="M 1.23456 7
L 2 -0.001
z
" transform="translate(3.14159 2) scale(0.015625)"/></g>
 <use xlink:href="#used" x="9.999" clip-path="url(#clip)"/><clipPath id="clip"/>
</svg>"""
    made = smaller(svg)
    root = ET.fromstring(made)
    (path,) = root.iter("{http://www.w3.org/2000/svg}path")
    assert path.attrib == {
        "id": "used",
        "d": "M1.23 7L2 -0z",
        "transform": "translate(3.14 2) scale(0.015625)",
    }
    assert root.find("{*}use").get("x") == "10"
    assert root.find("{*}clipPath").get("id") == "clip"
    assert "spare" not in made
    assert "name" not in made
    assert "by hand" not in made
