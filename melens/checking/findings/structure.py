"""What the model's inside looks like beside what it should look like."""

from __future__ import annotations

from collections.abc import Sequence

from melens.checking.findings.core import Judgement, Measured, RuleCard, Unmeasured, nothing, rule
from melens.checking.trimming import compact_collapse
from melens.published import LEAST_TEXTS
from melens.results import Collapse, CollapseRow, KnownCheck, MELayer

SITES = ("q", "k")


@rule(
    RuleCard(
        id="rank-collapse",
        highest=1.0,
        looks_for="queries or keys that one token collapses",
        unit="effective rank with the massive token over that without",
        needs=("collapse",),
        why="Behind the ME Layer the massive token's row takes up most of the queries' or keys' "
        "spread, so what tells the other tokens apart is small beside it there. What attention "
        "makes of that is not measured here.",
        advice="Look at the attention of these layers before saying anything of it; a mask on the "
        "token (melens eval) shows whether the model is better without.",
    )
)
def rank_collapse(view: Measured, threshold: float) -> Judgement | Unmeasured:
    """The layer after the ME Layer where queries or keys lose most, heads averaged."""
    found = view.held("collapse", Collapse)
    if found.me_layer is None:
        return nothing()
    rows = compact_collapse(found).rows_  # as the report holds them, for the pointer
    ratios = []
    for site in SITES:
        kept, left = found.curve(site)
        for layer in range(found.me_layer + 1, found.n_layers):
            with_token, without = kept[layer], left[layer]
            if with_token is not None and without:
                ratio = with_token / without
                ratios.append((ratio, site, layer, with_token, without))
    if not ratios:
        return Unmeasured("no layer after the ME Layer shows its queries or keys")
    value, site, layer, with_token, without = min(ratios)
    what = {"q": "queries", "k": "keys"}[site]
    at, head = _lowest(rows, layer, site)
    return Judgement(
        found=value < threshold,
        value=value,
        source=f"/results/collapse/rows/{at}",
        title=f"the {what} of layer {layer} (counted from 0) have effective rank "
        f"{with_token:.1f} with the massive token and {without:.1f} without",
        evidence={
            "layer": layer,
            "site": site,
            "with_token": with_token,
            "without": without,
            "lowest_head": head,
        },
    )


def _lowest(rows: Sequence[CollapseRow], layer: int, site: str) -> tuple[int, int | None]:
    """Row and head that lose most there; None where the report holds the heads' mean."""
    found = [
        (row.with_token / row.without_token, at)
        for at, row in enumerate(rows)
        if (row.layer, row.site, row.definition) == (layer, site, "effective_rank")
        and row.with_token is not None
        and row.without_token
    ]
    at = min(found)[1]
    return at, rows[at].head


@rule(
    RuleCard(
        id="known-layer",
        looks_for="an ME Layer or massive dimensions other than those published of this model",
        unit="published layers and dimensions that do not fit",
        needs=("known",),
        why="The same weights give the same ME Layer and the same massive dimensions. One that "
        "differs is a sign of a broken conversion, a damaged checkpoint, or other weights under "
        "this name.",
        advice="Compare the checkpoint's hash with the publisher's, and convert it again; melens "
        "diff shows what moved.",
    )
)
def known_layer(view: Measured, threshold: float) -> Judgement | Unmeasured:
    """The located ME Layer and massive dimensions against the published ones.

    Sizes, stages and the erase layer are shown beside it and never counted: they depend on the
    text.
    """
    found = view.held("known", KnownCheck)
    if found.source is None or not found.comparisons:
        return Unmeasured("nothing published is on record for this model")
    held = [row for row in found.comparisons if row.place and row.verdict != "unknown"]
    if not held:
        return Unmeasured("no published layer or dimension can be compared with these texts")
    bad = [row for row in held if row.verdict == "mismatch"]
    if bad and _texts_say_little(view):
        return Unmeasured(
            "these texts show no massive token, and most of them are one token repeated; check "
            "with other texts, or with BOS"
        )
    names = " and ".join(row.what for row in bad)
    return Judgement(
        found=len(bad) > threshold,
        value=float(len(bad)),
        source="/results/known/comparisons",
        title=f"{len(bad)} of {len(held)} published places do not fit: "
        + "; ".join(f"{row.what} {row.measured} instead of {row.published}" for row in bad),
        evidence={row.what: f"published {row.published}, measured {row.measured}" for row in bad},
        why=f"The same weights give the same {names}. Another one is a sign of a broken "
        "conversion, a damaged checkpoint, or other weights under this name.",
        advice="Compare the checkpoint's hash with the publisher's, and convert it again; melens "
        f"diff with a copy known to be good shows whether {names} moved.",
    )


def _texts_say_little(view: Measured) -> bool:
    """Whether nothing is massive in texts of one token, where nothing tells the first apart."""
    located, varied = view.results.get("locate"), view.run.settings.get("varied_texts")
    if not isinstance(located, MELayer) or located.me_layer is not None:
        return False
    return isinstance(varied, int) and varied < LEAST_TEXTS
