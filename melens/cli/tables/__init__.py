"""The tables of every kind of result; the modules are imported for what they register."""

from melens.cli.listing import TABLES
from melens.cli.tables import causes, check, edits, machine, measures, weights  # noqa: F401

__all__ = ["TABLES"]
