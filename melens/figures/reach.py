"""Reach: every token's largest |x| by layer, and what the FFNs write under the scan's ceilings."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from melens.figures.styles import ME_COLOUR, PAGE, Drawing, figure, plain
from melens.results.reach import Reach

COLOURS = {"bos": ME_COLOUR, "chat": "#0072B2", "given": "#009E73", "sample": "#999999"}
NAMES = {
    "bos": "BOS", "chat": "first of a chat", "given": "asked for", "sample": "drawn at random",
}  # fmt: skip


@figure(Reach, "reach")
def draw_reach(result: Reach) -> Figure:
    """Left: the residual's largest |x|, one line a token. Right: the largest FFN write."""
    made = Drawing(figsize=(PAGE, 3.0), layout="constrained")
    tokens, writes = made.subplots(1, 2)
    _tokens(tokens, result)
    _writes(writes, result)
    handles = [axes.get_legend_handles_labels() for axes in (tokens, writes)]
    made.legend(
        [h for hs, _ in handles for h in hs], [name for _, names in handles for name in names],
        loc="outside lower center", ncols=4,
    )  # fmt: skip
    made.suptitle(plain(f"{result.run.subject}: {len(result.tokens)} first tokens"), fontsize=8)
    return made


def _tokens(axes: Axes, result: Reach) -> None:
    seen: set[str] = set()
    layers = range(result.until + 1)
    for token in reversed(result.tokens):  # the named ones on top
        label = None if token.why in seen else NAMES[token.why]
        seen.add(token.why)
        drawn = token.why == "sample"
        axes.plot(
            layers, token.largest, color=COLOURS[token.why], lw=0.6 if drawn else 1.3, label=label
        )
    _finish(axes, "largest |x| at the block output")


def _writes(axes: Axes, result: Reach) -> None:
    rows = [row for row in result.profile if row.write]
    axes.plot(
        [row.layer for row in rows], [abs(row.write or 0) for row in rows], color="black",
        marker="o", ms=2.5, label="largest |FFN write|",
    )  # fmt: skip
    bound = [(row.layer, row.ceiling) for row in result.profile if row.ceiling]
    if bound:
        axes.plot(
            [layer for layer, _ in bound], [ceiling for _, ceiling in bound], color="black",
            ls="--", lw=0.8, label="ceiling of one neuron (scan)",
        )  # fmt: skip
    _finish(axes, "|x| added by the FFN")


def _finish(axes: Axes, label: str) -> None:
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.set_xlabel("layer (counted from 0)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
