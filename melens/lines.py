"""Lines of text and JSON objects in them, as files from anywhere hold them."""

from __future__ import annotations

import json
from typing import Any


def lines_of(text: str) -> list[str]:
    r"""Lines of a text, which end at ``\n`` or ``\r\n``; nothing else ends a line.

    ``str.splitlines`` also cuts at U+2028, U+0085 and more, which JSON has inside its strings.
    """
    made = [line.removesuffix("\r") for line in text.split("\n")]
    return made if made[-1] else made[:-1]


def json_object(line: str) -> dict[str, Any] | None:
    """The object that a line of JSON is; None where it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def is_text(value: Any) -> bool:
    r"""Whether a value is Unicode text; JSON can write half a surrogate pair (``\ud800``) too."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
