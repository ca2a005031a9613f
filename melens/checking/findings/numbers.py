"""Activations that a number format cannot hold."""

from __future__ import annotations

from melens.checking.findings.core import Judgement, Measured, RuleCard, nothing, rule
from melens.results import CacheNorms, MELayer, SuperWeights

FLOAT16_MAX = 65504.0
INT8_STEPS = 127
"""Steps of a symmetric int8 scale on either side of zero."""


@rule(
    RuleCard(
        id="float16-range",
        looks_for="activations that float16 cannot hold",
        unit="largest |x|, residual units",
        needs=("locate",),
        why="float16 ends at 65,504. A larger activation becomes infinite there, and everything "
        "computed from it is NaN: the model answers nothing at all.",
        advice="Serve the model in bfloat16 or float32; do not cast it to float16.",
    )
)
def float16_range(view: Measured, threshold: float) -> Judgement:
    """Largest |x| at a block's output; inside the FFN as well, where that was read."""
    profile = view.held("locate", MELayer).profile
    found = [
        (row.max, f"/results/locate/profile/{i}/max", "the output", row.layer)
        for i, row in enumerate(profile)
    ]
    spikes = view.results.get("super_weights")
    for i, row in enumerate(spikes.profile if isinstance(spikes, SuperWeights) else ()):
        place = f"/results/super_weights/profile/{i}"
        found.append((row.input, f"{place}/input", "the FFN's product", row.layer))
        found.append((row.output, f"{place}/output", "the FFN's output", row.layer))
    value, source, site, layer = max(found)
    share = value / FLOAT16_MAX
    return Judgement(
        found=value > threshold,
        value=value,
        source=source,
        title=f"|x| reaches {value:,.0f} at {site} of layer {layer} (counted from 0), "
        f"{share:.0%} of float16's range",
        evidence={"layer": layer, "site": site, "share_of_float16": share},
    )


@rule(
    RuleCard(
        id="int8-per-tensor",
        looks_for="a residual stream whose ordinary entries one int8 scale rounds to zero",
        unit="half an int8 step over the median |x| of the residual",
        needs=("locate",),
        why="This is about a residual stream that is itself kept in int8 with one scale for the "
        "tensor: the massive activation sets the step, and what is smaller than half a step "
        "becomes zero. Usual W8A8 quantises what linear layers read instead, behind the norm and "
        "inside the FFN; of these only the FFN's product was looked at, where the evidence names "
        "it.",
        advice="Give every token of the residual a scale of its own, or keep it in 16 bits.",
    )
)
def int8_per_tensor(view: Measured, threshold: float) -> Judgement:
    """Half a step of an absmax scale against the median entry, at every block's output."""
    located = view.held("locate", MELayer)
    found = [
        (row.max / (2 * INT8_STEPS) / row.median, i)
        for i, row in enumerate(located.profile)
        if row.median > 0
    ]
    if not found:
        return nothing("the median activation is 0 at every layer")
    value, at = max(found)
    row = located.profile[at]
    dims = sorted({token.dim for token in located.massive} | {row.dim})
    named = ", ".join(map(str, dims))
    lost = ", so at least half of the entries become zero" if value >= 1 else ""
    evidence: dict[str, float | int | str | None] = {
        "layer": row.layer,
        "largest": row.max,
        "median": row.median,
        "int8_step": row.max / INT8_STEPS,
        "massive_dimensions": named,
        **_product(view),
    }
    return Judgement(
        found=value > threshold,
        value=value,
        evidence=evidence,
        source=f"/results/locate/profile/{at}",
        title="with one int8 scale for the residual stream half a step at layer "
        f"{row.layer} (counted from 0) is {value:.3g} times the median |x|{lost}",
        advice="Give every token of the residual a scale of its own, or keep it in 16 bits. Its "
        f"massive dimensions are {named}; keeping these alone in 16 bits may not be enough, since "
        "what is left without them was not measured.",
    )


def _product(view: Measured) -> dict[str, float | int | str | None]:
    """The same ratio at what the down projections read, where that was measured."""
    spikes = view.results.get("super_weights")
    rows = spikes.profile if isinstance(spikes, SuperWeights) else ()
    ratios = [
        (row.input / (2 * INT8_STEPS) / row.input_median, row.layer)
        for row in rows
        if row.input_median > 0
    ]
    if not ratios:
        return {}
    ratio, layer = max(ratios)
    return {"ffn_product_ratio": ratio, "ffn_product_layer": layer}


@rule(
    RuleCard(
        id="kv-quantisation",
        looks_for="a massive token's key or value that widens a quantised cache's steps",
        unit="times the others' largest |entry|",
        needs=("cache_norms",),
        why="A cache that quantises the keys or values of a head with one scale takes its step "
        "from the largest entry; one token's outlier makes all others coarser.",
        advice="Keep the massive token's keys and values in 16 bits, or give every token a scale "
        "of its own.",
    )
)
def kv_quantisation(view: Measured, threshold: float) -> Judgement:
    """The worst head of any layer, keys and values alike."""
    norms = view.held("cache_norms", CacheNorms)
    if norms.worst is None:
        return nothing()
    row = norms.rows_[norms.worst]
    what = "value" if row.site == "v" else "key"
    return Judgement(
        found=row.ratio > threshold,
        value=row.ratio,
        source=f"/results/cache_norms/rows/{norms.worst}/ratio",
        title=f"the massive token's {what} at layer {row.layer}, head {row.head} (counted from 0) "
        f"is {row.ratio:.3g} times as large as other tokens'",
        evidence={
            "layer": row.layer,
            "head": row.head,
            "site": row.site,
            "massive_largest": row.token,
            "others_largest": row.others,
        },
    )
