"""Help that fits the terminal: no word broken, no range that only says what a computer can hold."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:  # older versions of typer have click's own
    from typer._click import Context, HelpFormatter, Parameter

MOST, LEAST = 100, 40
"""Columns: longer lines are hard to read, and shorter ones hold no option."""
BESIDE = 26
"""Columns of an option's spelling; a longer one has its meaning on the next lines."""
OFFERED = 1 << 31
"""A bound beyond this is a computer's, and nobody's choice."""
EXAMPLES = ("Example:", "Examples:")
QUOTED = re.compile(r'"[^"]*"')
HELD = "\N{NO-BREAK SPACE}"
WORDS = {"integer": "INT", "int": "INT", "float": "NUMBER", "path": "PATH"}
"""What is to be typed, by the type's name; TEXT for others."""


class HelpedCommand(TyperCommand):
    """A command whose help is laid out here."""

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Usage, what it does with its examples, arguments, options."""
        formatter.write(help_of(self, ctx))


class HelpedGroup(TyperGroup):
    """The command with all others below it."""

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Usage, what it does, options, and a line a command."""
        formatter.write(help_of(self, ctx))


def width_of_terminal() -> int:
    """Columns that help may take."""
    return max(LEAST, min(MOST, shutil.get_terminal_size().columns))


def help_of(command: TyperCommand | TyperGroup, ctx: Context) -> str:
    """All of a command's help, a line break at its end."""
    width = width_of_terminal()
    params = [p for p in command.get_params(ctx) if not getattr(p, "hidden", False)]
    taken = [p for p in params if p.param_type_name == "argument"]
    offered = [p for p in params if p.param_type_name == "option"]
    commands = command.commands if isinstance(command, TyperGroup) else {}
    below = [(name, _first(one.help or "")) for name, one in commands.items()]
    places = [place(p) for p in taken] + ["COMMAND [ARGS]..."] * bool(below)
    usage = " ".join(["Usage:", ctx.command_path, *["[OPTIONS]"] * bool(offered), *places])
    parts = [_filled(usage, width, "  "), *_prose(command.help or "", width)]
    parts += _panel("Arguments", [(place(p), _said(p)) for p in taken], width)
    parts += _panel("Options", [(_spelt(p), _said(p)) for p in offered], width)
    parts += _panel("Commands", below, width)
    return "\n\n".join(parts) + "\n"


def _prose(text: str, width: int) -> Iterator[str]:
    """The paragraphs of a docstring, joined and filled again; an example a paragraph."""
    shown = False
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        words = " ".join(paragraph.split())
        head = next((name for name in EXAMPLES if words.startswith(name)), "")
        shown = shown or bool(head)
        if not shown:
            yield _filled(words, width)
            continue
        lines = [typer.style(head, bold=True)] * bool(head)
        yield "\n".join([*lines, _command_line(words.removeprefix(head).strip(), width)])


def _command_line(text: str, width: int) -> str:
    """An example to copy: what is quoted stays whole, and a line says that it goes on."""
    held = QUOTED.sub(lambda found: found[0].replace(" ", HELD), text)
    lines = _filled(held, width - 2, "    ", "  ").replace(HELD, " ").splitlines()
    return " \\\n".join(lines)


def _panel(name: str, rows: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
    """A heading with its rows below; nothing where there are none."""
    if rows:
        lines = [line for spelt, said in rows for line in _row(spelt, said, width)]
        yield "\n".join([typer.style(f"{name}:", bold=True), *lines])


def _row(spelt: str, said: str, width: int) -> Iterator[str]:
    indent = min(BESIDE, width // 3)
    lines = _filled(said, width, " " * indent, " " * indent).splitlines() or [""]
    if len(spelt) + 4 > indent:
        yield f"  {spelt}"
        yield from filter(None, lines)
    else:
        yield f"  {spelt}".ljust(indent) + lines[0].strip()
        yield from lines[1:]


def _filled(text: str, width: int, later: str = "", first: str = "") -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def place(param: Parameter) -> str:
    """An argument as the docstrings name it."""
    name = param.metavar or str(param.name).upper().strip("{}[]")
    return name if param.required else f"[{name}]"


def _spelt(param: Parameter) -> str:
    """All spellings of an option, the short one first, and what it takes."""
    opts = sorted(param.opts, key=lambda opt: opt.startswith("--"))
    return " ".join([", ".join([*opts, *param.secondary_opts]), *filter(None, [_takes(param)])])


def _takes(param: Parameter) -> str:
    if getattr(param, "is_flag", False):
        return ""
    kind = value_kind(param)
    return param.metavar or ("NAME" if kind.choices else WORDS.get(kind.name, "TEXT"))


class ValueKind(NamedTuple):
    """What a parameter takes."""

    name: str
    choices: tuple[str, ...]
    low: float | None
    high: float | None


def value_kind(param: Any) -> ValueKind:
    """Of a typer that keeps the annotation, or of one that makes click's types of it."""
    described = getattr(param, "type_descriptor", None)
    if described is None:
        kind = param.type
        choices, name = getattr(kind, "choices", ()), str(kind.name).lower().split()[0]
    else:
        found = described.annotation
        kind, found = param, (get_args(found) or (found,))[0]
        name = found.__name__.lower()
        choices = tuple(found) if issubclass(found, Enum) else ()
    low, high = getattr(kind, "min", None), getattr(kind, "max", None)
    named = tuple(str(getattr(item, "value", item)) for item in choices)
    return ValueKind(name, named, low, None if high is None or high > OFFERED else high)


def _said(param: Parameter) -> str:
    """The help text, with choices, range, default and variable as far as it does not say them."""
    said, kind = " ".join((getattr(param, "help", None) or "").split()), value_kind(param)
    flag, default = getattr(param, "is_flag", False), getattr(param.default, "value", param.default)
    notes = []
    if any(choice not in said for choice in kind.choices):
        notes.append(f"one of {', '.join(kind.choices)}")
    if kind.low is not None:
        most = "" if kind.high is None else f" to {kind.high:g}"
        notes.append(f"{kind.low:g}{most}" if most else f"at least {kind.low:g}")
    if isinstance(default, (str, int, float)) and not flag and "efault" not in said:
        notes.append(f"default: {default}")
    if getattr(param, "envvar", None):
        notes.append(f"environment: {param.envvar}")
    if param.required and param.param_type_name == "option":
        notes.append("required")
    return f"{said} [{'; '.join(notes)}]" if notes else said


def _first(text: str) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
