"""What every result can do: JSON there and back, a frame, a figure, atomic saving."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from melens.errors import ResultError, UnknownNameError
from melens.formatting import brief, printable
from melens.protocols import Json, JsonObject
from melens.provenance import RunInfo
from melens.registry import unknown_name
from melens.store import RESULT, read_text, write_atomically

if TYPE_CHECKING:
    import pandas as pd  # pyright: ignore[reportMissingTypeStubs]  (it has no stubs, but types)
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from numpy.typing import NDArray


_INDEX = re.compile(r"0|[1-9][0-9]*", re.ASCII)


def look_up(data: Json, pointer: str) -> Any:
    """What ``pointer`` names in ``data``; "" names all of it.

    Raises:  ResultError: nothing is there, or it is no pointer.
    """
    first, *parts = pointer.split("/")
    here = data
    try:
        if first:
            raise KeyError(first)
        for part in parts:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(here, Mapping):
                here = here[key]
            elif isinstance(here, list) and _INDEX.fullmatch(key):  # Python would take -1 and 007
                here = here[int(key)]
            else:
                raise KeyError(key)
    except (KeyError, IndexError):
        raise ResultError(f"nothing is at {pointer!r} of this report.") from None
    return here


def kind_name(kind: Result | type[Result]) -> str:
    """A kind of result as commands and files call it: ``locate``, of ``melens/locate/1``."""
    return kind.schema_id.split("/")[1]


def run_of(result: Result) -> RunInfo | None:
    """How a result was made; None of the kinds that say it elsewhere."""
    found = getattr(result, "run", None)
    return found if isinstance(found, RunInfo) else None


R = TypeVar("R", bound="Result")
_NUMBERS = re.compile(r"\[\n\s+(?:-?\d[-+.\deE]*|null)(?:,\n\s+(?:-?\d[-+.\deE]*|null))*\n\s+\]")
"""An indented JSON list of numbers; no string holds a raw line break, so none can match."""
ByLayer = tuple[float | None, ...]
"""One number a layer, None where a layer has none."""


class Part(BaseModel):
    """A frozen piece of a result; unknown fields are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        defer_build=True,
    )


def added_later(default: Any = None) -> Any:
    """A field that older results do not have: written only where it says something, so that an
    older result's JSON stays what it is. Needs pydantic 2.12.
    """  # noqa: D205
    return Field(default=default, exclude_if=lambda value: value == default)


