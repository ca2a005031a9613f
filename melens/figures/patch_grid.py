"""What patching changes: a heat map a site, layers down, tokens (or heads) across."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from melens.figures.draw import (
    PAGE,
    Into,
    figure,
    plain,
    sheet,
)
from melens.results.patch import Axis, PatchGrid

LONGEST = 14
"""Characters of a token that are shown; the JSON has all."""
MOST_LABELS = 64
"""More positions than these are numbered only."""
COLOURS = "RdBu_r"
MODES = {
    "denoising": "clean put into the corrupted run",
    "noising": "corrupted put into the clean run",
    "mean": "mean ablation of the clean run",
    "resample": "another sequence's activation put in",
}


@figure(PatchGrid, "change")
def draw_change(result: PatchGrid, into: Into = None) -> Figure:
    """The metric's change against the unpatched target run; white is no effect."""
    grids = [_grid(result, site) for site in result.sites]
    limit = max((abs(value) for grid in grids for row in grid for value in row), default=0) or 1.0
    return _draw(result, grids, limit, f"change of {result.metric}", into)


@figure(PatchGrid, "normalised")
def draw_normalised(result: PatchGrid, into: Into = None) -> Figure:
    """The change as a share of what lies between the unpatched runs; white is no effect."""
    span = abs(result.clean - (result.clean if result.corrupted is None else result.corrupted))
    if not span:
        return draw_change(result, into)  # an ablation, or two runs alike: there is no such share
    grids = [[[x / span for x in row] for row in _grid(result, site)] for site in result.sites]
    label = f"change of {result.metric}, share of clean - corrupted"
    return _draw(result, grids, 1.0, label, into)


def _draw(
    result: PatchGrid,
    grids: Sequence[Sequence[Sequence[float]]],
    limit: float,
    label: str,
    into: Into,
) -> Figure:
    columns = max(len(grid[0]) for grid in grids)
    wide = PAGE if columns > 24 else 0.65 * PAGE
    width = min(14.0, max(wide, 0.19 * columns + 1.3))
    shared = len({result.axes[site][1:] for site in result.sites}) == 1
    height = sum(min(3.2, max(1.3, 0.07 * len(grid) + 0.6)) for grid in grids)
    height += 0.7 + 0.7 * (1 if shared else len(grids))
    made = sheet(into, width, height)
    panels = made.subplots(len(grids), 1, squeeze=False)[:, 0]
    images = []
    for site, grid, axes in zip(result.sites, grids, panels, strict=True):
        images.append(
            axes.imshow(
                grid,
                cmap=COLOURS,
                vmin=-limit,
                vmax=limit,
                aspect="auto",
                origin="lower",
                interpolation="nearest",
            )
        )
        axes.set_title(_names(site, result.axes[site]), loc="left")
        _label_layers(axes, result.axes[site][0])
        _label_columns(axes, result.axes[site][1:], named=not shared or site == result.sites[-1])
    made.colorbar(images[0], ax=list(panels), label=plain(label), aspect=30, shrink=0.6, pad=0.02)
    made.suptitle(plain(_title(result)), fontsize=8)
    return made


def _grid(result: PatchGrid, site: str) -> list[list[float]]:
    """Changes, layers down; positions and heads in one row, heads within a position."""
    made = []
    for row in result.values[site]:
        cells = row if isinstance(row, tuple) else (row,)
        flat = [x for cell in cells for x in (cell if isinstance(cell, tuple) else (cell,))]
        made.append([x - result.baseline for x in flat])
    return made


def _title(result: PatchGrid) -> str:
    ends = f"clean {result.clean:.3g}"
    if result.corrupted is not None:
        ends += f", corrupted {result.corrupted:.3g}"
    return f"{result.run.subject}: {MODES[result.mode]}\n{result.metric}: {ends}; white = no effect"


def _names(site: str, axes: Sequence[Axis]) -> str:
    whole = {"position", "head"} - {axis.name for axis in axes}
    if len(axes) == 3 or site not in ("z", "q", "k", "v"):
        whole -= {"head"}
    return f"{site}, all {'s and '.join(sorted(whole))}s at once" if whole else site


def _label_layers(axes: Axes, layers: Axis) -> None:
    axes.set_ylabel("layer (from 0)")
    steps = MaxNLocator(integer=True, nbins=8, min_n_ticks=1)
    last = len(layers.index) - 1
    ticks = sorted({int(t) for t in steps.tick_values(0, last) if 0 <= t <= last})
    axes.set_yticks(ticks, [layers.label[t] for t in ticks])


def _label_columns(axes: Axes, across: Sequence[Axis], *, named: bool) -> None:
    """Columns under the last panel alone where all panels have the same."""
    if not across:
        axes.set_xticks([])
        return
    outer, heads = across[0], len(across[1].index) if len(across) > 1 else 1
    for i in range(1, len(outer.index) * (heads > 1)):
        axes.axvline(heads * i - 0.5, color="0.75", lw=0.4)
    if not named:
        axes.set_xticks([])
        return
    middles = [heads * i + (heads - 1) / 2 for i in range(len(outer.index))]
    if outer.name == "head":
        axes.set_xlabel("head")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    step = -(-len(outer.index) // MOST_LABELS)
    shown = slice(None, None, step)
    names = [f"{i} {_short(text)}" for i, text in zip(outer.index, outer.label, strict=True)]
    axes.set_xticks(middles[shown], names[shown], rotation=90, fontsize=6)
    axes.set_xlabel("position and token" + (f"; {heads} heads side by side" * (heads > 1)))


def _short(text: str) -> str:
    """A token on one line; both sides of a pair keep their beginning."""
    parts = text.split(" | ") if " | " in text else [text]
    room = LONGEST // len(parts)
    cut = [part if len(part) <= room else part[: room - 1] + "…" for part in parts]
    shown = " | ".join(part.replace("\n", "⏎").replace("\t", "⇥").strip() or "␣" for part in cut)
    return plain(shown)
