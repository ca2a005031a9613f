"""The tables of a weights-only scan and of a reach."""

from __future__ import annotations

from collections.abc import Iterator

from melens.cli.listing import Listing, table_of
from melens.protocols import JsonObject
from melens.results.reach import Reach, ReachRow, ReachToken
from melens.results.scan import Candidate, LayerCeiling, TriedToken, WeightScan

MOST = 12
"""Candidates that the table lists; the JSON has all."""
PATHS = {
    "gated": "norm, then a gated FFN",
    "plain": "norm, then an FFN without a gate",
    "after a norm": "one neuron alone, through the norm behind the FFN",
}
ROLES = {"emerge": ("makes", "may make"), "erase": ("erases", "may erase"), "other": ("-", "-")}
"""Of neurons whose sign is known, and of others."""


@table_of("scan")
def _scan(result: WeightScan) -> Iterator[Listing]:
    paths = sorted({PATHS[row.path] for row in result.profile if row.path is not None})
    yield Listing(
        f"The highest neuron of each layer, by what it could write ({'; '.join(paths)}):",
        [_layer(row) for row in result.profile],
    )
    for row in result.profile:
        if not row.covered:
            yield Listing(f"Layer {row.layer} is not covered: {row.reason}.")
    if result.candidates:
        shown = sorted(result.candidates, key=lambda found: -found.ratio_to_median)[:MOST]
        yield Listing(
            "\nCandidates; an entry is down_proj.weight[dim, neuron], and its ceiling is what its "
            "neuron could write through it:",
            [_candidate(found) for found in shown],
            optional=("needs most",),
        )
        if (more := len(result.candidates) - len(shown)) > 0:
            yield Listing(f"({more} more in the JSON.)")
    if result.seen is not None:
        yield Listing(
            "\nFirst tokens in the predicted coordinates, each alone at position 0 (layers "
            f"{result.seen.layer} to {result.seen.until}; above {result.seen.needed:g} is needed):",
            [
                _token(token) | {"x own median": token.times}
                for token in sorted(result.seen.tokens, key=_by_size)
            ],
        )
    yield Listing(
        "\nRule: a neuron whose ceiling stands out names the layer, unless first tokens that were "
        "run deny it (in full: --explain)."
    )
    yield Listing(f"No bound here for: {'; '.join(result.leaves_out)}.\n")


def _by_size(token: TriedToken | ReachToken) -> float:
    return -abs(token.value)


def _token(token: TriedToken | ReachToken) -> JsonObject:
    return {
        "id": token.token_id,
        "token": repr(token.token),
        "why": token.why,
        "value": token.value,
        "dim": token.dim,
        "layer": token.layer,
    }


def _layer(row: LayerCeiling) -> JsonObject:
    made = {
        "layer": row.layer,
        "ceiling": row.ceiling,
        "x median": row.ratio_to_median,
        "neuron": _neuron(row),
        "dim": row.dim,
        "sign": _sign(row.sign),
    }
    return made if row.whole is None else made | {"whole FFN": row.whole, "at dim": row.whole_dim}


def _candidate(found: Candidate) -> JsonObject:
    from melens.scanning.predict import decided

    needs = zip(found.needs.dims[:3], found.needs.weights[:3], strict=True)
    return {
        "layer": found.layer,
        "neuron": _neuron(found),
        "dim": found.dim,
        "entry": found.value,
        "ceiling": found.ceiling,
        "x median": found.ratio_to_median,
        "cosine": found.cosine,
        "sign": _sign(found.sign),
        "": ROLES[found.role][not decided(found)],
        "needs most": ", ".join(f"{dim}: {weight:+.2f}" for dim, weight in needs),
    }


def _neuron(row: LayerCeiling | Candidate) -> int | str | None:
    return row.neuron if row.expert is None else f"{row.neuron} (expert {row.expert})"


def _sign(sign: int | None) -> str | None:
    return None if sign is None else "+" if sign > 0 else "-"


@table_of("reach")
def _reach(result: Reach) -> Iterator[Listing]:
    yield Listing(
        "First tokens, each alone at position 0 (layers count from 0, at the block output):",
        [_token(token) for token in sorted(result.tokens, key=_by_size)],
    )
    scanned = any(row.ceiling for row in result.profile)
    yield Listing(
        "\nLayers, the largest over these tokens:",
        [_reach_layer(row, scanned=scanned) for row in result.profile],
    )
    yield Listing("")


def _reach_layer(row: ReachRow, *, scanned: bool) -> JsonObject:
    made = {
        "layer": row.layer,
        "value": row.value,
        "dim": row.dim,
        "token": row.token_id,
        "FFN writes": row.write,
        "in dim": row.write_dim,
    }
    if scanned:
        made |= {"ceiling": row.ceiling, "of dim": row.ceiling_dim, "used": row.used}
    return made
