"""Where the ME Layer lies in every model of a census: one line a model."""

from __future__ import annotations

from matplotlib.figure import Figure

from melens.figures.draw import ERASE_COLOUR, ME_COLOUR, PAGE, Into, figure, named, panel, plain
from melens.results.census import Census, CensusRow

ROW, HEAD = 0.2, 0.9
"""Inches a model, and of all else."""
LEAST, LONGEST = 1.6, 40.0
"""Inches of the figure; more models than fit are drawn closer together."""
COLOURS = {"located": ME_COLOUR, "predicted": "#FFFFFF"}


@figure(Census, "depth")
def draw_depth(result: Census, into: Into = None) -> Figure:
    """Relative depth of each model's ME Layer; filled: located, hollow: predicted."""
    rows = sorted(result.models, key=_order)
    height = min(max(HEAD + ROW * len(rows), LEAST), LONGEST)
    made, axes = panel(into, PAGE, height)
    for place, row in enumerate(rows):
        axes.axhline(place, color="0.9", lw=0.6, zorder=0)
        if row.depth is None:
            axes.annotate(_why(row), (0.0, place), va="center", fontsize=6, color="0.35")
            continue
        face = COLOURS[row.how or "predicted"]
        edge = ERASE_COLOUR if row.match == "mismatch" else ME_COLOUR
        axes.plot(max(row.depth, 0.0), place, "o", ms=5, mfc=face, mec=edge, mew=1.2)
        axes.annotate(
            plain(_said(row)),
            (max(row.depth, 0.0), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=6,
        )
    axes.set_yticks(range(len(rows)), [named(row.name) for row in rows])
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(
        "relative depth of the ME Layer: layer / (layers - 1)\n"
        "filled: located; hollow: predicted from the weights; blue edge: not as published"
    )
    axes.set_title(plain(f"ME Layer of {len(rows)} models"), loc="left")
    return made


def _order(row: CensusRow) -> tuple[str, int, str]:
    """By family, then by size."""
    return (row.family or "~", row.parameters or 0, row.name)


def _why(row: CensusRow) -> str:
    if row.error is not None:
        return "failed"
    return "no massive activations" if row.how == "located" else "none predicted"


def _said(row: CensusRow) -> str:
    text = f"layer {row.me_layer} of {row.n_layers}"
    if row.verdict is not None:
        text += f", {row.verdict}"
    return text if row.published is None else f"{text}; published {row.published}"
