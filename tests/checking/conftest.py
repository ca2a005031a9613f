"""Checks of tests do not draw their pictures: tests/cli has a test that does, and so has CI."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def pictures_without_drawing(monkeypatch):
    """Files of the right names, so that what is kept and taken up stays what it is."""
    from melens.cli import output

    def touch(report, folder):
        for stage in output.drawable(report):
            for kind in output.PICTURES:
                path = folder / output.FIGURES / f"{stage}.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"")

    monkeypatch.setattr(output, "save_figures", touch)
