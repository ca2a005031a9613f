"""Results as tables and arrays: flat columns, intervals as two of them, CSV and LaTeX."""

# pandas' own types have gaps.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeGuard

from melens.errors import ResultError, UnknownNameError
from melens.formatting import brief, printable
from melens.protocols import Json, JsonObject
from melens.registry import unknown_name

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray
    from pandas.api.extensions import ExtensionArray

INTERVALS = ("interval", "corrected")
"""A field whose name ends like this holds (low, high) or None, and follows its number."""
LOW, HIGH = "_low", "_high"
INTERVAL_DIGITS = 2
"""Significant digits of an interval's half width, to which its row is rounded."""
DIGITS = 4
"""Significant digits of a number without an interval."""
LATEX = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
    }
)
"""Signs of a text that LaTeX reads as its own, or prints as others in its oldest fonts."""


def flat(row: Mapping[str, Json]) -> JsonObject:
    """A row with one plain value a column: parts as ``part.field``, an interval as two columns."""
    made: JsonObject = {}
    for name, value in row.items():
        if name.rpartition(".")[2].endswith(INTERVALS):
            low, high = value if isinstance(value, Sequence) else (None, None)
            made[name + LOW], made[name + HIGH] = low, high
        elif isinstance(value, Mapping):
            made |= flat({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            made[name] = value
    return made


def frame_of(rows: Iterable[Mapping[str, Json]]) -> pd.DataFrame:
    """Rows as a frame of flat columns."""
    import pandas as pd

    made = [flat(row) for row in rows]
    names = dict.fromkeys(name for row in made for name in row)
    return pd.DataFrame({name: _column([row.get(name) for row in made]) for name in names})


def _column(values: list[object]) -> Sequence[object] | ExtensionArray:
    """Whole numbers stay whole where some are missing."""
    import pandas as pd

    known = [value for value in values if value is not None]
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in known)
    return pd.array(values, dtype="Int64") if whole and 0 < len(known) < len(values) else values


def chosen(frame: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """Names of a frame's columns; an interval's two by one name.

    Raises:  UnknownNameError: the frame has no such column.
    """
    if not isinstance(columns, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]  (a user gives anything)
        raise ResultError(f"columns must be a list of names, got {brief(columns, 40)}.")
    made: list[str] = []
    for name in [columns] if isinstance(columns, str) else columns:
        both = [name + LOW, name + HIGH]
        if name in frame.columns:
            made.append(name)
        elif both[0] in frame.columns:
            made += both
        else:
            raise UnknownNameError(unknown_name("column", name, map(str, frame.columns)))
    return made


def csv_of(frame: pd.DataFrame) -> str:
    """Comma-separated text with all digits; lists in a cell are JSON."""
    return frame.map(_as_json).to_csv(index=False, lineterminator="\n")


def html_of(rows: Sequence[Mapping[str, Json]]) -> str:
    """Rows as a table of a page, as they are: a list in a cell stays one."""
    import pandas as pd

    frame = pd.DataFrame(rows)
    return frame.to_html(index=False, border=0, float_format="%.4g", escape=True)


def parquet_of(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Rows as a Parquet file: lists stay lists, numbers of both kinds become floats."""
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    names = dict.fromkeys(name for row in rows for name in row)
    table = arrow.table({name: _arrow([row.get(name) for row in rows]) for name in names})
    made = io.BytesIO()
    parquet.write_table(table, made, compression="zstd")
    return made.getvalue()


def _arrow(values: list[object]) -> object:
    """Of no type where nothing is known: another cell's says it."""
    array = import_module("pyarrow").array
    kinds: set[type] = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and float in kinds:
        return array(
            [float(value) if isinstance(value, (int, float)) else None for value in values]
        )
    if len(kinds) > 1:
        return array([None if value is None else str(value) for value in values])
    return array(values)


def latex_of(frame: pd.DataFrame) -> str:
    """A LaTeX table with booktabs' rules: text escaped, each number rounded by its interval.

    A number that stands before its interval is given to the digits which two significant digits of
    the interval's half width allow; one without an interval to four significant digits.
    """
    names = list(map(str, frame.columns))
    numeric = {str(name) for name, column in frame.items() if _is_numeric(column)}
    cells = frame.astype(object)
    for name, column in frame.items():
        values: list[object] = list(column)
        if name in numeric:
            cells[name] = list(map(_number, values))
        else:
            cells[name] = [_text(value).translate(LATEX) for value in values]
    for place, name in enumerate(names):
        if name.endswith(LOW) and name in numeric and place:
            _round(cells, frame, place)
    cells.columns = [name.translate(LATEX) for name in names]
    styled = cells.style
    styled.hide(axis="index")
    alignment = "".join("r" if name in numeric else "l" for name in names)
    return styled.to_latex(hrules=True, column_format=alignment)


def _round(cells: pd.DataFrame, frame: pd.DataFrame, low: int) -> None:
    """Round an interval's two columns, and the number before them, row by row.

    A whole number is not the interval's own: a count stands before the interval of its share.
    """
    for row in range(len(frame)):
        around: list[object] = [frame.iat[row, column] for column in (low - 1, low, low + 1)]
        before, least, most = around
        if not (_is_number(least) and _is_number(most)):
            continue
        if most == least:
            continue
        places = decimals_of(most - least)
        made = [(low, least), (low + 1, most)]
        if isinstance(before, float) and least <= before <= most:
            made.append((low - 1, before))
        for column, value in made:
            cells.iat[row, column] = _math(_fixed(value, places))


def _fixed(value: float, places: int) -> str:
    """So many decimals; what is 0 at them has no sign."""
    return f"{round(value, places) + 0.0:,.{places}f}"


def decimals_of(width: float) -> int:
    """Decimals at which half of an interval's width, above 0, has two significant digits."""
    return max(0, INTERVAL_DIGITS - 1 - math.floor(math.log10(width / 2)))


def _number(value: object) -> str:
    if not _is_number(value):
        return "--"
    if float(value).is_integer() and abs(value) < 1e15:
        return _math(f"{int(value):,}")
    if 1000 <= abs(value) < 1e15:
        return _math(f"{value:,.0f}")
    mantissa, mark, exponent = f"{value:.{DIGITS}g}".partition("e")
    return _math(rf"{mantissa} \times 10^{{{int(exponent)}}}" if mark else mantissa)


def _math(text: str) -> str:
    return f"${text}$".replace(",", "{,}")


def _text(value: object) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "--" if missing else printable(str(_as_json(value)))


def _is_number(value: object) -> TypeGuard[float]:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _is_numeric(column: pd.Series) -> bool:
    known: list[object] = list(column.dropna())
    return bool(known) and all(map(_is_number, known))


def _as_json(value: object) -> object:
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else value


def arrays_of(
    tables: Mapping[str, Sequence[Mapping[str, Json]]],
) -> dict[str, NDArray[Any]]:
    """Every column of numbers or texts as ``table.column``, one entry a row."""
    found: dict[str, NDArray[Any]] = {}
    for table, rows in tables.items():
        made = [flat(row) for row in rows]
        for name in dict.fromkeys(name for row in made for name in row):
            column = array_of([row.get(name) for row in made])
            if column is not None:
                found[f"{table}.{name}"] = column
    return found


def array_of(values: Iterable[Json]) -> NDArray[Any] | None:
    """Nested numbers as an array, None as NaN; texts, None as ""; None for anything else."""
    import numpy as np

    nested = list(values)
    if any(isinstance(value, str) for value in nested):
        texts = [value for value in nested if isinstance(value, str) or value is None]
        return np.array([text or "" for text in texts]) if len(texts) == len(nested) else None
    if not _numbers(nested):
        return None
    try:
        made = np.array(nested, dtype=np.float64)  # None becomes NaN
    except (ValueError, TypeError):  # ragged
        return None
    return made if made.size else None


def _numbers(values: Json) -> bool:
    if isinstance(values, (list, tuple)):
        return all(map(_numbers, values))
    return values is None or (isinstance(values, (int, float)) and not isinstance(values, bool))
