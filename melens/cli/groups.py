"""Groups of options: a command takes one object, its user types the fields one by one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Without:
    """Beside a group in ``Annotated``: fields that the command does not offer."""

    names: tuple[str, ...]


def without(*names: str) -> Without:
    """Leave these fields of a group out; they keep their defaults."""
    return Without(names)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer is to see it: in place of a group, each of its fields.

    A group is a dataclass whose fields are annotated as typer's parameters are. A command that
    needs another default or help for one option takes a subclass that declares that field again.
    """
    hints = get_type_hints(command, include_extras=True)
    shown: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, list[str]]] = {}
    for name, own in inspect.signature(command).parameters.items():
        kind, left_out = _group(hints[name])
        if kind is None:
            shown.append(own.replace(annotation=hints[name], kind=own.KEYWORD_ONLY))
            continue
        options = _options(kind, left_out)
        groups[name] = kind, [option.name for option in options]
        shown += options

    @functools.wraps(command)
    def run(**typed: object) -> None:
        made = {
            name: kind(**{option: typed.pop(option) for option in options})
            for name, (kind, options) in groups.items()
        }
        command(**typed, **made)

    run.__signature__ = inspect.Signature(shown)  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {one.name: one.annotation for one in shown}
    return run


def _group(hint: object) -> tuple[type | None, tuple[str, ...]]:
    """The group that a parameter is annotated with, if it is one, and what it leaves out."""
    kind, *beside = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    left_out = [name for one in beside if isinstance(one, Without) for name in one.names]
    return (kind if isinstance(kind, type) and is_dataclass(kind) else None), tuple(left_out)


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    """Read once: every command has the same groups, and help is to come at once."""
    return get_type_hints(kind, include_extras=True)


def _options(kind: type, left_out: tuple[str, ...]) -> list[inspect.Parameter]:
    hints = _hints(kind)
    offered = {field.name: field.default for field in fields(kind)}
    for name in left_out:
        del offered[name]
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is MISSING else default,
            annotation=hints[name],
        )
        for name, default in offered.items()
    ]
