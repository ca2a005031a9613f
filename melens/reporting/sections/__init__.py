"""The sections of the page, in the order in which they appear; one a kind of result."""

from melens.reporting.sections import located, spread, causes  # isort: skip
from melens.reporting.sections.base import (
    SECTIONS,
    Block,
    Fact,
    Panel,
    Picture,
    Section,
    Shown,
    Table,
    View,
    other,
    section,
)

MODULES = (located, spread, causes)
"""Imported for what they register."""

__all__ = ["MODULES", "SECTIONS", "Block", "Fact", "Panel", "Picture", "Section", "Shown", "Table",
           "View", "other", "section"]  # fmt: skip
