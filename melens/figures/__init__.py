"""Result -> matplotlib Figure, and nothing else: no model, no computing."""

from melens.figures import (
    causes,
    diff,
    evaluation,
    long_context,
    patch_grid,
    profile,
    ranks,
    scan,
    tuning,
)
from melens.figures import causes as super_weights
from melens.figures import profile as check
from melens.figures import profile as token_curves
from melens.figures import scan as reach
from melens.figures import sinks as attention
from melens.figures import sinks as sink_maps
from melens.figures.draw import FIGURES, FORMATS, draw, inline, save_figure

MODULES = (
    profile,
    token_curves,
    ranks,
    sink_maps,
    attention,
    causes,
    super_weights,
    patch_grid,
    evaluation,
    long_context,
    tuning,
    check,
    diff,
    reach,
    scan,
)
"""Imported for what they register in FIGURES; the order is that of the documentation."""

__all__ = ["FIGURES", "FORMATS", "MODULES", "draw", "inline", "save_figure"]
