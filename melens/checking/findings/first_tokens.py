"""How a text begins, and what is lost where it begins otherwise."""

from __future__ import annotations

from melens.checking.findings.core import Judgement, Measured, RuleCard, Unmeasured, nothing, rule
from melens.protocols import JsonObject
from melens.results import MELayer, Sinks, TokenPortrait
from melens.results.describe import Condition
from melens.results.sinks import SINK_RATE, USUAL_EPS

WITH_BOS = "with BOS"
NO_BOS = "texts' own, no BOS"
CHAT = "chat template"


@rule(
    RuleCard(
        id="sink-needs-bos",
        highest=1.0,
        looks_for="a massive first token that is there with BOS only",
        unit="share of the texts' own first tokens that are not massive",
        needs=("describe",),
        why="Without BOS first tokens of these texts do not become massive, where BOS does. A "
        "server or a pipeline that forgets BOS then runs the model without the massive activation "
        "that it was evaluated with. What sinks do without BOS was not measured.",
        advice="Put BOS before every text, and let a test of the serving stack fail without it.",
    )
)
def sink_needs_bos(view: Measured, threshold: float) -> Judgement | Unmeasured:
    """First tokens of the texts, tried alone at position 0, against BOS."""
    found = _lost(view, NO_BOS, threshold)
    if not isinstance(found, Judgement) or not found.found:
        return found
    which = "no" if found.value == 1 else "only some"
    return Judgement(
        found=True,
        value=found.value,
        source=found.source,
        evidence=found.evidence,
        title=f"BOS is massive, but {found.evidence['not_massive']} of "
        f"{found.evidence['first_tokens']} first tokens of texts without it are not",
        why=f"Without BOS {which} first tokens of these texts become massive, where BOS does. A "
        "server or a pipeline that forgets BOS then runs the model without the massive activation "
        "that it was evaluated with. What sinks do without BOS was not measured.",
    )


@rule(
    RuleCard(
        id="chat-first-token",
        highest=1.0,
        looks_for="a chat template whose first token is not massive where BOS is",
        unit="share of the template's first tokens that are not massive",
        needs=("describe",),
        why="The chat template begins with another token than the one that carries the massive "
        "activation, so chats begin without it. Whether they have a sink was not measured.",
        advice="Let the chat template begin with BOS, or evaluate the model in the template only.",
    )
)
def chat_first_token(view: Measured, threshold: float) -> Judgement | Unmeasured:
    """The template's first token, tried alone at position 0, against BOS."""
    found = _lost(view, CHAT, threshold)
    if not isinstance(found, Judgement) or not found.found:
        return found
    token = found.evidence.get("token")
    return Judgement(
        found=True,
        value=found.value,
        source=found.source,
        evidence=found.evidence,
        title=f"BOS is massive, the chat template's first token {token!r} is not",
    )


def _lost(view: Measured, name: str, threshold: float) -> Judgement | Unmeasured:
    """How many of the first tokens of one kind are not massive, where BOS is."""
    portrait = view.held("describe", TokenPortrait)
    tried = {row.name: (i, row) for i, row in enumerate(portrait.conditions)}
    if WITH_BOS not in tried:
        return Unmeasured("the tokenizer has no BOS to compare with")
    if name not in tried:
        return Unmeasured(f"there is no '{name}' to try")
    if not tried[WITH_BOS][1].massive:
        return nothing("BOS itself is not massive")
    at, row = tried[name]
    share = 1 - row.massive / row.first_tokens
    return Judgement(
        found=share > threshold,
        value=share,
        source=f"/results/describe/conditions/{at}",
        evidence={**_counts(row), **_first(portrait, name)},
    )


def _counts(row: Condition) -> JsonObject:
    return {
        "first_tokens": row.first_tokens,
        "not_massive": row.first_tokens - row.massive,
        "median_value": row.median_value,
    }


def _first(portrait: TokenPortrait, name: str) -> JsonObject:
    kind = {NO_BOS: "text", CHAT: "chat"}[name]
    held = [row for row in portrait.first_tokens if kind in row.sources and not row.massive]
    return {"token": held[0].token} if held else {}


@rule(
    RuleCard(
        id="sink-heads",
        highest=1.0,
        looks_for="attention sinks on the first token",
        unit=f"share of (text, layer, head) with a sink, eps {USUAL_EPS}",
        needs=("sinks",),
        why="So many heads rest on the first key that whatever touches it touches most of them: a "
        "cache that drops or quantises it, a window that leaves it behind, a prompt without it.",
        advice="Keep the first tokens' keys and values in the cache, whatever else is dropped.",
    )
)
def sink_heads(view: Measured, threshold: float) -> Judgement | Unmeasured:
    """Sink^eps of the first token over all layers (Gu et al.)."""
    found = view.held("sinks", Sinks)
    if (value := found.usual_rate) is None:
        return Unmeasured(f"the sinks were not measured at eps {USUAL_EPS}")
    return Judgement(
        found=value > threshold,
        value=value,
        source=f"/results/sinks/overall/{USUAL_EPS}",
        title=f"{value:.0%} of (text, layer, head) have a sink on the first token",
        evidence={"onset_layer": found.onset_layer, "uniform_attention": found.uniform},
    )


@rule(
    RuleCard(
        id="sink-window",
        highest=1.0,
        looks_for="a sliding window that leaves the sink behind",
        unit="sliding window over context",
        needs=("locate", "sinks"),
        why="In a text longer than the window these layers cannot see the first token any more, so "
        "the sink that short texts have is gone there.",
        advice="Evaluate at lengths beyond the window, or keep the first tokens visible in it.",
    )
)
def sink_window(view: Measured, threshold: float) -> Judgement | Unmeasured:
    """The config's window against its context, where layers with a window have sinks."""
    window, context = (view.run.settings.get(name) for name in ("sliding_window", "context"))
    if not isinstance(window, int):
        return nothing("the model has no sliding window")
    if not isinstance(context, int) or not context:
        return Unmeasured(f"the config has a window of {window:,} tokens and names no context")
    layers = [int(n) for n in str(view.run.settings.get("windowed_layers") or "").split(",") if n]
    rates = view.held("sinks", Sinks).sink_rate.get(USUAL_EPS, ())
    hit = [n for n in layers if n < len(rates) and (rates[n] or 0.0) >= SINK_RATE]
    value = window / context
    first = view.held("locate", MELayer).massive
    return Judgement(
        found=value < threshold and bool(hit),
        value=value,
        source="/run/settings/sliding_window",
        title=f"{len(hit)} layers with a window of {window:,} tokens (context {context:,}) have a "
        "sink on the first token",
        evidence={
            "window": window,
            "context": context,
            "layers": ", ".join(map(str, hit)),
            "massive_token": first[0].token if first else None,
        },
    )
