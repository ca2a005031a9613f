"""The folder that an evaluation is kept in: one evaluation each, taken up again or begun again."""

from __future__ import annotations

from pathlib import Path

from melens.errors import ResultError
from melens.evaluating.generated import answers_beside
from melens.formatting import clipped
from melens.item_rows import head_of
from melens.results.edit import Edit
from melens.store import open_regular, remove_file

ITEMS, RESULT = "items.jsonl", "evaluate.json"


def check_folder(folder: Path, task: str, edit: Edit) -> None:
    """Refuse a folder of another evaluation, as far as that shows without the model.

    Raises:  ResultError: it holds another task's or edit's items, or a result without items.
    """
    path = folder / ITEMS
    if not (path.is_file() and path.stat().st_size):
        if (folder / RESULT).exists():
            raise ResultError(
                f"{folder} holds an {RESULT} without its {ITEMS}; choose another folder, or "
                "overwrite it with --force."
            )
        return
    held, wanted = _held(head_of(path).get("of")), (task, edit.model_dump(mode="json"))
    if held != wanted and _has_rows(path):
        raise ResultError(
            f"{path} is of another evaluation ({clipped(str(held[0]))}, {_label(held[1])}); choose "
            "another folder, or overwrite it with --force."
        )


def _held(of: object) -> tuple[object, object]:
    """Task and edit that a file of items says it is of."""
    facts = of if isinstance(of, dict) else {}
    pairs = facts.get("conditions")
    pairs = [pair for pair in pairs if isinstance(pair, list)] if isinstance(pairs, list) else []
    edits = [pair[1] for pair in pairs if len(pair) == 2 and pair[0] == "edited"]
    return facts.get("task"), edits[-1] if edits else None


def start_again(folder: Path) -> None:
    """Remove an earlier evaluation's items and result; nothing else in the folder.

    Raises:  OutputError: a file cannot be removed.
    """
    for path in (folder / ITEMS, folder / RESULT, answers_beside(folder / ITEMS)):
        remove_file(path)


def _has_rows(path: Path) -> bool:
    with open_regular(path) as file:
        file.readline()
        return file.readline().endswith(b"\n")


def _label(edit: object) -> str:
    try:
        return Edit.model_validate(edit).label
    except ValueError:
        return "an edit of another version"
