"""How much memory something takes at its peak."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _peak() -> int:
    """Megabytes held at most since the peak was last reset; 0 on a system that does not tell."""
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    return int(found[1]) // 1024 if found else 0


@contextmanager
def adds_less_than(megabytes: int):
    """The peak inside is no more than this above what is held now.

    The process's peak is reset first: one that an earlier test left would hide any growth.
    """
    if CLEAR.exists():
        CLEAR.write_text("5")
    before = _peak()
    yield
    assert _peak() - before < megabytes
