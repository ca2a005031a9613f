"""The tables of every kind of result; the modules are imported for what they register."""

from melens.cli.listing import TABLES
from melens.cli.tables import (  # noqa: F401
    causes,
    check,
    edits,
    machine,
    measures,
    quantised,
    sweeps,
    weights,
)

__all__ = ["TABLES"]
