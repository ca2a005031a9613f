"""What can be refused of a sweep before its first cell runs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NoReturn

from melens.errors import InterventionError, MelensError, SiteError, SweepError
from melens.protocols import JsonObject
from melens.results.edit import Edit
from melens.sweeping.cells import SweepCell
from melens.sweeping.work import CELLS, OUT

EDITING = ("eval", "long-context")
"""Commands whose edit is entered as it is."""


class _ModelReachedError(Exception):
    """A command asked for its model: all that it refuses by itself has passed."""


def preflight(cells: Sequence[SweepCell], folder: Path) -> None:
    """Refuse models that are not there, settings that a command refuses, and masks that a family
    refuses; nothing is run. A named model is fetched and a ``.gguf`` converted, once for all cells.

    Raises:  MelensError: naming the cell.
    """  # noqa: D205
    require_models(cells)
    for cell in cells:
        with _named(cell):
            _refuse_early(cell, folder / CELLS / cell.id / OUT)
            _require_takes_edit(cell)


def require_models(cells: Sequence[SweepCell]) -> None:
    """Refuse models that are not there.

    Raises:  ModelError: naming the cell.
    """
    seen: set[tuple[str, object]] = set()
    for cell in cells:
        key = (cell.argv[1], cell.options.get("revision"))
        if key not in seen:
            seen.add(key)
            with _named(cell):
                _require_model(cell.argv[1], cell)


@contextlib.contextmanager
def _named(cell: SweepCell) -> Iterator[None]:
    try:
        yield
    except MelensError as error:
        made = type(error)(f"{cell.title}: {error}")
        raise made from None
    except Exception as error:  # click's own, and what a library raises
        said = getattr(error, "format_message", lambda: str(error))()
        raise SweepError(f"{cell.title}: {said or type(error).__name__}") from None


def _require_model(model: str, cell: SweepCell) -> None:
    from melens.models.loading import source_of
    from melens.models.resolve import asked

    given = cell.params()
    revision, trusted = given.get("revision"), bool(given.get("trust_remote_code"))
    source_of(asked(model, revision=revision), revision=revision, trust_remote_code=trusted)


def _refuse_early(cell: SweepCell, out: Path) -> None:
    """Run a command up to the place where it loads its model."""
    from melens.cli.app import group
    from melens.cli.job import LOADER
    from melens.progress import one_command

    # these load in ways of their own
    if cell.command in ("scan", "reach", "finetune") or cell.params().get("stream"):
        return

    def reached(*_: object, **__: object) -> NoReturn:
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
    given = cell.params()
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


def _beyond(edit: Edit, depth: int) -> list[int]:
    """Layers of an edit that the model has not."""
    return [at for at in edit.layers if at >= depth] if isinstance(edit.layers, tuple) else []


def _config_of(model: str, revision: str | None) -> JsonObject:
    from melens.models.multimodal import language_config
    from melens.models.opening import open_checkpoint

    with closing(open_checkpoint(model, revision=revision)) as files:
        return language_config(files.config)


def _mask_refusal(config: JsonObject) -> str:
    """What this architecture says of a mask; empty where it takes it, or was never asked."""
    from melens.models.families import NOTHING, YES, families

    listed = config.get("architectures") or [""]
    said = families().get(str(listed[0]), {}).get("mask", "")
    return "" if said in (YES, NOTHING) else said
