"""Which findings matter, and from which number on; a policy file is read with its lines."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from melens.checking.findings import RULES
from melens.errors import PolicyError
from melens.formatting import brief, clipped
from melens.protocols import JsonObject
from melens.quantising.schemes import SCHEMES
from melens.registry import Registry
from melens.results.base import Part
from melens.results.check import PolicyUsed
from melens.store import read_limited

Keys = tuple[str, ...]
LARGEST = 64_000
"""Bytes; a policy is a page."""
WIDEST = 500
"""Characters of a line: a dotted key of thousands of parts takes the library minutes."""
DEEPEST = 4
"""A policy has rules.NAME.threshold; what is deeper is an error anyway."""
_AT_LINE = re.compile(r"\(at line (\d+), column \d+\)")


@dataclass(frozen=True)
class Parsed:
    """A file's content, and where its keys stand."""

    path: Path
    data: JsonObject
    lines: dict[Keys, int]
    """Path of keys -> line, counted from 1."""

    def place(self, where: Keys) -> str:
        """File and line of a key; of what it is in, where the key itself has none."""
        for end in range(min(len(where), DEEPEST), 0, -1):
            if where[:end] in self.lines:
                return f"{self.path}, line {self.lines[where[:end]]}"
        return str(self.path)


def parsed(path: Path) -> Parsed:
    """Read a TOML file.

    Raises:  PolicyError: it cannot be read, or is not valid TOML.
    """
    try:
        raw = read_limited(path, LARGEST)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        said = getattr(error, "strerror", None) or error
        raise PolicyError(f"cannot read the policy {path}: {said}.") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise PolicyError(f"{path}, line {line}: not UTF-8; save it as UTF-8 text.") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if len(line) > WIDEST:
            raise PolicyError(
                f"{path}, line {number}: {len(line):,} characters; a policy's lines have at most "
                f"{WIDEST:,}."
            )
    try:
        return Parsed(path, tomllib.loads(text), _lines(text))
    except RecursionError:
        raise PolicyError(f"{path} is nested too deep for a policy.") from None
    except ValueError as error:  # TOMLDecodeError, and a number too long for Python
        said = str(error)
        found = _AT_LINE.search(said)
        line = f", line {found[1] if found else text.count(chr(10)) + 1}"
        said = said.split(" (at ")[0]
        raise PolicyError(f"{path}{line}: not valid TOML ({said[:160]}).") from None


def _lines(text: str) -> dict[Keys, int]:
    """The first line of every key, and of what it is in."""
    found: dict[Keys, int] = {}
    for keys, number in _keys_at(text):
        for end in range(1, len(keys) + 1):
            found.setdefault(keys[:end], number)
    return found


def _keys_at(text: str) -> Iterator[tuple[Keys, int]]:
    """Keys at the start of a line, and tables; each such line is read by the library alone.

    A line inside a longer value may look like a key: it only costs an error its right place.
    """
    table: Keys = ()
    for number, line in enumerate(text.split("\n"), start=1):
        shown = line.strip()
        if shown.startswith("["):
            if keys := _keys(shown):
                table = keys
                yield table, number
        elif "=" in shown and (keys := _keys(f"{shown.partition('=')[0]}=0")):
            yield (*table, *keys), number


def _keys(line: str) -> Keys:
    """The path of the one key that a line holds; empty where it holds none."""
    try:
        data: object = tomllib.loads(line)
    except (ValueError, RecursionError):
        return ()
    found: list[str] = []
    while isinstance(data, dict | list) and len(data) == 1 and len(found) < DEEPEST:
        if isinstance(data, dict):
            found.append(next(iter(data)))
            data = data[found[-1]]
        else:
            data = data[0]
    return tuple(found)


PRESETS = ("default", "strict", "research")
Level = Literal["off", "info", "warning", "critical"]
FailOn = Literal["info", "warning", "critical", "never"]


class RulePolicy(Part):
    """What a policy says of one rule."""

    severity: Level
    threshold: float = Field(ge=0)
    """In the rule's own unit."""


class Policy(Part):
    """A complete policy: every rule has its severity and its threshold."""

    name: str
    fail_on: FailOn
    schemes: list[str] = Field(default_factory=list)
    """Number formats that the model is to be served in, of ``melens.quantising.SCHEMES``."""
    rules: dict[str, RulePolicy]

    def used(self) -> PolicyUsed:
        """As it is kept in a report."""
        rules: dict[str, JsonObject] = {
            name: rule.model_dump() for name, rule in self.rules.items()
        }
        named = {"name": self.name, "fail_on": self.fail_on, "schemes": tuple(self.schemes)}
        return PolicyUsed(**named, rules=rules)


