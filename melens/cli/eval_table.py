"""The tables of an evaluation: what each condition does, and what is said beside it."""

from __future__ import annotations

from typing import Any

from melens.cli.output import cell, say, table
from melens.cli.tables import TABLES

NAMES = {"energy": "masked energy"}


@TABLES.register("evaluate")
def _evaluate(result: Any) -> None:
    better = "higher" if result.higher_is_better else "lower"
    say(
        f"{result.task}: {result.unit}, {better} is better; {result.n} items. In brackets 95 % "
        "bootstrap over items; delta = edited minus base, item by item:"
    )
    rows = result.rows()
    table([_effect(row) for row in rows])
    say("\nWhat each edit is, and further means over the same items:")
    table([_beside(row) for row in rows])
    say(f"\n{result.about}")
    if result.edited.also_delta:
        shown = ", ".join(
            f"{name.replace('_', ' ')} {found.value:+.4g}{_within(found.interval, sign='+')}"
            for name, found in result.edited.also_delta.items()
        )
        say(f"Edited minus base: {shown}.")
    say("")


def _effect(row: dict[str, Any]) -> dict[str, Any]:
    delta = row["delta"]
    return {
        "condition": row["condition"], "role": row["role"],
        "value": cell(row["value"]), "interval": _within(row["interval"]).strip() or "-",
        "delta": "-" if delta is None else f"{delta:+.4g}",
        "paired interval": _within(row["delta_interval"], sign="+").strip() or "-",
    }  # fmt: skip


def _beside(row: dict[str, Any]) -> dict[str, Any]:
    told = ("role", "value", "interval", "delta", "delta_interval")
    return {NAMES.get(name, name): value for name, value in row.items() if name not in told}


def _within(interval: tuple[float, float] | None, *, sign: str = "") -> str:
    if interval is None:
        return ""
    low, high = (f"{end:{sign}.4g}" for end in interval)
    return f" ({low} to {high})"
