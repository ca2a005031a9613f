"""A policy file read with the line of every key, so that an error can say where it is."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from melens.errors import PolicyError

Keys = tuple[str, ...]
LARGEST = 1_000_000
"""Bytes; a policy is a page."""
_HEADER = re.compile(r"^\s*\[\[?\s*([^\[\]#]+?)\s*\]\]?")
_KEY = re.compile(
    r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*="""
)
DEEPEST = 4
"""A policy has rules.NAME.threshold; what is deeper is an error anyway."""
_PART = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")


@dataclass(frozen=True)
class Parsed:
    """A file's content, and where its keys stand."""

    path: Path
    data: dict[str, Any]
    lines: dict[Keys, int]
    """Path of keys -> line, counted from 1."""

    def place(self, where: Keys) -> str:
        """File and line of a key; of what it is in, where the key itself has none."""
        for end in range(len(where), 0, -1):
            if where[:end] in self.lines:
                return f"{self.path}, line {self.lines[where[:end]]}"
        return str(self.path)


def parsed(path: Path) -> Parsed:
    """Read a TOML or YAML file.

    Raises:  PolicyError: it cannot be read, or is not what its ending says.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PolicyError(f"cannot read the policy {path}: {error.strerror or error}.") from None
    if len(raw) > LARGEST:
        raise PolicyError(f"{path} has {len(raw):,} bytes; that is no policy.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise PolicyError(f"{path}, line {line}: not UTF-8; save it as UTF-8 text.") from None
    read = _toml if path.suffix.lower() == ".toml" else _yaml
    return read(path, text)


def _toml(path: Path, text: str) -> Parsed:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        said = str(error)
        found = re.search(r"\(at line (\d+), column \d+\)", said)
        line = int(found[1]) if found else text.count("\n") + 1
        said = re.sub(r"\s*\(at [^)]*\)", "", said)
        raise PolicyError(f"{path}, line {line}: no TOML ({said}).") from None
    return Parsed(path, data, dict(_toml_lines(text)))


def _toml_lines(text: str) -> Iterator[tuple[Keys, int]]:
    """Keys at the start of a line, and tables; what stands inside a value is not looked at."""
    table: Keys = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _keys(header[1])
            yield table, number
        elif key := _KEY.match(line):
            yield (*table, *_keys(key[1])), number


def _keys(dotted: str) -> Keys:
    return tuple(part.strip("\"'") for part in _PART.findall(dotted))


class _Words(yaml.SafeLoader):
    """A severity may be ``off``: to YAML 1.1 that is false, and so it was no word."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as the base class has it)
        first: [(tag, shape) for tag, shape in found if not tag.endswith(":bool")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _yaml(path: Path, text: str) -> Parsed:
    try:
        node = yaml.compose(text, Loader=_Words)
        data = yaml.load(text, Loader=_Words)  # a safe loader that knows less
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        said = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise PolicyError(f"{path}, line {line}: no YAML ({said}).") from None
    except RecursionError:
        raise PolicyError(f"{path}, line 1: nested too deep for a policy.") from None
    if not isinstance(data, dict):
        raise PolicyError(f"{path}, line 1: a policy is keys with values, not {data!r:.40}.")
    lines: dict[Keys, int] = {}
    _yaml_lines(node, (), lines, path)
    return Parsed(path, data, lines)


def _yaml_lines(node: Any, above: Keys, lines: dict[Keys, int], path: Path) -> None:
    if not isinstance(node, yaml.MappingNode) or len(above) == DEEPEST:
        return
    for key, value in node.value:
        here = (*above, str(key.value))
        if here in lines:
            raise PolicyError(
                f"{path}, line {key.start_mark.line + 1}: {'.'.join(here)} is given twice (first "
                f"on line {lines[here]})."
            )
        lines[here] = key.start_mark.line + 1
        _yaml_lines(value, here, lines, path)
