"""The table of a super-weights result."""

from __future__ import annotations

from typing import Any

from melens.cli.output import cell, say, table
from melens.cli.tables import TABLES

SITES = {"output": "output", "write": "after the norm"}


@TABLES.register("super-weights")
def _super_weights(result: Any) -> None:
    say("Where the FFN stands out (largest |x|; in brackets, times the layer's median):")
    table([_layer(row) for row in result.profile])
    for line in result.missing:
        say(f"Not looked at: {line}")
    say(f"\nRule: {result.rule}.")
    if result.super_weights:
        say(
            f"\nRemoved one at a time; mean loss without any removed {result.base_loss:.4f} nats a "
            "token, differences paired by sequence, 95 % bootstrap:"
        )
        table([{"": result.kind_of(w), **_weight(w)} for w in result.super_weights])
        for name, group in (("All together", result.together), ("Control", result.control)):
            say(f"{name}: {group.loss_delta:+.4f}{_within(group.interval)}")
        say(f"Control removed instead: {_control(result.control)}")
    if result.known is not None and result.known.comparisons:
        say("\nPublished coordinates:")
        table(result.known.rows())
        say(result.known.convention)
    say("")


def _layer(row: Any) -> dict[str, Any]:
    made = {
        "layer": row.layer, "input": _times(row.input, row.input_median),
        "output": _times(row.output, row.output_median),
    }  # fmt: skip
    if row.write is not None:
        made["after the norm"] = _times(row.write, row.write_median)
    return made | {
        "row": row.row, "column": row.column, "position": row.position, "token": repr(row.token),
        "one weight's share": round(row.share, 3), "": row.verdict,
    }  # fmt: skip


def _weight(weight: Any) -> dict[str, Any]:
    return {
        "layer": weight.layer, "row": weight.row, "column": weight.column, "value": weight.value,
        "pass": weight.found_in, "spikes at": SITES[weight.site], "share": round(weight.share, 3),
        "position": weight.position, "token": repr(weight.token), "role": weight.role,
        "loss change": f"{weight.loss_delta:+.4f}{_within(weight.interval)}",
        "whole neuron": f"{weight.neuron_loss_delta:+.4f}",
    }  # fmt: skip


def _control(group: Any) -> str:
    rows = zip(group.weights, group.values, strict=True)
    return ", ".join(f"({', '.join(map(str, at))}) of {value:.3g}" for at, value in rows)


def _times(value: float, median: float) -> str:
    return f"{cell(value)} ({value / median:,.0f} x)" if median else f"{cell(value)} (median 0)"


def _within(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:+.4f} to {interval[1]:+.4f})"
