"""Python's collector of cycles, kept from looking through what is only just being made.

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
"""Objects made, less those freed, before the youngest are looked through; Python's own is 700."""
_lock = Lock()
_before: list[int] = []
"""The threshold that every call which has not ended found."""


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Collect cycles rarely; afterwards as before, also where threads do this side by side."""
    with _lock:
        _before.append(gc.get_threshold()[0])
        gc.set_threshold(max(RARELY, _before[0]) if _before[0] else 0)
    try:
        yield
    finally:
        with _lock:
            first = _before[0]
            _before.pop()
            if not _before:
                gc.set_threshold(first)
