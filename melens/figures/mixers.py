"""The sink token through a hybrid's layers, and what each mixer writes."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from melens.figures.draw import (
    PAGE,
    Into,
    figure,
    layer_axis,
    mark_me_layer,
    plain,
    sheet,
)
from melens.results.mixers import Mixers


@figure(Mixers, "layers")
def draw_layers(result: Mixers, into: Into = None) -> Figure:
    """Above: norms of the sink token and of the median token. Below: write shares, by mixer."""
    made = sheet(into, PAGE, 4.2)
    norms, shares = made.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    layers = [row.layer for row in result.layers]
    norms.semilogy(layers, [row.norm for row in result.layers], marker="o", label="sink token")
    medians = [row.median_norm for row in result.layers]
    norms.semilogy(layers, medians, marker=".", color="black", label="median token")
    every = len(result.full_layers) == result.n_layers  # lines at each layer say nothing
    for i, layer in enumerate(() if every else result.full_layers):
        name = "full attention reads" if i == 0 else None
        norms.axvline(layer - 0.5, color="0.6", ls=":", lw=1.0, label=name)
    norms.set_ylabel("norm at the output")
    mark_me_layer(norms, result.me_layer)
    _bars(shares, result)
    layer_axis(shares)
    norms.set_title(
        plain(f"{result.run.subject}: token {result.token!r} at position {result.position}"),
        loc="left",
    )
    made.legend(loc="outside lower center", ncols=4)
    return made


def _bars(axes: Axes, result: Mixers) -> None:
    for kind in dict.fromkeys(row.kind for row in result.layers):
        rows = [row for row in result.layers if row.kind == kind]
        places = [row.layer for row in rows]
        axes.bar(places, [row.write_share or 0.0 for row in rows], width=0.8, label=kind)
    rest = [row.rest_share for row in result.layers]
    axes.plot([row.layer for row in result.layers], rest, "k_", ms=8, label="rest of the block")
    axes.axhline(0, color="black", lw=0.6)
    axes.set_ylabel("share of its peak")
