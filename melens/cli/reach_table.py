"""The tables of a reach result."""

from __future__ import annotations

from typing import Any

from melens.cli.output import say, table
from melens.cli.tables import TABLES


@TABLES.register("reach")
def _reach(result: Any) -> None:
    say("First tokens, each alone at position 0 (layers count from 0, at the block output):")
    order = sorted(result.tokens, key=lambda token: -abs(token.value))
    table([
        {"id": token.token_id, "token": repr(token.token), "why": token.why, "value": token.value,
         "dim": token.dim, "layer": token.layer}
        for token in order
    ])  # fmt: skip
    say("\nLayers, the largest over these tokens:")
    table([_layer(row, scanned=any(r.ceiling for r in result.profile)) for row in result.profile])
    say("")


def _layer(row: Any, *, scanned: bool) -> dict[str, Any]:
    made = {
        "layer": row.layer, "value": row.value, "dim": row.dim, "token": row.token_id,
        "FFN writes": row.write, "in dim": row.write_dim,
    }  # fmt: skip
    if scanned:
        made |= {"ceiling": row.ceiling, "of dim": row.ceiling_dim, "used": row.used}
    return made
