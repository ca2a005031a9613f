"""Run Python's collector of cycles rarely while libraries are imported and models bridged.

To import torch, transformers and TransformerLens makes half a million objects that stay, and to
bridge a model makes tens of thousands; looking through them again and again costs a fifth of the
time. Not switched off: what a library leaves in cycles may be tensors.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

RARELY = 50_000
"""Objects made, less those freed, that start a collection of the youngest."""
_lock = Lock()
_found: list[int] = []
"""The thresholds that the blocks which are still open found."""


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Collect cycles rarely; afterwards as before, also where threads do this side by side.

    A threshold that somebody sets inside the block stays. Not for a generator function: the block
    would end before its body runs.
    """
    with _lock:
        before = gc.get_threshold()[0]
        _found.append(before)
        first = _found[0]
        ours = max(RARELY, first) if first else 0
        gc.set_threshold(ours)
    try:
        yield
    finally:
        with _lock:
            first = _found[0]
            _found.pop()
            if not _found and gc.get_threshold()[0] == ours:
                gc.set_threshold(first)
