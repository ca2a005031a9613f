"""What the massive token does: rank, sinks and the attention of single heads."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from melens.figures.attention_view import heads_panel
from melens.figures.ranks import NAMES
from melens.reporting.sections.base import Fact, PageBlock, PageView, Panel, Picture, Table, section
from melens.reporting.source import number_text
from melens.results.attention import AttentionMaps, HeadMap
from melens.results.check import CacheNorms
from melens.results.collapse import Collapse
from melens.results.sinks import Sinks

BOXES = 100_000
"""Squares of all heads' maps together: 0.7 MB, and few seconds of drawing."""


WORST = 3
"""Rows of a long table that everyone should see."""


@section(
    "rank",
    "Rank: how many directions the activations fill",
    "With one huge token the residual stream looks as if it had collapsed onto one direction. The "
    "dashed line leaves that token out: what still collapses then is a real loss.",
    Collapse,
)
def rank(view: PageView) -> PageBlock:
    """Effective rank by layer and site."""
    result: Collapse = view.result
    made = view.block()
    made.notes = list(result.missing)
    made.pictures = [
        Picture(result, "rank", _rank_alt(result), "Effective rank by layer, one panel a site.")
    ]
    made.tables = [_ranks(view)]
    return made


def _rank_alt(result: Collapse) -> str:
    parts = [result.summary()]
    for site in result.sites:
        kept, left = ([v for v in curve if v is not None] for curve in result.curve(site))
        if kept:
            said = f"{NAMES[site]}: {number_text(min(kept))} to {number_text(max(kept))}"
            said += f", without the token at least {number_text(min(left))}" if left else ""
            parts.append(f"{said}.")
    return " ".join(parts)


def _ranks(view: PageView) -> Table:
    """The sites without heads, whose numbers stand in the JSON as they are."""
    found: dict[tuple[int, str], int] = {}
    for i, row in enumerate(view.result.rows_):
        if row.definition == "effective_rank" and row.head is None:
            found[row.layer, row.site] = i
    sites = [site for site in view.result.sites if any(at[1] == site for at in found)]
    rows = [
        [
            str(layer),
            *(
                view.number(f"/rows/{found[layer, site]}/{key}") if (layer, site) in found else ""
                for site in sites
                for key in ("with_token", "without_token")
            ),
        ]
        for layer in range(view.result.n_layers)
    ]
    columns = [
        f"{NAMES[site]}{end}" for site in sites for end in (", all rows", ", without the token")
    ]
    return Table("Effective rank by layer", ("layer (from 0)", *columns), rows, folded=True)


@section(
    "sinks",
    "Attention sinks",
    "Heads that have nothing to look at look at the massive token. Whoever drops that token from "
    "a cache or a window takes the sink away.",
    Sinks,
)
def sink(view: PageView) -> PageBlock:
    """The map of heads, rates by layer and the tokens that draw attention."""
    result: Sinks = view.result
    made = view.block()
    eps = result.shown_eps
    made.tiles = [Fact(f"Heads with a sink (eps {eps})", view.number(f"/overall/{eps}", "percent"))]
    made.facts = [
        Fact(f"Sink rate at eps {name}", view.number(f"/overall/{name}", "percent"))
        for name in result.overall
    ] + [
        Fact("Sinks begin at layer (from 0)", view.number("/onset_layer")),
        Fact("Uniform attention would give", view.number("/uniform", "percent")),
        Fact("Tokens of a sequence that count (T)", view.number("/t")),
        Fact("Sequences", view.number("/sequences")),
    ]
    made.pictures = [
        Picture(
            result,
            "map",
            _map_alt(result),
            "Attention to the first token, head by head.",
            narrow=True,
        ),
        Picture(result, "curves", _sinks_alt(result), "Sink rates and mean attention by layer."),
    ]
    made.tables = [_sink_tokens(view)] if result.tokens else []
    made.tables.append(_sink_layers(view))
    return made


def _map_alt(result: Sinks) -> str:
    strong = sum(head.alpha > 0.5 for head in result.heads)
    most = max(result.heads, key=lambda head: head.alpha)
    return (
        f"Map of {len(result.heads)} heads: {strong} give the first token more than half of their "
        f"attention; the most is {number_text(most.alpha)} by head {most.head} of layer "
        f"{most.layer}. Layers and heads count from 0."
    )


def _sinks_alt(result: Sinks) -> str:
    found = [
        (layer, value) for layer, value in enumerate(result.attention_to_token) if value is not None
    ]
    low, high = min(found, key=lambda at: at[1]), max(found, key=lambda at: at[1])
    return (
        f"{result.summary()} Mean attention to it is least at layer {low[0]} "
        f"({number_text(low[1])}) and most at layer {high[0]} ({number_text(high[1])})."
    )


