"""What a caller hands over for a result: a file, or a result that holds what is asked for."""

from __future__ import annotations

import os
from pathlib import Path

from melens.errors import ResultError
from melens.formatting import brief
from melens.progress import say_once
from melens.results import base
from melens.results.base import Result, kind_name
from melens.results.check import CheckReport
from melens.results.locate import MELayer
from melens.results.scan import WeightScan

HoldsMELayer = MELayer | CheckReport | WeightScan
"""What is taken for an ME Layer: what ``locate`` returns, a check's report, or a scan, which only
predicts it, so that it is located then."""


def load_result(path: str | Path) -> Result:
    """Read any saved result, whatever its kind.

    Raises:  ResultError: no path, or the file is missing, no JSON, or of a kind this version does
             not know.
    """
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):  # pyright: ignore[reportUnnecessaryIsInstance]  (a user gives anything)
        raise ResultError(f"a result is read from a file: give its path, got {brief(path, 40)}.")
    return base.load_result(path)


def load_located(path: str | Path) -> MELayer:
    """Read the ME Layer of a locate.json, or of the report.json of a check.

    Raises:  ResultError: as :func:`load_result`, or no ME Layer in it.
    """
    return located_of(load_result(path), str(path))


def located_of(result: Result, name: str = "this") -> MELayer:
    """The ME Layer of a saved result: it is one, or a check's report, which holds one.

    Raises:  ResultError: neither, or a report whose locate stage did not finish.
    """
    if isinstance(result, MELayer):
        return result
    if isinstance(result, WeightScan):
        raise ResultError(f"{name} {predicted(result)}, and here a measured one is needed: locate.")
    if not isinstance(result, CheckReport):
        raise ResultError(
            f"{name} holds a result of '{kind_name(result)}'; give a locate.json or "
            "the report.json of a check."
        )
    try:
        return result.located()
    except ResultError as error:
        raise ResultError(f"{name}: {error}") from None


def predicted(scan: Result) -> str:
    """What a scan says of the ME Layer, as the rest of a sentence about it."""
    if not isinstance(scan, WeightScan) or scan.me_layer is None:
        return "is a scan and predicts no ME Layer"
    return f"is a scan and only predicts an ME Layer ({scan.me_layer}, from 0)"


def measured_or_none(result: Result, name: str = "this") -> MELayer | None:
    """:func:`located_of`; None for a scan, whose prediction says where but not which tokens.

    Raises:  ResultError: as :func:`located_of`.
    """
    return None if isinstance(result, WeightScan) else located_of(result, name)


def located_in(given: object, *, here: bool = True) -> MELayer | None:
    """What a caller passed as ``me_layer``: an ME Layer, or a result that holds one.

    Args:    here: whether None makes the caller locate. Then a scan does so too, and it is said:
             which tokens are massive it does not know.
    Raises:  ResultError: anything else, with what would fit.
    """
    if given is None or isinstance(given, MELayer):
        return given
    if not isinstance(given, Result):
        raise ResultError(
            f"me_layer must be what melens.locate returns, or a check's report, got "
            f"{type(given).__name__}; read a saved one with melens.results.load_located(path)."
        )
    if here and isinstance(given, WeightScan):
        say_once(f"the me_layer given {predicted(given)}: it is located now.")
    return measured_or_none(given, "me_layer") if here else located_of(given, "me_layer")
