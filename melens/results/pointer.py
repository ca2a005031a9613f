"""JSON pointers (RFC 6901): the address of one value in plain JSON."""

from __future__ import annotations

import re
from typing import Any

from melens.errors import ResultError

_INDEX = re.compile(r"0|[1-9][0-9]*", re.ASCII)


def look_up(data: Any, pointer: str) -> Any:
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
            if isinstance(here, list) and not _INDEX.fullmatch(key):
                raise IndexError(key)  # Python would take -1 and 007
            here = here[int(key)] if isinstance(here, list) else here[key]
    except (KeyError, IndexError, TypeError):
        raise ResultError(f"nothing is at {pointer!r} of this report.") from None
    return here
