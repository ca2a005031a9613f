"""What a report holds of results that grow with layers times heads."""

from __future__ import annotations

from collections import defaultdict

from melens.results import Collapse, CollapseRow
from melens.results.base import Result
from melens.results.collapse import known_mean

MOST_ROWS = 10_000
"""Of a collapse with single heads: 1.6 MB of JSON. A report is e-mailed; 32 layers of 32 heads
would make 50,000.
"""


def compact(result: Result) -> Result:
    """The result as it is; a large collapse with its heads averaged, and a line that says so."""
    return compact_collapse(result) if isinstance(result, Collapse) else result


def compact_collapse(result: Collapse) -> Collapse:
    """Its rows as a report holds them."""
    if len(result.rows_) <= MOST_ROWS:
        return result
    groups: dict[tuple[int, str, str], list[CollapseRow]] = defaultdict(list)
    for row in result.rows_:
        groups[row.layer, row.site, row.definition].append(row)
    rows = tuple(
        CollapseRow(
            layer=layer,
            site=site,
            head=None,
            definition=definition,
            with_token=known_mean([row.with_token for row in held]),
            without_token=known_mean([row.without_token for row in held]),
        )
        for (layer, site, definition), held in groups.items()
    )
    said = (
        f"single heads: {len(result.rows_):,} rows are averaged over heads here; the stage's own "
        "file, stages/collapse.json, has them all"
    )
    changed = {"rows_": rows, "missing": (*result.missing, said)}
    return result.model_copy(update=changed)
