"""Attention sinks: the layer x head map, and rates by layer."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from melens.figures.styles import (
    COLUMN,
    LAYER_LABEL,
    ME_COLOUR,
    PAGE,
    Drawing,
    figure,
    mark_me_layer,
    plain,
)
from melens.figures.token_curves import gaps
from melens.results.sinks import Sinks


@figure(Sinks, "map")
def draw_map(result: Sinks) -> Figure:
    """Attention to the first token, layers down, heads across; layers without attention blank."""
    heads = 1 + max(head.head for head in result.heads)
    alphas = [[math.nan] * heads for _ in range(result.n_layers)]
    for head in result.heads:
        alphas[head.layer][head.head] = head.alpha
    height = min(8.0, 1.1 + 0.11 * result.n_layers)
    made = Drawing(figsize=(COLUMN, height), layout="constrained")
    axes = made.add_subplot()
    image = axes.imshow(alphas, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
    axes.set_xlabel("head")
    axes.set_ylabel("layer (from 0)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if result.me_layer is not None:
        axes.axhline(result.me_layer + 0.5, color=ME_COLOUR, lw=1.0)
        axes.set_title(f"line: output of the ME Layer ({result.me_layer})", loc="left")
    made.colorbar(image, label=f"attention to the first token (T = {result.t})")
    made.suptitle(plain(result.run.subject), fontsize=8)
    return made


@figure(Sinks, "curves")
def draw_curves(result: Sinks) -> Figure:
    """Sink rates and mean attention to the first token by layer."""
    made = Drawing(figsize=(PAGE, 2.8), layout="constrained")
    axes = made.add_subplot()
    layers = range(result.n_layers)
    for eps, curve in result.sink_rate.items():
        axes.plot(layers, gaps(curve), marker="o", label=f"sink rate, eps {eps}")
    attention = gaps(result.attention_to_token)
    axes.plot(layers, attention, ls="--", color="black", label="mean attention")
    axes.axhline(result.uniform, ls=":", color="black", lw=0.8, label="uniform attention")
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("first token")
    axes.set_xlabel(LAYER_LABEL)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(plain(f"{result.run.subject}, T = {result.t}"), loc="left")
    made.legend(loc="outside lower center", ncols=5)
    mark_me_layer(axes, result.me_layer)
    return made
