"""Result -> matplotlib Figure, and nothing else: no model, no computing."""

from melens.figures.compare import compare
from melens.figures.draw import FIGURES, FORMATS, draw, inline, save_figure
from melens.figures.own_style import own_style

__all__ = ["FIGURES", "FORMATS", "compare", "draw", "inline", "own_style", "save_figure"]
