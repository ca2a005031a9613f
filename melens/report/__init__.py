"""A check as a page, as markdown for a model card, and as JSON with a published schema."""

from melens.report.card import refuse_bad_card, update_card
from melens.report.markdown import markdown_report
from melens.report.page import html_page
from melens.report.schema import json_schema
from melens.report.writing import write_report

__all__ = ["html_page", "json_schema", "markdown_report", "refuse_bad_card", "update_card",
           "write_report"]  # fmt: skip
