"""Policies: presets are whole, files change what they name, and a mistake has its line."""

from __future__ import annotations

import tomllib
from importlib import resources

import pytest

from melens.checking import PRESETS, RULES, read_policy
from melens.checking.policy import Policy, RulePolicy
from melens.errors import PolicyError


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_speaks_of_every_rule(name):
    policy = read_policy(name)
    assert policy.name == name
    assert list(policy.rules) == list(read_policy("default").rules)
    assert set(policy.rules) == set(RULES)


def test_presets_differ_as_they_say():
    default, strict, research = map(read_policy, PRESETS)
    assert (default.fail_on, strict.fail_on, research.fail_on) == ("warning", "info", "never")
    assert research.rules == default.rules
    assert strict.rules["float16-range"].threshold == 65504 / 2
    lower = ["super-weight", "one-token", "kv-eviction", "kv-quantisation", "sink-needs-bos"]
    for name in lower:
        assert strict.rules[name].threshold < default.rules[name].threshold
    assert read_policy() == read_policy(None) == default == read_policy(default)


def test_every_rule_of_the_default_is_commented():
    text = (resources.files("melens") / "data/policies/default.toml").read_text("utf-8")
    blocks = text.split("[rules.")[1:]
    before = text.split("\n[rules.")[:-1]
    assert len(blocks) == len(RULES)
    assert all(block.rstrip().splitlines()[-1].startswith("#") for block in before)


def write(folder, name, text):
    path = folder / name
    path.write_text(text, "utf-8")
    return path


TOML = """
name = "ours"
extends = "strict"
fail_on = "critical"
[rules.float16-range]
severity = "info"
[rules.int8-per-tensor]
severity = "off"
threshold = 3
"""


def test_a_file_changes_what_it_names(tmp_path):
    policy, strict = read_policy(write(tmp_path, "p.toml", TOML)), read_policy("strict")
    assert (policy.name, policy.fail_on) == ("ours", "critical")
    assert policy.rules["float16-range"] == RulePolicy(severity="info", threshold=32752.0)
    assert policy.rules["int8-per-tensor"] == RulePolicy(severity="off", threshold=3.0)
    same = set(policy.rules) - {"float16-range", "int8-per-tensor"}
    assert all(policy.rules[rule] == strict.rules[rule] for rule in same)
    assert policy.used().rules["int8-per-tensor"] == {"severity": "off", "threshold": 3.0}


def test_a_nameless_file_is_called_as_it_is(tmp_path):
    assert read_policy(str(write(tmp_path, "serving.toml", ""))).name == "serving"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.toml", "\n\nfail_on = 'loud'\n", r"line 3: fail_on: .*'never'.*got 'loud'"),
        ("a.toml", "\nfail = 'info'\n", r"line 2: unknown key 'fail'; here fit name, extends"),
        (
            "a.toml",
            "[rules.float16-range]\nthreshold = 1\nlimit = 2\n",
            r"line 3: unknown key 'limit'; here fit severity, threshold",
        ),
        (
            "a.toml",
            "[rules.float16-range]\n\nthreshold = 'big'\n",
            r"line 3: rules.float16-range.threshold: .*number, got 'big'",
        ),
        ("a.toml", "rules.one-token.threshold = -1\n", r"line 1: rules.one-token.threshold: .*-1"),
        ("a.toml", "x = 1\n[rules\n", r"line 2: not valid TOML"),
        ("a.toml", "[rules.one-token]\nthreshold = inf\n", r"line 2: rules.one-token.threshold"),
        (
            "a.toml",
            "[rules.sink-heads]\n\nthreshold = 30\n",
            r"line 3: rules.sink-heads.threshold must be from 0 to 1 \(share of .*got 30",
        ),
        (
            "a.toml",
            "name = 'a'\n[rules.one-tokn]\nthreshold = 1\n",
            r"line 2: unknown rule 'one-tokn'. Did you mean 'one-token'\?",
        ),
        ("a.toml", "[rules.one-token]\nthreshold = true\n", r"line 2: .*got True"),
        ("a.toml", "\n\nextends = 'lax'", r"line 3: extends: .*'default'.*got 'lax'"),
        ("a.toml", "rules = 3", r"line 1: rules: .*got 3"),
        ("a.toml", "name = 'a'\nname = 'b'\n", r"line 2: not valid TOML \(Cannot overwrite"),
        (
            "a.toml",
            "rules.sink-heads = { threshold = 1, thresh = 2 }\n",
            r"line 1: unknown key 'thresh'",
        ),
        ("a.toml", "a = [\n'''\nfail_on = 1\n''']\n", r"line 1: unknown key 'a'"),
        ("a.yaml", "name: a", r"unknown policy .*must end in .toml\."),
        ("a.txt", "", r"unknown policy .*must end in .toml\."),
    ],
)
def test_a_mistake_has_its_line(name, text, says, tmp_path):
    with pytest.raises(PolicyError, match=says) as raised:
        read_policy(write(tmp_path, name, text))
    assert "\n" not in str(raised.value)
    assert name in str(raised.value)


def test_a_policy_made_in_python_has_its_ranges_checked_too():
    policy = read_policy()
    rules = {**policy.rules, "sink-window": RulePolicy(severity="info", threshold=2.0)}
    with pytest.raises(PolicyError, match=r"policy 'default': rules.sink-window.threshold"):
        read_policy(policy.model_copy(update={"rules": rules}))


def test_what_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(PolicyError, match=r"cannot read the policy .*missing.toml: No such file"):
        read_policy(tmp_path / "missing.toml")
    with pytest.raises(PolicyError, match=r"unknown policy 'strickt'. Did you mean 'strict'\?"):
        read_policy("strickt")
    (tmp_path / "latin.toml").write_bytes(b"name = 'a'\n# \xe9\n")
    with pytest.raises(PolicyError, match=r"latin.toml, line 2: not UTF-8"):
        read_policy(tmp_path / "latin.toml")
    big = write(tmp_path, "big.toml", "#" * 1_000_001)
    with pytest.raises(PolicyError, match="1,000,001 bytes"):
        read_policy(big)


def test_the_presets_are_files_that_one_can_copy(tmp_path):
    for name in PRESETS:
        text = (resources.files("melens") / "data" / "policies" / f"{name}.toml").read_text("utf-8")
        assert tomllib.loads(text)["name"] == name
        assert read_policy(write(tmp_path, f"{name}.toml", text)) == read_policy(name)
    assert Policy.model_validate(read_policy().model_dump()) == read_policy()


def test_a_line_of_thousands_of_keys_is_refused_unread(tmp_path):
    """A dotted key of many parts takes the library minutes."""
    from melens.checking.policy import read_policy

    path = tmp_path / "p.toml"
    path.write_text("a = 1\n" + ".".join("a" * 300) + " = 1\n")
    with pytest.raises(PolicyError, match=r"p\.toml, line 2: 603 characters; .*at most 500"):
        read_policy(path)
