"""Everything measured -> the frozen MELayer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from melens.locating import thresholds as limits
from melens.locating.criteria import CRITERIA, Evidence, counted_shares, cumulative_layer
from melens.locating.final import final_growth
from melens.locating.profile import Nearest, SequenceRow
from melens.locating.stages import Span, spans
from melens.locating.support import Texts, gather_support, mean
from melens.locating.tokens import Group
from melens.locating.trajectory import Path
from melens.locating.verdict import agreement, shape_of, stability
from melens.metrics import effective_number
from melens.provenance import RunInfo
from melens.results.locate import (
    Criteria,
    Cumulative,
    LayerRow,
    MassiveToken,
    MELayer,
    Missed,
    NearestMiss,
    Stability,
    Stage,
    Writer,
)

Steps = Sequence[Sequence[SequenceRow]]
Decode = Callable[[int], str]


def assemble(
    steps: Steps,
    paths: Mapping[Group, Path | None],
    probed: Sequence[Path],
    *,
    texts: Texts,
    decode: Decode,
    run: RunInfo,
) -> MELayer:
    """Put one result together.

    Args:    steps: rows of the first pass, the embedding first.
             paths: massive tokens, the primary one first, with the trajectories of those traced.
             probed: trajectories of other first tokens.
             texts: which sequences are evidence, and for what.
    """  # fmt: skip
    path = next(iter(paths.values()), None)
    evidence = Evidence(steps, path)
    criteria = Criteria(**{name: rule(evidence) for name, rule in CRITERIA.items()})
    traced = [found for found in paths.values() if found is not None]
    support = gather_support(evidence, traced, probed, texts=texts, decode=decode)
    shape = _nothing(evidence, support, texts, decode)
    if path is not None:
        shape = _emergence(evidence, path, criteria, support)
    shape["confidence"] *= texts.telling(none=path is None)
    return MELayer(
        n_layers=len(steps) - 1,
        criteria=criteria,
        massive=_massive(list(paths), decode),
        final_layer_growth=final_growth(steps, path),
        stability=support,
        profile=_profile(steps, path),
        run=run,
        **shape,
    )


def _emergence(
    evidence: Evidence, path: Path, criteria: Criteria, support: Stability
) -> dict[str, Any]:
    ratios = evidence.norm_ratios(path)
    stages = spans(path, ratios)
    start, counted = counted_shares(evidence, path)
    me_layer = criteria.first_share
    assert me_layer is not None
    sure = agreement(criteria, me_layer) * stability(support.agreeing, support.observations)
    embedded = torch.tensor([path.embedding_share], dtype=path.shares.dtype)
    return {
        "verdict": shape_of(counted, stages, path.peak),
        "me_layer": me_layer,
        "main_layer": criteria.write_share,
        "effective_layers": effective_number(torch.cat([embedded, path.shares[: path.peak + 1]])),
        "confidence": sure * min(1.0, counted.max().item()),
        "cumulative": Cumulative(
            p10=cumulative_layer(evidence, path, 0.1),
            p50=cumulative_layer(evidence, path, 0.5),
            p90=cumulative_layer(evidence, path, 0.9),
        ),
        "stages": tuple(_stage(path, ratios.tolist(), span) for span in stages),
        "peak_layer": path.peak,
        "erase_layer": _erase_layer(path),
        "writer": _writer(path, max(start, 0)),
    }


def _nothing(
    evidence: Evidence, support: Stability, texts: Texts, decode: Decode
) -> dict[str, Any]:
    """A ``none``: sure where no token came near to being massive, in the texts or alone."""
    if all(texts.repeated):
        return {"verdict": "none", "confidence": 0.0}
    body = evidence.layers[: limits.last_body_layer(len(evidence.layers)) + 1]
    seen = [(at, row.nearest) for at, rows in enumerate(body) for row in texts.varied(rows)]
    layer, nearest = max(seen, key=lambda pair: pair[1].closeness)
    sure = (1 - nearest.closeness) * stability(support.agreeing, support.observations)
    return {
        "verdict": "none",
        "confidence": sure,
        "nearest": _nearest_miss(layer, nearest, decode),
    }


def _nearest_miss(layer: int, near: Nearest, decode: Decode) -> NearestMiss:
    """What the nearest coordinate has, and each threshold that it does not pass."""
    hit, size = near.hit, abs(near.hit.value)
    times = size / near.median if near.median else None
    missed = []
    if size <= limits.SUN_ABSOLUTE:
        missed.append(Missed(threshold="absolute", value=size, needed=limits.SUN_ABSOLUTE))
    if times is not None and times <= limits.SUN_RATIO:
        missed.append(Missed(threshold="median", value=times, needed=limits.SUN_RATIO))
    if near.norm_ratio < limits.NORM_RATIO:
        missed.append(Missed(threshold="norm", value=near.norm_ratio, needed=limits.NORM_RATIO))
    if near.sharing > near.most:
        missed.append(Missed(threshold="sharing", value=near.sharing, needed=near.most))
    return NearestMiss(
        layer=layer, position=hit.position, token_id=hit.token_id, token=decode(hit.token_id),
        dim=hit.dim, value=hit.value, median_ratio=times, norm_ratio=near.norm_ratio,
        missed=tuple(missed),
    )  # fmt: skip


def _stage(path: Path, ratios: list[float], span: Span) -> Stage:
    """A stage's main step: the largest increase along its own peak direction."""
    end = path.resid[span.peak + 1]
    along = path.resid @ end / end.norm()
    steps = along.diff()[span.start : span.peak + 1]
    dim, value = path.entry(span.peak)
    until = path.n_layers if span.erased_at is None else span.erased_at
    return Stage(
        layer=span.start + int(steps.argmax()),
        peak=abs(value),
        peak_layer=span.peak,
        norm_ratio=max(ratios[span.start + 1 : until + 1]),
        position=path.position,
        dim=dim,
        erased_at=span.erased_at,
    )