def _sink_tokens(view: PageView) -> Table:
    names = tuple(view.result.overall)
    rows = [
        [
            view.token(token.token),
            *view.numbers(f"/tokens/{i}", "position", "count"),
            *(
                view.number(f"/tokens/{i}/overall/{eps}", "percent") if eps in token.overall else ""
                for eps in names
            ),
        ]
        for i, token in enumerate(view.result.tokens)
    ]
    columns = ("token", "position (from 0)", "times met", *(f"sink rate, eps {e}" for e in names))
    return Table("What each massive token draws", columns, rows)


def _sink_layers(view: PageView) -> Table:
    names = tuple(view.result.sink_rate)
    rows = [
        [
            str(layer),
            *(view.number(f"/sink_rate/{eps}/{layer}", "percent") for eps in names),
            view.number(f"/attention_to_token/{layer}"),
            view.number(f"/entropy/{layer}"),
        ]
        for layer in range(view.result.n_layers)
    ]
    columns = (*(f"sink rate, eps {eps}" for eps in names), "mean attention", "entropy (nats)")
    return Table("Sinks by layer", ("layer (from 0)", *columns), rows, folded=True)


@section(
    "cache",
    "What a key/value cache holds of it",
    "A cache that is rounded with one scale takes the scale of its largest entry. The ratio is "
    "that of the massive token's largest entry to another token's.",
    CacheNorms,
)
def cached(view: PageView) -> PageBlock:
    """Keys and values of the massive token beside the others', the worst first."""
    result: CacheNorms = view.result
    made = view.block()
    made.notes = list(result.missing)
    order = sorted(range(len(result.rows_)), key=lambda i: -result.rows_[i].ratio)
    names = {row.site: NAMES.get(row.site, row.site) for row in result.rows_}
    rows = [
        [
            f"{result.rows_[i].layer}, {names[result.rows_[i].site]}",
            *view.numbers(f"/rows/{i}", "head", "token", "others", "ratio"),
        ]
        for i in order
    ]
    columns = ("layer (from 0), site", "head (from 0)", "massive token", "others", "ratio")
    if rows:
        made.tables = [
            Table("Where the massive token stands out most", columns, rows[:WORST]),
            Table("All layers, the worst first", columns, rows, folded=True),
        ]
    return made


@section(
    "attention",
    "What single heads look at",
    "Rows are tokens that look, columns tokens that are looked at; white is 0, full blue is 1. "
    "L11H3 is query head 3 of layer 11, both counted from 0. Point at a small map, or press "
    "Enter on it, to enlarge it. The table below says the same in numbers.",
    AttentionMaps,
)
def heads(view: PageView) -> PageBlock:
    """An interactive panel a layer, and a table for whoever cannot see it."""
    maps: AttentionMaps = view.result
    made = view.block()
    kept = telling(maps)
    shown = [head for i, head in enumerate(maps.heads) if i in kept]
    for layer in sorted({head.layer for head in shown}):
        mine = [head for head in shown if head.layer == layer]
        panel = Markup(heads_panel(f"heads-{view.index}-{layer}", maps.tokens, mine))
        made.panels.append(Panel(f"Layer {layer} (counted from 0)", panel))
    if len(shown) < len(maps.heads):
        made.notes = [
            f"{len(shown)} of {len(maps.heads)} heads are drawn, those that look most and least "
            "at the first token; all are in the JSON."
        ]
    made.tables = [_head_table(view, kept)]
    return made


def telling(maps: AttentionMaps) -> list[int]:
    """Indices of the heads that a page can hold.

    Ordered by how much they look at the first token: three quarters of the page for those that
    look most, a quarter for those that look least.
    """
    most = max(1, BOXES // len(maps.tokens) ** 2)
    rows = maps.rows()
    order = sorted(range(len(rows)), key=lambda i: (-rows[i]["attention_to_first"], i))
    if len(order) <= most:
        return sorted(order)
    ends: Sequence[int] = order[len(order) - most // 4 :] if most >= 4 else ()
    return sorted([*order[: most - len(ends)], *ends])


def _head_table(view: PageView, kept: list[int]) -> Table:
    rows = []
    for i, row in enumerate(view.result.rows()):
        if i in kept:
            head: HeadMap = view.result.heads[i]
            name = view.link(f"/heads/{i}", f"L{head.layer}H{head.head}")
            rows.append(
                [
                    name,
                    *(
                        number_text(row[f"attention_to_{at}"], "percent")
                        for at in ("first", "self")
                    ),
                ]
            )
    columns = ("head", "mean attention to the first token", "to itself")
    return Table("The heads in numbers", columns, rows, folded=True)
