"""Write docs/cli.md and docs/api.md from the commands' own help and the public docstrings.

    python experiments/make_reference.py           # write what is out of date
    python experiments/make_reference.py --check   # write nothing, exit 1 if a page is out of date

Reads the same objects that ``--help`` prints, so that neither page can say anything else.
"""

from __future__ import annotations

import argparse
import enum
import functools
import importlib
import inspect
import pkgutil
import re
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

import melens
from melens import results
from melens.cli.app import app
from melens.results.base import Result
from melens.store import write_atomically

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    "melens.measuring": "Single measurements, and several in one pass.",
    "melens.interventions": "Edits, each a context manager.",
    "melens.checking": "The check before a model ships.",
    "melens.reporting": "Its page, its text and its model card.",
    "melens.scanning": "What the weights predict, and what first tokens do of it.",
    "melens.comparing": "Two models or saved results side by side, and every model of a machine.",
    "melens.published": "What others published, and results held against it.",
    "melens.evaluating": "How a task is run.",
    "melens.patching": "What is patched, and how it is scored.",
    "melens.tuning": "What is searched, and for how long.",
    "melens.exporting": "An edit to take along.",
    "melens.capture": "The capture underneath every measurement.",
    "melens.figures": "Figures of results.",
}
"""Module -> what stands under its heading; its ``__all__`` is what is public there."""
SECTION = re.compile(r"^(Args|Returns|Raises|Source|Yields|Example|Examples|Note):\s*(.*)$")
ERROR = re.compile(r"^[A-Z][\w, ]*(Error|Exception)[\w, ]*( and its kinds)?: ")
CODE = re.compile(r"(``.+?``|`[^`\n]+`)", re.DOTALL)
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([^`]+)`")
MADE = (
    "<!-- made by experiments/make_reference.py; edit the docstring or the help text instead -->\n"
)


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where ``--check`` finds a page out of date, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    stale = False
    for name, text in (("cli.md", cli_page()), ("api.md", api_page())):
        path = options.root / "docs" / name
        if path.exists() and path.read_text("utf-8") == text:
            continue
        stale = True
        sys.stdout.write(f"{'out of date' if options.check else 'wrote'}: {path}\n")
        if not options.check:
            write_atomically(path, text)
    return int(options.check and stale)


def cli_page() -> str:
    """Every command with its arguments, options and examples."""
    parts = [
        f"# Command line\n\n{MADE}\n{plain(app.info.help or '')}\n\nWhat `melens COMMAND --help` "
        "says, command by command. `--debug` works after every command. Results go to stdout, the "
        "rest to stderr.\n"
    ]
    for info in app.registered_commands:
        assert info.callback is not None
        name = info.name or info.callback.__name__.replace("_", "-")
        parts.append(_command(name, info.callback))
    return "\n".join(parts)


@dataclass(frozen=True)
class Param:
    """One argument or option of a command, as its function declares it."""

    name: str
    kind: Any
    info: Any
    default: Any

    @property
    def required(self) -> bool:
        """Whether the command needs it."""
        return self.default is inspect.Parameter.empty

    @property
    def shown(self) -> str:
        """An argument's name, or all spellings of an option."""
        if isinstance(self.info, typer.models.ArgumentInfo):
            return self.info.metavar or self.name.upper()
        # within Annotated the first spelling sits where the default would
        first = [self.info.default] if isinstance(self.info.default, str) else []
        spelt = [*first, *(self.info.param_decls or ())]
        plain_name = self.name.replace("_", "-")
        if not any(declared.startswith("--") for declared in spelt):
            spelt.append(f"--{plain_name}" + f"/--no-{plain_name}" * (self.kind is bool))
        flags = [flag for declared in spelt for flag in declared.split("/")]
        return "`, `".join(flags)

    def cells(self) -> tuple[str, str, str, str]:
        """Its row: name, what it takes, default, meaning."""
        value = getattr(self.default, "value", self.default)
        default = (
            "required" if self.required else "" if value is None or value is False else f"`{value}`"
        )
        variable = self.info.envvar
        said = plain(" ".join((self.info.help or "").split()))
        said += f" Environment: `{variable}`." if variable else ""
        return f"`{self.shown}`", self.takes(), default, said

    def takes(self) -> str:
        """What it takes, in words."""
        kinds = [kind for kind in typing.get_args(self.kind) if kind is not type(None)]
        several = typing.get_origin(self.kind) is list or any(
            typing.get_origin(kind) is list for kind in kinds
        )
        kind = kinds[0] if kinds else self.kind
        kind = (typing.get_args(kind) or (kind,))[0]
        if kind is bool:
            return ""
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return " or ".join(f"`{item.value}`" for item in kind)
        word = {int: "integer", float: "number", Path: "path"}.get(kind, "text")
        low, high = self.info.min, self.info.max
        if low is not None:
            word += f" from {low}" if high is None or high > 1e9 else f", {low} to {high}"
        return word + (", several" if several else "")


def _params(callback: Any) -> list[Param]:
    hints = typing.get_type_hints(callback, include_extras=True)
    made = []
    for name, parameter in inspect.signature(callback).parameters.items():
        kind, info = typing.get_args(hints[name])[:2]
        made.append(Param(name, kind, info, parameter.default))
    return made


def _command(name: str, callback: Any) -> str:
    said, examples = _examples(inspect.cleandoc(callback.__doc__ or ""))
    params = _params(callback)
    taken = [p for p in params if isinstance(p.info, typer.models.ArgumentInfo)]
    offered = [p for p in params if not isinstance(p.info, typer.models.ArgumentInfo)]
    places = [p.shown if p.required else f"[{p.shown}]" for p in taken]
    usage = " ".join(["melens", name, *["[OPTIONS]"] * bool(offered), *places])
    parts = [f"## melens {name}\n", f"{plain(said)}\n", f"```text\n{usage}\n```\n"]
    if examples:
        parts.append(f"```bash\n{examples}\n```\n")
    for kind, rows in (("argument", taken), ("option", offered)):
        if rows:
            parts.append(_table((kind, "takes", "default", "meaning"), [p.cells() for p in rows]))
    return "\n".join(parts)


def _examples(text: str) -> tuple[str, str]:
    """A docstring without its examples, and the commands in them."""
    said, _, rest = text.partition("Examples:" if "Examples:" in text else "Example:")
    commands = [line.strip() for line in rest.splitlines() if line.strip()]
    return said.strip(), "\n".join(commands)


def _table(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [names, ("---",) * len(names), *rows]
    return "".join(
        f"| {' | '.join(c.replace('|', chr(92) + '|') for c in line)} |\n" for line in lines
    )


def api_page() -> str:
    """The public names with their docstrings."""
    parts = [
        f"# Python\n\n{MADE}\nNames that `import melens` gives, then those of single modules. "
        "Layers count from 0, at the block output.\n"
    ]
    parts += [_entry("melens", name, level=2) for name in melens.__all__]
    for module, about in MODULES.items():
        home = importlib.import_module(module)
        parts.append(f"## {module}\n\n{about}\n")
        names = getattr(home, "__all__", None) or _own(home)
        parts += [_entry(module, name, level=3) for name in names if name not in melens.__all__]
    parts.append(_results())
    return "\n".join(part for part in parts if part)


def _own(module: Any) -> list[str]:
    """Public functions and classes that a module without ``__all__`` defines itself."""
    return [
        name
        for name, item in vars(module).items()
        if not name.startswith("_")
        and callable(item)
        and getattr(item, "__module__", "") == module.__name__
    ]


def _entry(module: str, name: str, *, level: int) -> str:
    item = getattr(importlib.import_module(module), name)
    if not (inspect.isfunction(item) or inspect.isclass(item)):
        return ""
    head = f"{'#' * level} {module}.{name}\n" if level == 2 else f"{'#' * level} {name}\n"
    example = _example(f"{module}.{name}")
    return f"{head}\n```python\n{signature(name, item)}\n```\n\n{_docstring(item)}\n{example}"


@functools.cache
def _examples_page() -> str:
    return (ROOT / "docs" / "examples.md").read_text("utf-8") + "\n## "


def _example(name: str) -> str:
    """What docs/examples.md has of a function, with what it printed; nothing where it has none."""
    found = re.search(rf"^## {re.escape(name)}\n\n(.*?)\n(?=## )", _examples_page(), re.M | re.S)
    return f"**Example** ([all of them](examples.md))\n\n{found[1].strip()}\n\n" if found else ""


def signature(name: str, item: Any) -> str:
    """A call's form on one or several lines, annotations as they are written."""
    try:
        found = inspect.signature(item)
    except (TypeError, ValueError):
        return f"{name}(...)"
    parts, star = [], False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        star = star or parameter.kind is parameter.VAR_POSITIONAL
        parts.append(_parameter(parameter))
    back = found.return_annotation
    arrow = "" if back is found.empty or inspect.isclass(item) else f" -> {_annotation(back)}"
    line = f"{name}({', '.join(parts)}){arrow}"
    return line if len(line) <= 88 else f"{name}(\n    " + ",\n    ".join(parts) + f",\n){arrow}"


def _parameter(parameter: inspect.Parameter) -> str:
    sign = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = f"{sign}{parameter.name}"
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        shown = repr(parameter.default)
        text += f" = {'...' if ' at 0x' in shown or len(shown) > 60 else shown}"
    return text


def _annotation(made: Any) -> str:
    return made if isinstance(made, str) else inspect.formatannotation(made)


def _docstring(item: Any) -> str:
    """A docstring as Markdown: its paragraphs, then a list under each of its sections."""
    parts: list[str] = []
    try:
        names = set(inspect.signature(item).parameters)
    except ValueError:  # an exception class
        names = set()
    lines = inspect.cleandoc(item.__doc__ or "").splitlines()
    section: list[str] | None = None
    for line in lines:
        if found := SECTION.match(line):
            section = [found[1], found[2]]
            parts.append("\n".join(section))
        elif section is not None and (line.startswith(" ") or not line.strip()):
            parts[-1] += f"\n{line.strip()}"
        else:
            section = None
            parts.append(line)
    return _joined(parts, names)


def _joined(parts: list[str], names: set[str]) -> str:
    made: list[str] = []
    for part in parts:
        head, _, body = part.partition("\n")
        if SECTION.match(f"{head}:") and _:
            items = list(_items(body.splitlines(), names))
            made.append("\n**" + head + "**\n\n" + "".join(f"- {plain(item)}\n" for item in items))
        else:
            made.append(plain(part))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(made)).strip() + "\n"


def _items(lines: list[str], names: set[str]) -> Iterator[str]:
    """A section's entries: a parameter's or an error's name begins one, all else goes on."""
    entry = ""
    for line in (line.strip() for line in lines if line.strip()):
        head = re.split(r"[, *]+", line.partition(":")[0].strip("* "))
        begins = (":" in line and set(filter(None, head)) <= names) or ERROR.match(line)
        if begins and entry:
            yield entry
            entry = ""
        if begins and not ERROR.match(line):
            name, _, rest = line.partition(":")
            line = f"`{name}`:{rest}"
        entry = f"{entry} {line}".strip()
    if entry:
        yield entry


def plain(text: str) -> str:
    """Prose of a docstring as Markdown: code stays code, nothing else is markup."""
    text = ROLE.sub(r"``\1``", text)
    pieces = CODE.split(text)
    return "".join(
        f"`{piece.strip('`')}`" if i % 2 else re.sub(r"([\[\]<>*_])", r"\\\1", piece)
        for i, piece in enumerate(pieces)
    )


def _results() -> str:
    """Every kind of saved result."""
    for module in pkgutil.iter_modules(results.__path__):
        importlib.import_module(f"melens.results.{module.name}")
    rows = sorted(
        (f"`{kind.schema_id}`", f"`{kind.__name__}`", _first(kind))
        for kind in Result.__subclasses__()
        if kind.__module__.startswith("melens.results.")
    )
    methods = (
        "summary",
        "plot",
        "rows",
        "tables",
        "to_frame",
        "to_csv",
        "to_latex",
        "arrays",
        "grids",
        "save",
        "to_json",
        "from_json",
        "to_dict",
    )
    said = [f"- `{name}`: {_first(getattr(Result, name))}\n" for name in methods]
    return (
        "## melens.results\n\nWhat functions return and commands save. All are frozen, and all "
        f"have:\n\n{''.join(said)}\n`load_result(path)` reads any of them back.\n\n"
        + _table(("schema", "class", "what it is"), rows)
        + "\nGrids that `arrays()` gives beside columns and curves:\n\n"
        + _table(("class", "names and shapes"), _grids())
    )


def _grids() -> list[tuple[str, ...]]:
    kinds = sorted(Result.__subclasses__(), key=lambda kind: kind.__name__)
    return [(f"`{k.__name__}`", _first(k.grids)) for k in kinds if "grids" in vars(k)]


def _first(item: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return plain(" ".join(inspect.cleandoc(item.__doc__ or "").split("\n\n")[0].split()))


if __name__ == "__main__":
    sys.exit(main())
