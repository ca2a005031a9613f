"""Growth in the last layers, told apart from emergence."""

from __future__ import annotations

from collections.abc import Sequence

from melens.locating import thresholds as limits
from melens.locating.profile import Entry, SequenceRow
from melens.locating.trajectory import Path
from melens.results.locate import FinalGrowth


def final_growth(steps: Sequence[Sequence[SequenceRow]], path: Path | None) -> FinalGrowth | None:
    """The largest jump inside the final window that the massive token's dimension does not explain.

    Both the largest |x| of all tokens and that of ordinary ones are followed, since a massive
    token can hide what the others do.
    """
    own = (path.position, path.entry(path.peak)[0]) if path is not None else None
    jumps: list[tuple[float, int, Entry]] = []
    for kind in ("top", "ordinary"):
        tops = [max((getattr(row, kind) for row in rows), key=_size) for rows in steps]
        for layer in range(limits.last_body_layer(len(steps) - 1) + 1, len(steps) - 1):
            before, here = tops[layer], tops[layer + 1]
            factor = _size(here) / max(_size(before), 1e-30)
            if factor >= limits.FINAL_FACTOR and (here.position, here.dim) != own:
                jumps.append((factor, layer, here))
    if not jumps:
        return None
    factor, layer, here = max(jumps, key=lambda jump: jump[0])
    return FinalGrowth(
        layer=layer, factor=factor, position=here.position, dim=here.dim, value=here.value
    )


def _size(entry: Entry) -> float:
    return abs(entry.value)
