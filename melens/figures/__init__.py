"""Result -> matplotlib Figure, and nothing else: no model, no computing."""

from melens.figures import (
    attention,
    causes,
    check,
    diff,
    evaluation,
    long_context,
    patch_grid,
    profile,
    ranks,
    reach,
    scan,
    sink_maps,
    super_weights,
    token_curves,
    tuning,
)
from melens.figures.draw import FORMATS, draw, inline, save_figure
from melens.figures.styles import FIGURES

MODULES = (profile, token_curves, ranks, sink_maps, attention, causes, super_weights, patch_grid,
           evaluation, long_context, tuning, check, diff, reach,
           scan)  # fmt: skip
"""Imported for what they register in FIGURES; the order is that of the documentation."""

__all__ = ["FIGURES", "FORMATS", "MODULES", "draw", "inline", "save_figure"]
