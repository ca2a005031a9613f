"""The table of a tune result."""

from __future__ import annotations

from typing import Any

from melens.cli.output import say, table
from melens.cli.tables import TABLES

LISTED = 12


@TABLES.register("tune")
def _tune(result: Any) -> None:
    better = "higher" if result.higher_is_better else "lower"
    say(f"Rule: {result.rule}.")
    say(
        f"\nDevelopment, differences to the unedited model in {result.unit} ({better} is better), "
        "95 % for each alone:"
    )
    ranked = sorted(result.trials, key=lambda trial: -result.sign * trial.delta)
    table([_trial(trial) for trial in ranked[:LISTED]])
    if len(ranked) > LISTED:
        say(f"... and {len(ranked) - LISTED} more in the JSON")
    if result.confirmed:
        say(f"\nHeld out, {result.confirmed[0].items} other items (unedited {result.base:.4g}):")
        table([_confirmed(row) for row in result.confirmed])
    if result.best is not None:
        say(f"\nTo use it: {flags(result.best)}")
    say("")


def flags(edit: Any) -> str:
    """The options under which other commands take this mask."""
    layers = edit.layers if isinstance(edit.layers, str) else ",".join(map(str, edit.layers))
    return (
        f"--mask-select {edit.select} --mask-rate {edit.rate:g} --mask-strength "
        f"{edit.strength:g} --mask-layers {layers}"
    )


def _trial(trial: Any) -> dict[str, Any]:
    return {
        "setting": trial.edit.label, "items": trial.items,
        "difference": f"{trial.delta:+.4g}{_within(trial.interval)}",
        "masked energy": _percent(trial.energy),
        "stopped": "-" if trial.stopped_after is None else f"rung {trial.stopped_after}",
        "": "control" if trial.role == "control" else "",
    }  # fmt: skip


def _confirmed(row: Any) -> dict[str, Any]:
    return {
        "setting": row.edit.label, "difference": f"{row.delta:+.4g}{_within(row.interval)}",
        "corrected": _within(row.corrected).strip(" ()") or "-",
        "optimism": "-" if row.optimism is None else f"{row.optimism:+.4g}",
        "masked energy": _percent(row.energy), "": "control" if row.role == "control" else "",
    }  # fmt: skip


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _within(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:+.3g} to {interval[1]:+.3g})"
