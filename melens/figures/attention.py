"""Attention of chosen heads, a panel each."""

from __future__ import annotations

from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from melens.figures.styles import PAGE, Drawing, figure, plain
from melens.results.attention import AttentionMaps

COLUMNS = 4
MAX_PANELS = 24
GAMMA = 0.4
"""Colours go with attention to this power, so that small weights show."""


@figure(AttentionMaps, "panels")
def draw_panels(result: AttentionMaps) -> Figure:
    """Queries down, keys across; massive tokens' columns are ticked; the first MAX_PANELS heads."""
    shown = result.heads[:MAX_PANELS]
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    made = Drawing(figsize=(PAGE, 0.6 + rows * 0.98 * PAGE / COLUMNS), layout="constrained")
    grid = made.subplots(rows, columns, squeeze=False)
    n = len(result.tokens)
    image = None
    for axes, head in zip(grid.flat, shown, strict=False):
        square = [[*row, *([float("nan")] * (n - len(row)))] for row in head.rows]
        image = axes.imshow(square, cmap="cividis", norm=PowerNorm(GAMMA, vmin=0, vmax=1))
        axes.set_title(f"layer {head.layer}, head {head.head}", loc="left")
        axes.set_xticks(result.massive_positions)
        axes.set_yticks([0, n - 1])
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    assert image is not None
    made.colorbar(image, ax=grid, label=f"attention (colour ~ its power {GAMMA})", shrink=0.8)
    part = f", {len(shown)} of {len(result.heads)} heads" if len(shown) < len(result.heads) else ""
    title = f"{result.run.subject}: queries down, keys across (from 0){part}"
    made.suptitle(plain(title), fontsize=8)
    return made
