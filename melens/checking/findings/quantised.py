"""What the number formats of the policy cost, measured."""

from __future__ import annotations

from melens.checking.findings.core import Judgement, Measured, RuleCard, nothing, rule
from melens.formatting import within
from melens.protocols import JsonObject
from melens.results.evaluation import NATS
from melens.results.quantise import Quantisation, SchemeTrials


@rule(
    RuleCard(
        id="quantised-loss",
        looks_for="a number format of the policy that costs too much",
        unit=f"loss that the worst of the policy's schemes adds, {NATS}",
        needs=("quantise",),
        why="Served in this format the model predicts these texts so much worse. Weights are "
        "rounded to the nearest value; methods that learn from data (GPTQ, AWQ) can cost less.",
        advice="Serve it in another format; melens quantise measures more of them, and what "
        "keeping the massive token, single weights or layers whole buys in each.",
    )
)
def quantised_loss(view: Measured, threshold: float) -> Judgement:
    """The largest cost among the policy's schemes, nothing kept whole."""
    found = view.held("quantise", Quantisation)
    rows = [(i, row) for i, row in enumerate(found.schemes) if row.scheme in view.schemes]
    if not rows:
        return nothing("none of the policy's schemes can be had in this model")
    at, worst = max(rows, key=lambda pair: pair[1].as_is.damage.value)
    damage = worst.as_is.damage
    return Judgement(
        found=damage.value > threshold,
        value=damage.value,
        source=f"/results/quantise/schemes/{at}/trials/0/damage/value",
        title=f"{worst.scheme} ({worst.about}) adds {damage.value:.3g} {NATS}"
        f"{within(damage.interval, '.3g')}",
        evidence={"scheme": worst.scheme, **_others(worst, rows)},
    )


def _others(worst: SchemeTrials, rows: list[tuple[int, SchemeTrials]]) -> JsonObject:
    return {
        f"{row.scheme} adds ({NATS})": row.as_is.damage.value for _, row in rows if row is not worst
    }
