"""melens.json: written beside what was exported, and read back."""

from __future__ import annotations

from pathlib import Path

from melens.errors import ResultError
from melens.results.base import load_result
from melens.results.export import EditFile
from melens.store import write_atomically

MELENS_JSON = "melens.json"


def write_edit(record: EditFile, folder: Path) -> None:
    """Write a folder's melens.json."""
    write_atomically(folder / MELENS_JSON, record.to_json())


def read_edit(folder: str | Path) -> EditFile | None:
    """What a folder's melens.json says; None where there is none.

    Raises:  ResultError: it is broken, or of another kind or version.
    """
    path = Path(folder).expanduser() / MELENS_JSON
    if not path.is_file():
        return None
    found = load_result(path)
    if not isinstance(found, EditFile):
        raise ResultError(f"{path} holds a result of another kind; export the edit again.")
    return found
