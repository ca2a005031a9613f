"""The picture of a check: its emergence profile."""

from __future__ import annotations

from matplotlib.figure import Figure

from melens.figures.profile import draw_profile
from melens.figures.styles import figure
from melens.results import CheckReport


@figure(CheckReport, "profile")
def draw_check(result: CheckReport) -> Figure:
    """The located ME Layer's profile, drawn from what the report holds of it."""
    return draw_profile(result.located())
