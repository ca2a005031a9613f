"""A disk without room: a file can be made there, and nothing written into it."""

from __future__ import annotations

import io


class FullDisk(io.BytesIO):
    """What ``tempfile.TemporaryFile`` gives there."""

    def __init__(self, **_):
        super().__init__()

    def write(self, *_):
        raise OSError(28, "No space left on device")
