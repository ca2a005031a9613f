"""The tables of a long-context result."""

from __future__ import annotations

from typing import Any

from melens.cli.output import cell, say, table
from melens.cli.tables import TABLES


@TABLES.register("long-context")
def _long_context(result: Any) -> None:
    say(
        f"{result.about}\n\nFound, and loss of the answers in nats a token; differences to no edit "
        "are paired by item, 95 % bootstrap:"
    )
    table([_overall(condition) for condition in result.conditions])
    say("\nFound by length and depth (0 = before the text, 1 = right before the question):")
    shown = (result.base, result.edited, *result.controls)
    for length in result.lengths:
        table([_by_depth(condition, length, result.depths) for condition in shown])
    if result.texts:
        say(
            f"\nLoss of {result.texts} plain texts by position from 0, nats a token, and each "
            "edit's difference to it:"
        )
        table([_bin(result, shown, i) for i in range(len(result.base.bins))])
    say("")


def _overall(condition: Any) -> dict[str, Any]:
    whole = condition.overall
    return {
        "condition": condition.name, "edit": condition.edit.label,
        "found": f"{whole.found.value:.1%}{_change(whole.found_delta)}",
        "answer loss": f"{cell(whole.loss.value)}{_change(whole.loss_delta)}",
        "text loss": condition.text_loss
        and f"{cell(condition.text_loss.value)}{_change(condition.text_delta)}",
        "energy": condition.energy,
    }  # fmt: skip


def _by_depth(condition: Any, length: int, depths: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"length": length, "condition": condition.name}
    for depth in depths:
        found = condition.cell(length, depth)
        made[f"depth {depth:g}"] = f"{found.found} of {found.n}"
    return made


def _bin(result: Any, shown: Any, i: int) -> dict[str, Any]:
    here = result.base.bins[i]
    last = here.stop - 1
    name = f"{here.start}-{last}" if last > here.start else str(here.start)
    made: dict[str, Any] = {"position": name, "tokens": here.tokens, "base": here.loss.value}
    for condition in shown[1:]:
        delta = condition.bins[i].delta
        made[condition.name] = _change(delta).strip()
    return made


def _change(delta: Any) -> str:
    if delta is None:
        return ""
    text = f" {delta.value:+.3g}"
    if delta.interval is not None:
        text += f" ({delta.interval[0]:+.3g} to {delta.interval[1]:+.3g})"
    return text
