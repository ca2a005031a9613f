"""Result -> matplotlib Figure, and nothing else: no model, no computing."""

from melens.figures.draw import FORMATS, draw, save_figure

__all__ = ["FORMATS", "draw", "save_figure"]
