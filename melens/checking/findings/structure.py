"""What the model's inside looks like beside what it should look like."""

from __future__ import annotations

from melens.checking.findings.core import Card, Judgement, Unmeasured, View, nothing, rule
from melens.results import Collapse, KnownCheck

SITES = ("q", "k")


@rule(
    Card(
        id="rank-collapse",
        looks_for="queries or keys that one token collapses",
        unit="effective rank with the massive token over that without",
        needs=("collapse",),
        why="Behind the ME Layer the massive token's row outweighs all others in queries or keys, "
        "so attention there sees little beside it.",
        advice="Expect heads of these layers to attend to one token only; a mask on that token "
        "(melens eval) shows whether the model is better without.",
    )
)
def rank_collapse(view: View, threshold: float) -> Judgement | Unmeasured:
    """The layer after the ME Layer where queries or keys lose most, heads averaged."""
    found = view.held("collapse", Collapse)
    if found.me_layer is None:
        return nothing()
    ratios = []
    for site in SITES:
        kept, left = found.curve(site)
        for layer in range(found.me_layer + 1, found.n_layers):
            with_token, without = kept[layer], left[layer]
            if with_token is not None and without:
                ratios.append((with_token / without, site, layer, with_token, without))
    if not ratios:
        return Unmeasured("no layer after the ME Layer shows its queries or keys")
    value, site, layer, with_token, without = min(ratios)
    what = {"q": "queries", "k": "keys"}[site]
    return Judgement(
        found=value < threshold, value=value, source="/results/collapse/rows",
        title=f"the {what} of layer {layer} (counted from 0) have effective rank "
        f"{with_token:.1f} with the massive token and {without:.1f} without",
        evidence={"layer": layer, "site": site, "with_token": with_token, "without": without},
    )  # fmt: skip


@rule(
    Card(
        id="known-layer",
        looks_for="numbers that differ from what was published about this model",
        unit="published numbers that do not fit",
        needs=("known",),
        why="The same weights give the same ME Layer. One that differs is a sign of a broken "
        "conversion, a damaged checkpoint, or other weights under this name.",
        advice="Compare the checkpoint's hash with the publisher's, and convert it again; melens "
        "diff shows what moved.",
    )
)
def known_layer(view: View, threshold: float) -> Judgement | Unmeasured:
    """The located ME Layer and massive dimensions against the published ones."""
    found = view.held("known", KnownCheck)
    if found.source is None or not found.comparisons:
        return Unmeasured("nothing published is on record for this model")
    bad = [row for row in found.comparisons if row.verdict == "mismatch"]
    return Judgement(
        found=len(bad) > threshold, value=float(len(bad)), source="/results/known/comparisons",
        title=f"{len(bad)} of {len(found.comparisons)} published numbers do not fit: "
        + "; ".join(f"{row.what} {row.measured} instead of {row.published}" for row in bad),
        evidence={row.what: f"published {row.published}, measured {row.measured}" for row in bad},
    )  # fmt: skip
