"""The table of a census."""

from __future__ import annotations

from collections.abc import Iterator

from melens.cli.listing import Listing, table_of
from melens.protocols import JsonObject
from melens.results.census import Census, CensusRow

OPTIONAL = ("dims", "sink rate", "largest |x|", "parameters")
MOST_DIMS = 4


@table_of("census")
def _census(result: Census) -> Iterator[Listing]:
    found = [row for row in result.models if row.error is None]
    if found:
        yield Listing(
            "ME Layers, from 0, at the block output; depth = layer / (layers - 1):",
            [_row(row) for row in found],
            optional=OPTIONAL,
        )
    for row in found:
        if row.off is not None:
            yield Listing(f"{row.name} is not as published: {row.off}.")
        if row.note is not None:
            yield Listing(f"{row.name}: {row.note}")
    for row in result.failed:
        yield Listing(f"{row.name} failed: {row.error}")
    yield Listing("")


def _row(row: CensusRow) -> JsonObject:
    shown = ", ".join(map(str, row.dims[:MOST_DIMS])) + ", ..." * (len(row.dims) > MOST_DIMS)
    return {
        "model": row.name,
        "family": row.family,
        "parameters": size(row.parameters),
        "ME Layer": f"{'none' if row.me_layer is None else row.me_layer} of {row.n_layers}",
        "depth": None if row.depth is None else f"{row.depth:.2f}",
        "verdict": row.verdict or row.how,
        "dims": shown or None,
        "largest |x|": row.largest,
        "sink rate": row.sink_rate,
        "published": row.published,
        "match": row.match,
    }


def size(parameters: int | None) -> str | None:
    """A number of parameters, as models are called."""
    if parameters is None:
        return None
    if parameters >= 1e9:
        return f"{parameters / 1e9:.3g}B"
    return f"{parameters / 1e6:.3g}M" if parameters >= 1e6 else f"{parameters:,}"
