"""Where it emerges, and what the massive token is like."""

from __future__ import annotations

from melens.reporting.sections.base import Fact, PageBlock, PageView, Picture, Table, section
from melens.reporting.source import number_text
from melens.results.describe import TokenPortrait
from melens.results.known import KnownCheck
from melens.results.locate import MELayer

LAYER = "layer (from 0)"


@section(
    "emergence",
    "Where massive activations emerge",
    "A massive activation is an entry of the residual stream that is thousands of times larger "
    "than the others. The ME Layer is the layer at whose output it first appears. Layers are "
    "counted from 0, at the block output.",
    MELayer,
)
def emergence(view: PageView) -> PageBlock:
    """The profile by layer, the verdict and the numbers behind it."""
    result: MELayer = view.result
    made = view.block()
    made.facts = [
        Fact("Verdict", view.number("/verdict")),
        Fact("ME Layer (from 0)", view.number("/me_layer")),
        Fact("Layer that adds most (from 0)", view.number("/main_layer")),
        Fact("Layer where it is largest (from 0)", view.number("/peak_layer")),
        Fact("Layer that erases most of it (from 0)", view.number("/erase_layer")),
        Fact("Effective number of layers", view.number("/effective_layers")),
        Fact(f"Confidence that {result.claim}", view.number("/confidence")),
        Fact("Layers of the model", view.number("/n_layers")),
    ]
    if result.writer is not None:
        made.facts.append(Fact("Written by the FFN", view.number("/writer/ffn", "percent")))
    if result.nearest is not None:
        made.facts += [
            Fact("Nearest to being massive", view.number("/nearest/value")),
            Fact("Its layer (from 0)", view.number("/nearest/layer")),
            Fact("Its token's norm over the median", view.number("/nearest/norm_ratio")),
        ]
    made.tiles = [Fact("ME Layer (from 0)", view.number("/me_layer"))]
    if result.massive:
        made.tiles.append(Fact("The massive token reaches", view.number("/massive/0/value")))
    made.pictures = [Picture(result, "profile", _profile_alt(result), PROFILE)]
    made.tables = [_layers(view)]
    return made


PROFILE = (
    "Largest |x|, the median of the token that holds it and the median of the layer, by layer, on "
    "a log scale; below, the share of the massive token's vector that each layer adds (negative: "
    "takes away)."
)


def _profile_alt(result: MELayer) -> str:
    """The curve in words: where it starts, its largest jump, its peak and its end."""
    tops = [row.max for row in result.profile]
    text = f"Largest |x| by layer: {number_text(tops[0])} at layer 0"
    jumps = [tops[i] / tops[i - 1] if tops[i - 1] else 0.0 for i in range(1, len(tops))]
    if jumps:
        at = 1 + jumps.index(max(jumps))
        text += (
            f", largest jump from {number_text(tops[at - 1])} at layer {at - 1} to "
            f"{number_text(tops[at])} at layer {at}"
        )
    peak = tops.index(max(tops))
    text += f", most {number_text(tops[peak])} at layer {peak}, {number_text(tops[-1])} at the last"
    medians = [row.median for row in result.profile]
    return (
        f"{text}. The median stays between {number_text(min(medians))} and "
        f"{number_text(max(medians))}. Layers count from 0."
    )


def _layers(view: PageView) -> Table:
    columns = ("max", "median", "token_median", "norm_ratio", "position", "dim")
    rows = []
    for i, row in enumerate(view.result.profile):
        share = view.number(f"/profile/{i}/write_share", "percent")
        rows.append([str(row.layer), *view.numbers(f"/profile/{i}", *columns), share])
    return Table(
        "Every layer's output",
        (
            LAYER,
            "largest |x|",
            "median |x|",
            "median of its token",
            "norm ratio",
            "position",
            "dimension",
            "write share",
        ),
        rows,
        folded=True,
    )


