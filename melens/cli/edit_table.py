"""The table of a melens.json."""

from __future__ import annotations

from typing import Any

from melens.cli.output import table
from melens.cli.tables import TABLES


@TABLES.register("edit")
def _edit(result: Any) -> None:
    table(result.rows())