class Result(Part):
    """A finished measurement. ``schema`` names kind and version, e.g. ``melens/locate/1``."""

    schema_id: ClassVar[str]

    def to_dict(self) -> JsonObject:
        """Plain JSON types, field names as in the JSON."""
        return self.model_dump(mode="json", by_alias=True)

    def to_json(self) -> str:
        """Sorted keys, no NaN, a list of numbers on one line: equal results give equal text."""
        text = json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False)
        return _NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n"

    @classmethod
    def from_json(cls: type[R], text: str) -> R:
        """Read what :meth:`to_json` wrote; anything else is a ResultError that says where."""
        found = schema_of(text, "this")
        if found != cls.schema_id:
            raise ResultError(f"expected a result of schema {cls.schema_id}, found {found!r}.")
        return cls.validated(text)

    @classmethod
    def validated(cls: type[R], text: str) -> R:
        """:meth:`from_json` of a text that is known to name this schema.

        Raises:  ResultError: saying where it does not fit.
        """
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            said = first["msg"].removeprefix("Value error, ")
            raise ResultError(": ".join(filter(None, [cls.schema_id, place, said])) + ".") from None

    def rows(self) -> list[JsonObject]:
        """The result's main table, one dict a row."""
        raise ResultError(f"{type(self).__name__} has no table.")

    def tables(self) -> dict[str, list[JsonObject]]:
        """Every table by name: ``main`` (:meth:`rows`), and each list of records in the JSON."""
        return {"main": self.rows(), **dict(_lists_of_parts(self))}

    def table(self, name: str = "main") -> list[JsonObject]:
        """One of :meth:`tables`.

        Raises:  UnknownNameError: this result has no table of that name.
        """
        tables = self.tables()
        if name not in tables:
            raise UnknownNameError(unknown_name("table", name, tables))
        return tables[name]

    def to_frame(
        self, table: str = "main", *, columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """A table as a pandas DataFrame, flat: an interval is two columns, ``_low`` and ``_high``.

        Args:    table: a name of :meth:`tables`. columns: those to keep, in this order; the ends of
                 an interval are named as one (``delta_interval``). None = all.
        Raises:  UnknownNameError: this result has no such table or column.
        """
        from melens.results.tabular import chosen, frame_of

        frame = frame_of(self.table(table))
        return frame if columns is None else frame.loc[:, chosen(frame, columns)]  # pyright: ignore[reportUnknownVariableType]  (pandas does not say)

    def to_csv(
        self,
        table: str = "main",
        *,
        columns: Sequence[str] | None = None,
        path: str | Path | None = None,
    ) -> str:
        """:meth:`to_frame` as CSV with all digits; also written to ``path`` where one is given.

        Raises:  UnknownNameError: no such table or column. OutputError: it cannot be written.
        """
        from melens.results.tabular import csv_of

        return _kept(csv_of(self.to_frame(table, columns=columns)), path)

    def to_latex(
        self,
        table: str = "main",
        *,
        columns: Sequence[str] | None = None,
        path: str | Path | None = None,
    ) -> str:
        """:meth:`to_frame` as a LaTeX table (``booktabs``), numbers rounded by their intervals.

        Raises:  UnknownNameError: no such table or column. OutputError: it cannot be written.
        """
        from melens.results.tabular import latex_of

        return _kept(latex_of(self.to_frame(table, columns=columns)), path)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What the figures show, as numpy arrays by name; what was not measured is NaN.

        ``table.column`` has one entry a row of that table (text columns too, to choose rows by); a
        curve by layer has shape (n_layers,).
        Kinds whose figures show a grid give it too: see :meth:`grids`.
        """
        from melens.results.tabular import array_of, arrays_of

        curves: dict[str, NDArray[Any]] = {}
        for name in type(self).model_fields:
            value: Json = getattr(self, name)
            parts = value if isinstance(value, Mapping) else {"": value}
            for key, part in parts.items():
                if isinstance(part, tuple) and (found := array_of(part)) is not None:
                    curves[f"{name}.{key}" if key else name] = found
        grids = {name: array_of(value) for name, value in self.grids().items()}
        dense = {name: value for name, value in grids.items() if value is not None}
        return {**arrays_of(self.tables()), **curves, **dense}

    def grids(self) -> Mapping[str, Sequence[Json]]:
        """Numbers that a figure shows as a grid, as nested lists by name; none by default."""
        return {}

    def save(self, path: str | Path) -> Path:
        """Write the JSON atomically; :func:`melens.results.load_result` reads it again.

        Args:    path: a .json file, or a folder, which gets ``<kind>.json``.
        Returns: the file.
        Raises:  OutputError: it cannot be written. ResultError: no path, or not a .json file.
        """
        if not isinstance(path, (str, Path)) or not str(path):  # pyright: ignore[reportUnnecessaryIsInstance]  (a user gives anything)
            raise ResultError(f"save() got {brief(path, 40)}; name a .json file or a folder.")
        file = Path(path)
        if file.is_dir():
            file = file / f"{kind_name(self)}.json"
        if file.suffix.lower() != ".json":
            raise ResultError(
                f"a result is saved as JSON, and {brief(file.name, 60)} says otherwise; end it in "
                ".json (a figure: melens.figures.save_figure(result.plot(), path))."
            )
        write_atomically(file, self.to_json())
        return file

    @overload
    def plot(
        self, style: str | None = None, *, figure: Figure | SubFigure | None = None
    ) -> Figure: ...
    @overload
    def plot(self, style: str | None = None, *, ax: Axes) -> Axes: ...
    def plot(
        self,
        style: str | None = None,
        *,
        ax: Axes | None = None,
        figure: Figure | SubFigure | None = None,
    ) -> Figure | Axes:
        """Draw this result, in one of its kind's styles (None = the default).

        The only place where a result reaches for ``figures``.

        Args:    style: see ``melens plot --help``. ax: where a style of one panel is drawn, with
                 your matplotlib settings. figure: an empty figure or subfigure for any style, about
                 as large as the style is by itself.
        Returns: the new figure; what it was drawn into: the ax, or the whole figure.
        Raises:  ResultError: no figure for this kind, an ax for a style of several panels, or a
                 figure that is not empty. UnknownNameError: no such style.
        """
        from melens.figures import draw

        return draw(self, style, ax=ax, figure=figure)

    def summary(self) -> str:
        """One plain sentence."""
        raise ResultError(f"{type(self).__name__} has no summary.")

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"

    def __str__(self) -> str:
        return printable(self.summary(), keep="\n\t")

    def shown(self) -> list[JsonObject]:
        """What a notebook shows of the table."""
        return self.rows()

    def _repr_html_(self) -> str:
        """The sentence, the default figure, and the table folded away."""
        from melens.figures import inline
        from melens.results.tabular import html_of

        shown, total = self.shown(), len(self.rows())
        table = printable(html_of(shown), keep="\n")
        return (
            f"<p>{html.escape(str(self))}</p>{inline(self)}"
            f"<details><summary>{len(shown)}{f' of {total}' * (len(shown) < total)} rows</summary>"
            f"{table}</details>"
        )


def _lists_of_parts(part: Part, before: str = "") -> Iterator[tuple[str, list[JsonObject]]]:
    """Lists of records with their place, as ``controls.layers``; empty ones are no tables."""
    for name, field in type(part).model_fields.items():
        value: Part | tuple[object, ...] | str | float | None = getattr(part, name)
        place = f"{before}{field.alias or name}"
        if isinstance(value, Part):
            yield from _lists_of_parts(value, f"{place}.")
        elif isinstance(value, tuple):
            rows = [row.model_dump() for row in value if isinstance(row, Part)]
            if rows and len(rows) == len(value):
                yield place, rows


def _kept(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_atomically(Path(path), text)
    return text


def schema_of(text: str, name: str) -> str | None:
    """The schema that a JSON text names; None where it names none.

    Raises:  ResultError: not JSON.
    """
    try:
        data: Json = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{name} is not JSON: {str(error)[:120]}.") from None
    found = data.get("schema") if isinstance(data, Mapping) else None
    return found if isinstance(found, str) else None


_MODULES = {
    "attention": "attention",
    "locate": "locate",
    "cache-norms": "check",
    "census": "census",
    "check": "check",
    "collapse": "collapse",
    "describe": "describe",
    "diff": "diff",
    "edit": "edit",
    "evaluate": "evaluation",
    "finetune": "finetune",
    "isolate": "isolate",
    "known": "known",
    "long-context": "long_context",
    "metric": "metric",
    "mixers": "mixers",
    "patch": "patch",
    "quantise": "quantise",
    "reach": "reach",
    "scan": "scan",
    "sidecar": "sidecar",
    "sinks": "sinks",
    "super-weights": "super_weights",
    "sweep": "sweep",
    "tune": "tune",
}
"""The module of each kind of result: a kind is made ready for reading when it is asked for."""


def all_kinds() -> dict[str, type[Result]]:
    """Every kind of result by its schema."""
    for module in _MODULES.values():
        import_module(f"melens.results.{module}")
    return {kind.schema_id: kind for kind in Result.__subclasses__()}


def kind_of(schema: str | None) -> type[Result] | None:
    """The kind of result that a schema names; None where this version reads none of it."""
    parts = (schema or "").split("/")
    if len(parts) > 1 and parts[1] in _MODULES:
        import_module(f"melens.results.{_MODULES[parts[1]]}")
    return next((kind for kind in Result.__subclasses__() if kind.schema_id == schema), None)


def _not_read(schema: str | None) -> str:
    """Why a JSON with this schema is not read, after its path; :func:`kind_of` looked already."""
    give = "give a JSON that a command saved with --out, as locate.json of melens locate."
    if schema is None:
        return f"names no schema, so it is not a result of melens; {give}"
    name = schema.split("/")[1] if schema.startswith("melens/") else ""
    for kind in Result.__subclasses__():
        if kind.schema_id.split("/")[1] == name:
            return (
                f"has schema {brief(schema, 60)}, and this version of melens reads "
                f"'{kind.schema_id}'; measure again, or use the version that saved it."
            )
    return f"has schema {brief(schema, 60)}, which is not a result of this melens; {give}"


def load_result(path: str | Path) -> Result:
    """Read any saved result, whatever its kind.

    Raises:  ResultError: the file is missing, no JSON, or of a kind this version does not know.
    """
    path = Path(path)
    text = read_text(path, RESULT, error=ResultError)
    found = schema_of(text, str(path))
    kind = kind_of(found)
    if kind is None:
        raise ResultError(f"{path} {_not_read(found)}")
    try:
        return kind.validated(text)
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None