@section(
    "token",
    "The massive token",
    "Which token carries the massive activation, in which dimensions, and which first tokens of "
    "a text become it.",
    TokenPortrait,
)
def portrait(view: PageView) -> PageBlock:
    """The token table, its energy and what happens to other first tokens."""
    result: TokenPortrait = view.result
    made = view.block()
    made.tables = [_tokens(view)] if result.massive else []
    made.tables += [_conditions(view), _first_tokens(view)]
    made.notes = list(result.missing)
    if result.energy is not None:
        made.facts = [
            Fact("Energy in its largest coordinate", view.number("/energy/1", "percent")),
            Fact("Energy in its four largest", view.number("/energy/4", "percent")),
            Fact("Distinct inputs compared", view.number("/inputs")),
        ]
        made.pictures = [Picture(result, "curves", _curves_alt(result), CURVES)]
    return made


CURVES = "The massive token by layer: how its energy is spread and how constant its direction is."


def _curves_alt(result: TokenPortrait) -> str:
    cosines = [value for value in result.cosine_layers if value is not None]
    steady = [layer for layer, value in enumerate(result.cosine_layers) if (value or 0) > 0.99]
    text = f"{result.summary()} Its cosine with the peak direction goes from "
    text += f"{number_text(cosines[0])} at the first layer to {number_text(cosines[-1])} at the "
    return f"{text}last; it is above 0.99 at {len(steady)} of {result.n_layers} layers."


def _tokens(view: PageView) -> Table:
    rows = []
    for i, entry in enumerate(view.result.massive):
        keys = ("token_id", "position", "dim", "value")
        share = view.number(f"/massive/{i}/frequency", "percent")
        rows.append([view.token(entry.token), *view.numbers(f"/massive/{i}", *keys), share])
    return Table(
        "Massive tokens, the primary one first",
        ("token", "id", "position (from 0)", "dimension", "largest value", "of the sequences"),
        rows,
    )


def _conditions(view: PageView) -> Table:
    rows = []
    for i, condition in enumerate(view.result.conditions):
        keys = ("first_tokens", "massive", "median_value")
        rows.append(
            [
                condition.name,
                *view.numbers(f"/conditions/{i}", *keys),
                view.source.interval(f"{view.at}/conditions/{i}/interval", "percent"),
            ]
        )
    return Table(
        "What becomes of the first token, by how a text starts",
        (
            "start",
            "first tokens tried",
            "massive",
            "median of the largest |x|",
            "95 % interval of the massive share",
        ),
        rows,
    )


MOST_FIRST = 24


def _first_tokens(view: PageView) -> Table:
    tried = view.result.first_tokens
    rows = []
    for i, row in enumerate(tried[:MOST_FIRST]):
        keys = ("token_id", "massive", "value", "first_share")
        rows.append(
            [
                view.token(row.token),
                ", ".join(row.sources),
                *view.numbers(f"/first_tokens/{i}", *keys),
            ]
        )
    left = len(tried) - len(rows)
    return Table(
        "Tokens alone at position 0" + (f" (the first {len(rows)} of {len(tried)})" * (left > 0)),
        ("token", "stands for", "id", "massive", "largest value", "its ME Layer (from 0)"),
        rows,
        folded=True,
    )


@section(
    "known",
    "Against what was published",
    "A model that is not like the published one of its name may have been damaged or converted "
    "wrongly.",
    KnownCheck,
)
def published(view: PageView) -> PageBlock:
    """One row a published number."""
    made = view.block()
    rows = [
        [row.what, row.published, row.measured, view.number(f"/comparisons/{i}/verdict")]
        for i, row in enumerate(view.result.comparisons)
    ]
    if rows:
        columns = ("what", "published", "measured", "verdict")
        if any(row.off for row in view.result.comparisons):
            columns = (*columns, "off by")
            for row, made_of in zip(rows, view.result.comparisons, strict=True):
                row.append(made_of.off or "")
        made.tables = [Table("Published beside measured", columns, rows)]
    made.notes = [view.result.convention]
    return made
