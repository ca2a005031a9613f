"""The tables of every kind of result; the modules are imported for what they register."""

from melens.cli.tables import causes, check, edits, weights  # noqa: F401
from melens.cli.tables.measures import TABLES

__all__ = ["TABLES"]
