"""What the numbers behind a finding are: of which object, in which unit."""

from __future__ import annotations

from markupsafe import Markup

from melens.reporting.sections import Fact
from melens.reporting.source import Addressed, step
from melens.results.check import Finding

LAYER = "Layer (from 0)"
FIRST = {
    "first_tokens": "First tokens tried",
    "not_massive": "First tokens that are not massive",
    "median_value": "Median over first tokens of the largest |x| (residual units)",
    "token": "A first token that is not massive",
}
ADDED = {
    "loss": "Loss without the edit (nats a token)",
    "texts": "Texts",
}
INTERVAL = "Loss added, 95 % interval (nats a token)"
ENDS = ("interval_low", "interval_high")
EVIDENCE: dict[str, dict[str, str]] = {
    "float16-range": {
        "layer": "Layer of the largest |x| (from 0)",
        "site": "Place in that layer",
        "share_of_float16": "Largest |x| over float16's largest number (times)",
    },
    "int8-per-tensor": {
        "layer": "Layer whose entries lose most (from 0)",
        "largest": "Largest |x| at its output (residual units)",
        "median": "Median |x| at its output (residual units)",
        "int8_step": "One int8 step there (residual units)",
        "massive_dimensions": "Massive dimensions of the residual (from 0)",
        "ffn_product_ratio": "Half an int8 step of an FFN's product over its median |x| (times)",
        "ffn_product_layer": "Layer of that FFN (from 0)",
    },
    "kv-quantisation": {
        "layer": LAYER,
        "head": "Key/value head (from 0)",
        "site": "Keys (k) or values (v)",
        "massive_largest": "Massive token's largest |entry|",
        "others_largest": "Other tokens' median largest |entry|",
    },
    "sink-needs-bos": FIRST,
    "chat-first-token": FIRST,
    "sink-heads": {
        "onset_layer": "First layer with sinks (from 0)",
        "uniform_attention": "Uniform attention would give the first token (share)",
    },
    "sink-window": {
        "window": "Sliding window (tokens)",
        "context": "Context (tokens)",
        "layers": "Layers with a window and a sink (from 0)",
        "massive_token": "Massive token",
    },
    "quantised-loss": {
        "scheme": "Scheme",
    },
    "super-weight": {
        "layer": "Layer of the weight (from 0)",
        "expert": "Its expert (from 0)",
        "row": "Its row of the down projection (residual dimension, from 0)",
        "column": "Its column of the down projection (FFN neuron, from 0)",
        "weight": "Value of the weight",
    },
    "one-token": {**ADDED, "control": "Loss that the control adds (nats a token)"},
    "kv-eviction": {
        **ADDED,
        "from_position": "Hidden from position (from 0)",
        "massive_at": "Position of the massive token (from 0)",
    },
    "rank-collapse": {
        "layer": LAYER,
        "site": "Queries (q) or keys (k)",
        "with_token": "Effective rank with the massive token (dimensions)",
        "without": "Effective rank without it (dimensions)",
        "lowest_head": "Head that loses most (from 0)",
    },
}
"""Rule -> name of a number of its evidence -> words; names that are words already stay."""


def evidence_facts(found: Finding, at: str, source: Addressed) -> list[Fact]:
    """The finding's number and threshold, then its evidence in the order of :data:`EVIDENCE`.

    Args:    at: pointer of the finding.
    """
    made = [
        Fact(f"Measured: {found.unit or 'no unit'}", source.number(f"{at}/value")),
        Fact("Policy's threshold, in the same unit", source.number(f"{at}/threshold")),
    ]
    place, words = f"{at}/evidence", EVIDENCE.get(found.id, {})
    if all(end in found.evidence for end in ENDS):
        low, high = (source.number(f"{place}/{end}") for end in ENDS)
        made.append(Fact(INTERVAL, Markup("{} to {}").format(low, high)))
    order = [name for name in words if name in found.evidence]
    order += [name for name in found.evidence if name not in words and name not in ENDS]
    for name in order:
        label = words.get(name, name.replace("_", " "))
        made.append(Fact(label, source.number(f"{place}{step(name)}")))
    return made
