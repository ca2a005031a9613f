"""SweepReport: which cells there are, and how each of them ended."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from melens.protocols import JsonObject
from melens.results.base import Part, Result

Status = Literal["done", "failed", "missing"]


class CellRow(Part):
    """One command on one model, and how it ended."""

    cell: str = Field(pattern="^[0-9a-f]{16}$")
    """A hash of command, options, texts and melens' version."""
    command: str
    model: str
    options: dict[str, str | int | float | bool | list[str | int | float | bool]]
    """As the config names them."""
    argv: tuple[str, ...]
    """What would be typed after ``melens``."""
    status: Status
    exit_code: int | None = None
    error: str = ""
    notes: tuple[str, ...] = ()
    seconds: float | None = None
    """The cell's own time; of the first on a model, with loading it."""
    machine: str | None = None
    kind: str | None = None
    """Of its result."""
    summary: str | None = None
    result: str | None = None
    """The result's file, seen from the sweep's folder."""

    @field_validator("result")
    @classmethod
    def _inside(cls, value: str | None) -> str | None:
        if value is not None and (Path(value).is_absolute() or ".." in Path(value).parts):
            raise ValueError("a result's file lies inside the sweep's folder")
        return value


class SweepReport(Result):
    """All cells of a sweep, in the order of the config."""

    schema_id: ClassVar[str] = "melens/sweep/1"

    kind: Literal["sweep"] = "sweep"
    schema_: Literal["melens/sweep/1"] = Field(default="melens/sweep/1", alias="schema")
    folder: str
    engine: Literal["local", "ray", "slurm"]
    workers: int
    cells: tuple[CellRow, ...]
    versions: dict[str, str]
    command: str
    created: str
    """UTC, ISO 8601."""

    def rows(self) -> list[JsonObject]:
        """One row a cell, its options as columns."""
        made: list[JsonObject] = []
        for row in self.cells:
            own = {
                "status": row.status,
                "kind": row.kind,
                "seconds": row.seconds,
                "said": row.error or row.summary,
            }
            first = {"cell": row.cell, "command": row.command, "model": row.model}
            options = {name.replace("-", "_"): value for name, value in row.options.items()}
            taken = first | own
            named = {f"{n}_option" if n in taken else n: v for n, v in options.items()}
            made.append({**first, **named, **own})
        return made

    def count(self, status: Status) -> int:
        """How many cells ended like this."""
        return Counter(row.status for row in self.cells)[status]

    def summary(self) -> str:
        """One plain sentence."""
        done, failed, missing = map(self.count, ("done", "failed", "missing"))
        said = [f"{done} of {len(self.cells)} cells are done"]
        if failed:
            first = next(row for row in self.cells if row.status == "failed")
            said.append(f"{failed} failed (first: {first.command} {first.model}: {first.error})")
        if missing:
            said.append(f"{missing} have not run")
        return f"{'; '.join(said).removesuffix('.')}."
