"""Policies, results and other small files that nobody would write by hand.

Whatever stands in one, reading it ends within seconds in an object or in one printable line.
MELENS_FUZZ sets the number of examples.
"""

from __future__ import annotations

import json
import os
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planted_report import SAVED

from melens.checking.policy import read_policy
from melens.cli.options import read_edit_file
from melens.errors import BAD_INPUT, MelensError, PolicyError, ResultError
from melens.item_rows import Rows
from melens.patching.sweep import Cells
from melens.results import load_result

FUZZ = settings(
    max_examples=int(os.environ.get("MELENS_FUZZ", "100")),
    deadline=20_000,
    database=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
SMALL = sorted(SAVED.glob("*.json"), key=lambda path: path.stat().st_size)[:12]
KEYS = [
    "rules",
    "one-token",
    "threshold",
    "severity",
    "name",
    "extends",
    "fail_on",
    "schema",
    "run",
    "model",
    "me_layer",
    "massive",
    "profile",
    "tokens",
    "cells",
    "edit",
]
WORDS = st.one_of(
    st.sampled_from([*KEYS, "melens/locate/1", "melens/check/1", "melens/edit/1", "default"]),
    st.text(max_size=20),
    st.sampled_from(["\x1b[2J", "\u202e", "\ud800", "\u2028", "\x00"]),
)
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 2**63, -1, 0, 1e308]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.recursive(
    SCALARS,
    lambda part: st.one_of(
        st.lists(part, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), WORDS), part, max_size=4),
    ),
    max_leaves=12,
)
NASTY = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"schema": "melens/locate/1", "a": ' + b"[" * 9000,
    b"1" * 60_000,
    b'{"schema": ' + b"1" * 60_000 + b"}",
    b"NaN",
    b'{"schema": NaN}',
    b"",
    b"\xef\xbb\xbf{}",
    b'{"schema": "\\ud800"}',
    b"null",
    b"a = " + b"[" * 20_000,
    b"a." * 20_000 + b"a = 1",
    b"[" + b"a." * 20_000 + b"a]",
    b"a = " + b"9" * 20_000,
    b"".join(b"a%d." % i + b"b." * 240 + b"a = 1\n" for i in range(120)),
    b"[\n" * 30_000,
    b"x = " + b"[\n" * 30_000,
    b" " * 60_000 + b"[",
    b"[" + b" " * 60_000,
    b'"' + b"a" * 60_000 + b'" = 1',
    b"a = '''" + b"\n" * 60_000,
    b"[rules.one-token]\nthreshold = " + b"9" * 400,
    b"name = '" + b"n" * 9000 + b"'",
    b"rules.\x1b = 1",
    b"a = {" * 20_000,
]
"""By number, so that a failure is not shown with all of it."""
BYTES = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda t: t.encode("utf-16")),
    st.integers(0, 99).map(lambda i: NASTY[i % len(NASTY)]),
)


def holds_or_says_why(read, kind: type[MelensError] = MelensError) -> None:
    """The contract of every reader here."""
    try:
        read()
        return
    except kind as error:
        said, code = str(error), error.exit_code
    assert code == BAD_INPUT
    assert 0 < len(said) < 3000
    assert not [c for c in said if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


def as_toml(value) -> str:
    """TOML of a value, as near as it comes: what it cannot say is written in JSON."""
    if not isinstance(value, dict):
        return f"x = {json.dumps(value)}\n"
    lines = [
        f"[{key}]\n{as_toml(part)}"
        if isinstance(part, dict) and key.isidentifier()
        else f"{json.dumps(key)} = {json.dumps(part).replace(': ', ' = ')}\n"
        for key, part in value.items()
    ]
    return "".join(lines)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "given.toml"


@FUZZ
@given(made=st.one_of(BYTES, VALUES.map(lambda v: as_toml(v).encode("utf-8", "surrogatepass"))))
def test_any_policy_file(path, made):
    path.write_bytes(made)
    holds_or_says_why(lambda: read_policy(path), PolicyError)


RULES = st.dictionaries(
    st.one_of(st.sampled_from(["one-token", "sink-heads", "known-layer", "nothing"]), WORDS),
    st.dictionaries(st.sampled_from(["severity", "threshold", "limit"]), VALUES, max_size=3),
    max_size=3,
)


@FUZZ
@given(rules=RULES, name=WORDS)
def test_any_nearly_right_policy(path, rules, name):
    lines = [f"name = {json.dumps(name)}\n"]
    for rule, says in rules.items():
        lines.append(f"[rules.{json.dumps(rule)}]\n")
        lines += [
            f"{key} = {json.dumps(value).replace(': ', ' = ')}\n" for key, value in says.items()
        ]
    path.write_text("".join(lines), "utf-8", "surrogatepass")
    holds_or_says_why(lambda: read_policy(path), PolicyError)


@FUZZ
@given(made=st.one_of(BYTES, VALUES.map(lambda value: json.dumps(value).encode())))
def test_any_result_file(path, made):
    path.write_bytes(made)
    holds_or_says_why(lambda: load_result(path), ResultError)
    holds_or_says_why(lambda: read_edit_file(path), ResultError)
    holds_or_says_why(lambda: Cells(path, "key"), ResultError)
    holds_or_says_why(lambda: Rows(path, {}), ResultError)


def _places(value, here=()):
    yield here
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _places(part, (*here, key))
    elif isinstance(value, list):
        for i, part in enumerate(value[:3]):
            yield from _places(part, (*here, i))


@FUZZ
@given(data=st.data())
def test_a_real_result_with_one_place_changed(path, data):
    """Where the reader still takes it, its sentence, table and figure-free JSON hold too."""
    value = json.loads(data.draw(st.sampled_from(SMALL)).read_text("utf-8"))
    place = data.draw(st.sampled_from(list(_places(value))))
    new = data.draw(VALUES)
    if place:
        held = value
        for step in place[:-1]:
            held = held[step]
        held[place[-1]] = new
    else:
        value = new
    path.write_text(json.dumps(value))
    holds_or_says_why(lambda: load_result(path), ResultError)
