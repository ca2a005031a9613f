"""The sections of the page, in the order in which they appear; one a kind of result."""

from melens.reporting.sections import located, attention, causes, quantised  # isort: skip
from melens.reporting.sections.base import (
    SECTIONS,
    Fact,
    PageBlock,
    PageView,
    Panel,
    Picture,
    Section,
    Shown,
    Table,
    other,
    section,
)

MODULES = (located, attention, causes, quantised)
"""Imported for what they register."""

__all__ = [
    "MODULES",
    "SECTIONS",
    "Fact",
    "PageBlock",
    "PageView",
    "Panel",
    "Picture",
    "Section",
    "Shown",
    "Table",
    "other",
    "section",
]
