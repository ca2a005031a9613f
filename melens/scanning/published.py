"""What a scan predicts, held against published numbers of the same model."""

from __future__ import annotations

import difflib
from typing import Any

from melens.knowledge import known_models, published_rows
from melens.results.known import Comparison, KnownCheck
from melens.results.scan import WeightScan

ORDER = ("match", "mismatch", "unknown")


def known_scan(model: str, scan: WeightScan) -> KnownCheck:
    """Hold a scan's predicted layers, dimensions and entries against what was published.

    A published number that the scan does not predict is a mismatch: weights do not depend on how
    a text begins. Sizes are left out, a ceiling is none.

    Args:    model: a row's name (``org/name``, or its last part, or a named model).
    Returns: of several rows on record for a model, the one that fits best.
    """  # fmt: skip
    checks = [_check(row, model, scan) for row in published_rows(model)]
    if not checks:
        names = [name.rsplit("/", 1)[-1] for name in known_models()]
        close = difflib.get_close_matches(model.rsplit("/", 1)[-1], names, n=1)
        return KnownCheck(
            model=model, verdict="unknown", comparisons=(), source=None,
            meant=close[0] if close else None,
        )  # fmt: skip
    return min(
        checks,
        key=lambda check: (
            ORDER.index(check.verdict),
            sum(row.verdict == "mismatch" for row in check.comparisons),
        ),
    )


def _check(row: dict[str, Any], model: str, scan: WeightScan) -> KnownCheck:
    made = []
    if "me_layer" in row or row.get("steps"):
        layer = row["me_layer"] if "me_layer" in row else row["steps"][0]
        made.append(_compare("ME Layer", layer, scan.me_layer, fits=layer == scan.me_layer))
    for dim in map(int, row.get("dims", {})):
        fits = dim in scan.dims
        made.append(_compare(f"dimension {dim}", "massive", "foretold" if fits else "not foretold",
                             fits=fits))  # fmt: skip
    if "erase_layer" in row:
        layer = row["erase_layer"]
        made.append(
            _compare("erase layer", layer, scan.erase_layer, fits=layer == scan.erase_layer)
        )
    entries = {found.at for found in scan.candidates}
    for layer, dim, neuron in row.get("super_weights", ()):
        fits = (layer, dim, neuron) in entries
        made.append(_compare(
            f"down_proj entry, layer {layer}, row {dim}, column {neuron}", "super weight",
            "a candidate" if fits else "no candidate", fits=fits,
        ))  # fmt: skip
    bad = any(item.verdict == "mismatch" for item in made)
    verdict = "mismatch" if bad else "match" if made else "unknown"
    return KnownCheck(
        model=model, verdict=verdict, comparisons=tuple(made), source=row["source"]
    )  # fmt: skip


def _compare(what: str, published: Any, predicted: Any, *, fits: bool) -> Comparison:
    return Comparison(
        what=what, published="none" if published is None else str(published),
        measured="none" if predicted is None else str(predicted),
        verdict="match" if fits else "mismatch", place=True,
    )  # fmt: skip
