"""The cells of a sweep: one command of melens each, with its options as they would be typed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from melens.errors import MelensError, SweepError
from melens.formatting import brief
from melens.progress import one_command
from melens.protocols import JsonObject, Options
from melens.provenance import versions
from melens.registry import unknown_name
from melens.store import hash_facts, hash_file
from melens.sweeping.config import RunConfig, SweepConfig, combinations

if TYPE_CHECKING:
    from typer.core import TyperArgument, TyperCommand, TyperOption

    Param = TyperArgument | TyperOption

SET_BY_SWEEP = (
    *("out", "as_json", "force", "quiet", "dry_run", "offline"),
    *("junit", "card", "merge"),  # one file for all cells
)
"""Options that a sweep gives its cells itself, or that make no result."""
NO_RESULT = (
    *("generate", "export", "sidecar", "plot", "known", "models", "env", "diff"),
    *("sweep", "results", "census", "recipes"),
)
"""Commands that measure no single model, or keep no result."""


@dataclass(frozen=True)
class SweepCell:
    """One command on one model."""

    id: str
    """A hash of all that its numbers depend on."""
    command: str
    model: str
    """As named in the config."""
    options: JsonObject
    """As given in the config: the axes of this cell."""
    argv: tuple[str, ...]
    """What would be typed after ``melens``."""

    @property
    def axes(self) -> JsonObject:
        """What tells this cell's rows apart, as columns."""
        return {"model": self.model} | {
            name.replace("-", "_"): value for name, value in self.options.items()
        }

    def params(self) -> Options:
        """Every option as the command reads it."""
        command = command_of(self.command, self.title)
        return command.make_context("melens", list(self.argv[1:])).params

    @property
    def title(self) -> str:
        """For a line of a log."""
        given = (f"{name}={brief(value, 30)}" for name, value in self.options.items())
        return " ".join([self.command, self.model, *given])


def cells_of(config: SweepConfig) -> list[SweepCell]:
    """All cells, those of one model together; two that are the same are one.

    Raises:  SweepError: an unknown command, option or value; names the run.
    """
    found = [
        cell
        for number, run in enumerate(config.runs, 1)
        for cell in _cells_of_run(config, run, f"run {number} ({brief(run.command, 40)})")
    ]
    _require_used(config)
    models = list(dict.fromkeys(cell.model for cell in found))
    once = {cell.id: cell for cell in found}
    return sorted(once.values(), key=lambda cell: models.index(cell.model))


def _cells_of_run(config: SweepConfig, run: RunConfig, name: str) -> Iterator[SweepCell]:
    command = command_of(run.command, name)
    known = options_of(command)
    asked = {key: value for key, value in config.common.items() if _plain(key) in known}
    asked |= dict(run.options)
    axes: dict[str, list[object]] = {"model": list(run.models)}
    for key, value in asked.items():
        option = _option(known, key, name)
        axes[_shown(option)] = _values(option, value, f"{name}: {key}")
    for choice in combinations(axes):
        model = choice.pop("model")
        yield _cell(command, run.command, model, choice, name)


def command_of(name: str, run: str) -> TyperCommand:
    """The click command of that name.

    Raises:  SweepError: there is none, or it makes no result of a model.
    """
    from typer.core import TyperCommand

    from melens.cli.app import group

    commands = group().commands
    known = [one for one in commands if one not in NO_RESULT]
    if name not in known:
        raise SweepError(f"{run}: {unknown_name('command', name, known)}")
    command = commands[name]
    assert isinstance(command, TyperCommand), name
    return command


def options_of(command: TyperCommand) -> dict[str, Param]:
    """Parameters by the names that a config may give: as on the command line, dashes or not."""
    from typer.core import TyperArgument, TyperOption

    return {
        _plain(name): param
        for param in command.params
        if isinstance(param, (TyperArgument, TyperOption))
        and param.name not in (*SET_BY_SWEEP, "model", "help")
        for name in (param.name, *(one.lstrip("-") for one in param.opts))
    }


def _option(known: Mapping[str, Param], key: str, run: str) -> Param:
    if _plain(key) in SET_BY_SWEEP or key == "json":
        raise SweepError(
            f"{run}: {key} is the sweep's own; each cell gets its folder and keeps it."
        )
    if _plain(key) not in known:
        names = sorted({_shown(param) for param in known.values()})
        raise SweepError(f"{run}: {unknown_name('option', key, names)}")
    return known[_plain(key)]


def _require_used(config: SweepConfig) -> None:
    """An option at the top that no run has is a typing error."""
    commands = [command_of(run.command, "run") for run in config.runs]
    known = [name for command in commands for name in options_of(command)]
    for key in config.common:
        if _plain(key) not in known:
            names = sorted({"run", "engine", "out", "model", *(n.replace("_", "-") for n in known)})
            raise SweepError(f"the config's top: {unknown_name('key', key, names)}")


