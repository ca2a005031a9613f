"""write_report(): the three files of a check."""

from __future__ import annotations

from pathlib import Path

from melens.reporting.markdown import markdown_report
from melens.reporting.page import html_page
from melens.results.check import CheckReport
from melens.store import write_atomically


def write_report(report: CheckReport, folder: Path) -> list[Path]:
    """Write report.html, report.md and report.json into a folder, each atomically.

    All three are made before the first is written.

    Returns: their paths, in this order.
    Raises:  OutputError: the folder cannot be made or written; circuitsvis is missing.
    """
    texts = {
        "report.html": html_page(report),
        "report.md": markdown_report(report),
        "report.json": report.to_json(),
    }
    paths = []
    for name, text in texts.items():
        write_atomically(folder / name, text)
        paths.append(folder / name)
    return paths
