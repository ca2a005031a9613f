"""What can be refused of a sweep before its first cell runs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from melens.errors import InterventionError, MelensError, SiteError
from melens.protocols import JsonObject
from melens.sweeping.cells import SweepCell, command_of
from melens.sweeping.work import CELLS, OUT

EDITING = ("eval", "long-context")
"""Commands whose edit is entered as it is."""


class _ModelReachedError(Exception):
    """A command asked for its model: all that it refuses by itself has passed."""


def preflight(cells: Sequence[SweepCell], folder: Path) -> None:
    """Refuse models that are not there, settings that a command refuses, and masks that a family
    refuses; no weights are read.

    Raises:  MelensError: naming the cell.
    """  # noqa: D205
    for model in dict.fromkeys(cell.argv[1] for cell in cells):
        first = next(cell for cell in cells if cell.argv[1] == model)
        with _named(first):
            _require_model(model, first)
    for cell in cells:
        with _named(cell):
            _refuse_early(cell, folder / CELLS / cell.id / OUT)
            _require_takes_edit(cell)


@contextlib.contextmanager
def _named(cell: SweepCell) -> Iterator[None]:
    try:
        yield
    except MelensError as error:
        made = type(error)(f"{cell.title}: {error}")
        raise made from None


def _params(cell: SweepCell) -> dict[str, Any]:
    command = command_of(cell.command, cell.title)
    return command.make_context("melens", list(cell.argv[1:])).params


def _require_model(model: str, cell: SweepCell) -> None:
    from melens.models.loading import source_of
    from melens.models.resolve import asked

    given = _params(cell)
    revision, trusted = given.get("revision"), bool(given.get("trust_remote_code"))
    source_of(asked(model, revision=revision), revision=revision, trust_remote_code=trusted)


def _refuse_early(cell: SweepCell, out: Path) -> None:
    """Run a command up to the place where it loads its model."""
    from melens.cli.app import group
    from melens.cli.job import LOADER
    from melens.progress import one_command

    if cell.command in ("scan", "reach", "finetune"):  # they load in their own way
        return

    def reached(*_: Any, **__: Any) -> None:
        raise _ModelReachedError

    before = LOADER.set(reached)
    quiet = io.StringIO()
    try:
        with one_command(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            group()([*cell.argv, "--json", "--out", str(out)], standalone_mode=False)
    except _ModelReachedError:
        return
    finally:
        LOADER.reset(before)


def _require_takes_edit(cell: SweepCell) -> None:
    """Refuse layers that a model has not, and a mask that its family is known to refuse."""
    from melens.cli.options import EditOptions, edit_of

    if cell.command not in EDITING:
        return
    given = _params(cell)
    fields = EditOptions.__dataclass_fields__
    edit = edit_of(EditOptions(**{name: given[name] for name in fields}), cell.argv[1])
    config = _config_of(cell.argv[1], given.get("revision"))
    depth = config.get("num_hidden_layers")
    if isinstance(depth, int) and (beyond := _beyond(edit, depth)):
        raise SiteError(
            f"layer {beyond[0]} is outside 0..{depth - 1} of {cell.model}. Layers count from 0."
        )
    if edit.name == "wemask" and (said := _mask_refusal(config)):
        raise InterventionError(f"{cell.model} takes no mask: {said}")


def _beyond(edit: Any, depth: int) -> list[int]:
    """Layers of an edit that the model has not."""
    return [at for at in edit.layers if at >= depth] if isinstance(edit.layers, tuple) else []


def _config_of(model: str, revision: str | None) -> JsonObject:
    from melens.models.multimodal import language_config
    from melens.models.opening import open_checkpoint

    return language_config(open_checkpoint(model, revision=revision).config)


def _mask_refusal(config: JsonObject) -> str:
    """What this architecture says of a mask; empty where it takes it, or was never asked."""
    from melens.models.families import NOTHING, YES, families

    listed = config.get("architectures") or [""]
    said = families().get(str(listed[0]), {}).get("mask", "")
    return "" if said in (YES, NOTHING) else said
