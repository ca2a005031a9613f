"""A check as a page, as markdown for a model card, and as JSON with a published schema."""

from melens.reporting.card import refuse_bad_card, update_card, update_census_card
from melens.reporting.page import html_page
from melens.reporting.writing import json_schema, markdown_report, write_report

__all__ = [
    "html_page",
    "json_schema",
    "markdown_report",
    "refuse_bad_card",
    "update_card",
    "update_census_card",
    "write_report",
]