def _erase_layer(path: Path) -> int | None:
    after = path.shares[path.peak + 1 :]
    if not len(after) or after.min() > -limits.ERASE_SHARE:
        return None
    return path.peak + 1 + int(after.argmin())


def _writer(path: Path, start: int) -> Writer | None:
    """Who wrote it; None where the blocks together added less than a tenth: it was embedded."""
    part = slice(start, path.peak + 1)
    mixer = path.part_shares(path.mixer)[part].sum().item()
    ffn = path.part_shares(path.ffn)[part].sum().item()
    if mixer + ffn < limits.FIRST_SHARE:
        return None
    return Writer(attention=mixer / (mixer + ffn), ffn=ffn / (mixer + ffn))


def _massive(groups: Sequence[Group], decode: Decode) -> tuple[MassiveToken, ...]:
    """One row a token and massive dimension."""
    return tuple(
        MassiveToken(
            position=group.position,
            token_id=group.token_id,
            token=decode(group.token_id),
            dim=entry.dim,
            value=entry.value,
            frequency=entry.frequency,
        )
        for group in groups
        for entry in group.entries
    )


def _profile(steps: Steps, path: Path | None) -> tuple[LayerRow, ...]:
    shares = path.shares.tolist() if path is not None else None
    made = []
    for layer, rows in enumerate(steps[1:]):
        largest = max(rows, key=lambda row: (row.max, -row.top.position, -row.top.dim))
        made.append(
            LayerRow(
                layer=layer,
                max=largest.max,
                median=mean([row.median for row in rows]),
                token_median=largest.token_median,
                norm_ratio=mean([row.norm_ratio for row in rows]),
                median_norm=mean([row.median_norm for row in rows]),
                position=largest.top.position,
                dim=largest.top.dim,
                value=largest.top.value,
                write_share=shares[layer] if shares is not None else None,
            )
        )
    return tuple(made)