def _values(option: Param, value: object, name: str) -> list[object]:
    """The values of an axis; a list is one value where the option may be given several times."""
    made: list[object]
    if isinstance(value, list) and option.multiple:
        nested = [isinstance(one, list) for one in value]
        made = value if value and all(nested) else [value]
    else:
        made = value if isinstance(value, list) else [value]
        if nested := [one for one in made if isinstance(one, list)]:
            raise SweepError(f"{name} takes one value at a time, got {brief(nested[0], 40)}.")
    if not made:
        raise SweepError(f"{name} is an empty list; give a value, or leave it out.")
    flat = [one for item in made for one in (item if isinstance(item, list) else [item])]
    if bad := [one for one in flat if not isinstance(one, (str, int, float, bool))]:
        raise SweepError(f"{name} must be text, a number or true/false, got {brief(bad[0], 40)}.")
    return made


def _cell(command: TyperCommand, name: str, model: str, options: JsonObject, run: str) -> SweepCell:
    known = options_of(command)
    place = _model_place(model)
    words, beside = [name, place], []
    for key, value in options.items():
        param = known[_plain(key)]
        made = _typed(param, value, f"{run}: {key}")
        if param.param_type_name == "argument":
            words += made
        else:
            beside += made
    words += beside
    facts = {
        "command": name,
        "model": model,
        "versions": versions(),
        "files": _files(place) if place != model or Path(model).is_absolute() else None,
    }
    facts["options"] = _checked(command, words[1:], run)
    return SweepCell(hash_facts(facts), name, model, dict(options), tuple(words))


def _typed(param: Param, value: object, name: str) -> list[str]:
    """A value as it would be typed."""
    if param.param_type_name == "option" and getattr(param, "is_flag", False):
        if not isinstance(value, bool):
            raise SweepError(f"{name} must be true or false, got {brief(value, 40)}.")
        words = param.opts if value else param.secondary_opts
        return [words[0]] if words else []
    if isinstance(value, bool):
        raise SweepError(f"{name} takes a value, got {str(value).lower()}.")
    several = value if isinstance(value, list) else [value]
    if _is_path(param) and "-" in several:
        raise SweepError(
            f"{name}: '-' is standard input, which many cells cannot read; name a file."
        )
    texts = [_absolute(str(one)) if _is_path(param) else str(one) for one in several]
    if param.param_type_name == "argument":
        return texts
    longest = max(param.opts, key=len)
    joint = "=" if longest.startswith("--") else ""
    return [f"{longest}{joint}{text}" for text in texts]


def _checked(command: TyperCommand, words: list[str], run: str) -> JsonObject:
    """Every parameter as the command reads it, files by their content.

    Raises:  SweepError: a value that the command refuses.
    """
    try:
        with one_command():
            context = command.make_context(f"melens {command.name}", list(words))
    except MelensError:
        raise
    except Exception as error:  # click's own, of whichever click typer carries
        said = getattr(error, "format_message", lambda: str(error))().replace("Value error, ", "")
        raise SweepError(f"{run}: {said.rstrip('.')}. See: melens {command.name} --help") from None
    left_out = (*SET_BY_SWEEP, "model")
    return {
        name: _by_content(value) for name, value in context.params.items() if name not in left_out
    }


def _by_content(value: object) -> object:
    if isinstance(value, Path):
        return _files(str(value)) or str(value)
    return getattr(value, "value", value)


def _files(name: str) -> JsonObject | None:
    """What is in a file, or which files are in a folder; None where nothing has this name."""
    path = Path(name).expanduser()
    if path.is_file():
        return {"sha256": hash_file(path)} if path.suffix != ".gguf" else _stamp(path)
    if not path.is_dir():
        return None
    inside = sorted(one for one in path.rglob("*") if one.is_file() and one.suffix != ".md")
    return {str(one.relative_to(path)): _stamp(one) for one in inside}


def _stamp(path: Path) -> JsonObject:
    """Weights are too large to be read for this."""
    found = path.stat()
    return {"bytes": found.st_size, "changed": found.st_mtime_ns}


def _model_place(model: str) -> str:
    """A model as every worker finds it: a folder or file by its whole path, others by name.

    Raises:  ModelError: it leads nowhere.
    """
    from melens.models.resolve import asked

    if model.startswith("-"):
        raise SweepError(f"a model's name cannot begin with -, got {brief(model, 40)}.")
    found = asked(model)
    return str(found.path.resolve()) if found.kind in ("folder", "gguf") else model


def _absolute(name: str) -> str:
    """Workers may stand in another folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in ("", "-") and path.exists() else name


def _is_path(param: Param) -> bool:
    from melens.cli.help import value_kind

    return value_kind(param).name == "path"


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _shown(param: Param) -> str:
    return max(param.opts, key=len).lstrip("-")