class _Change(Part):
    severity: Level | None = None
    threshold: float | None = Field(default=None, ge=0)


class _File(Part):
    name: str | None = Field(default=None, max_length=100)
    extends: Literal["default", "strict", "research"] = "default"
    fail_on: FailOn | None = None
    schemes: list[str] | None = None
    rules: dict[str, _Change] = Field(default_factory=dict)


def read_policy(given: str | Path | Policy | None = None) -> Policy:
    """A preset by name, a file, or a policy as it is; None = the preset ``default``.

    Raises:  PolicyError: no such preset or file, or one that does not mean anything, with the
             line where that is.
    """
    if isinstance(given, Policy):
        _check_ranges(given.rules, lambda _: f"the policy '{given.name}'")
        _check_schemes(given.schemes, f"the policy '{given.name}'")
        return given
    if given is None or str(given) in PRESETS:
        return _preset(str(given or "default"))
    if not isinstance(given, (str, Path)):
        raise PolicyError(f"a policy is a name, a .toml file or a Policy, got {brief(given, 40)}.")
    path = Path(given).expanduser()
    if path.suffix.lower() != ".toml":
        known: Registry[None] = Registry("policy")
        for name in PRESETS:
            known.add(name, None)
        raise PolicyError(f"{known.unknown(str(given))} A file must end in .toml.")
    return _read(path)


def _preset(name: str) -> Policy:
    text = (resources.files("melens") / "data" / "policies" / f"{name}.toml").read_text("utf-8")
    data = tomllib.loads(text)
    if "extends" not in data:
        return Policy.model_validate(data, strict=True)
    return _over(_preset(data["extends"]), _File.model_validate(data, strict=True), name)


def _read(path: Path) -> Policy:
    found = parsed(path)
    try:
        file = _File.model_validate(found.data, strict=True)
    except ValidationError as error:
        raise PolicyError(_said(found, error)) from None
    base = _preset(file.extends)
    known: Registry[None] = Registry("rule")
    for name in base.rules:
        known.add(name, None)
    for name in file.rules:
        if name not in known:
            raise PolicyError(f"{found.place(('rules', name))}: {known.unknown(name)}")
    _check_ranges(file.rules, lambda name: found.place(("rules", name, "threshold")))
    _check_schemes(file.schemes or (), found.place(("schemes",)))
    return _over(base, file, path.stem)


def _check_ranges(rules: Mapping[str, RulePolicy | _Change], place: Callable[[str], str]) -> None:
    """Refuse a threshold that no number of the rule can be on both sides of."""
    for name, says in rules.items():
        card = RULES[name].card
        if card.highest is not None and (says.threshold or 0.0) > card.highest:
            raise PolicyError(
                f"{place(name)}: rules.{name}.threshold must be from 0 to {card.highest:g} "
                f"({card.unit}), got {says.threshold:g}."
            )


def _check_schemes(names: Iterable[str], place: str) -> None:
    for name in names:
        if name not in SCHEMES:
            raise PolicyError(f"{place}: {SCHEMES.unknown(name)}")


def _over(base: Policy, file: _File, name: str) -> Policy:
    rules = dict(base.rules)
    for rule, change in file.rules.items():
        rules[rule] = rules[rule].model_copy(update=change.model_dump(exclude_none=True))
    return Policy(
        name=file.name or name,
        fail_on=file.fail_on or base.fail_on,
        schemes=base.schemes if file.schemes is None else file.schemes,
        rules=rules,
    )


def _said(found: Parsed, error: ValidationError) -> str:
    """The first thing that is wrong: where, what fits, what was given."""
    first = error.errors()[0]
    where = tuple(str(part) for part in first["loc"])
    key = clipped(".".join(where)) or "the file"
    given = first.get("input")
    if first["type"] == "extra_forbidden":
        fields = _Change.model_fields if where[:1] == ("rules",) else _File.model_fields
        fits = f"unknown key {brief(where[-1])}; here fit {', '.join(fields)}"
    elif first["type"] == "model_type" or isinstance(given, dict):
        fits = f"{key} must be a table of keys and values, got {brief(given, 40)}"
    else:
        fits = f"{key}: {_lower(first['msg'])}, got {brief(given, 40)}"
    return f"{found.place(where)}: {fits}."


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
