"""Everything measured -> the frozen MELayer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from melens.emergence import thresholds as limits
from melens.emergence.criteria import CRITERIA, Evidence, cumulative_layer
from melens.emergence.profile import SequenceRow
from melens.emergence.stages import counted_from, spans
from melens.emergence.tokens import Group
from melens.emergence.trajectory import Path
from melens.emergence.verdict import agreement, shape_of, stability
from melens.metrics import effective_number
from melens.provenance import RunInfo
from melens.results.locate import (
    Criteria,
    Cumulative,
    FinalGrowth,
    FirstToken,
    LayerRow,
    MassiveToken,
    MELayer,
    Stability,
    Stage,
    Writer,
)

MASSIVE_LISTED = 32

Steps = Sequence[Sequence[SequenceRow]]
Decode = Callable[[int], str]


def assemble(
    steps: Steps,
    groups: Sequence[Group],
    paths: Mapping[Group, Path],
    probed: Sequence[Path],
    *,
    decode: Decode,
    run: RunInfo,
) -> MELayer:
    """Put one result together.

    Args:    steps: rows of the first pass, the embedding first.
             groups: massive tokens, the primary one first.
             paths: trajectories of those that were traced. probed: of other first tokens.
    """  # fmt: skip
    path = paths[groups[0]] if groups else None
    evidence = Evidence(steps, path)
    criteria = Criteria(**{name: rule(evidence) for name, rule in CRITERIA.items()})
    stable = _stability(evidence, paths, probed, criteria.first_share, decode)
    common = {
        "n_layers": len(steps) - 1,
        "criteria": criteria,
        "massive": _massive(groups, decode),
        "final_layer_growth": _final_growth(steps, path),
        "stability": stable,
        "profile": _profile(steps, path),
        "run": run,
    }
    shape = _nothing(evidence, stable) if path is None else _emergence(evidence, criteria, stable)
    return MELayer(**common, **shape)


def _emergence(evidence: Evidence, criteria: Criteria, stable: Stability) -> dict[str, Any]:
    path = evidence.path
    assert path is not None
    ratios = evidence.norm_ratios(path)
    stages = spans(path, ratios)
    start, peak, shares = counted_from(path, ratios), path.peak, path.shares
    counted = shares[start : peak + 1]
    verdict = shape_of(counted, stages, peak)
    me_layer = criteria.first_share if criteria.first_share is not None else criteria.write_share
    assert me_layer is not None
    sure = agreement(criteria, me_layer) * stability(stable.agreeing, stable.observations)
    sure *= min(1.0, counted.max().item())
    return {
        "verdict": verdict,
        "me_layer": me_layer,
        "main_layer": criteria.write_share,
        "effective_layers": effective_number(shares[: peak + 1]),
        "confidence": sure,
        "cumulative": Cumulative(
            p10=cumulative_layer(evidence, path, 0.1),
            p50=cumulative_layer(evidence, path, 0.5),
            p90=cumulative_layer(evidence, path, 0.9),
        ),
        "stages": tuple(_stage(path, ratios.tolist(), span) for span in stages),
        "peak_layer": peak,
        "erase_layer": _erase_layer(path),
        "writer": _writer(path, start),
    }


def _nothing(evidence: Evidence, stable: Stability) -> dict[str, Any]:
    """The fields of a ``none``: sure where no token came near to being massive."""
    last = limits.last_body_layer(len(evidence.layers))
    nearest = max(row.closeness for rows in evidence.layers[: last + 1] for row in rows)
    sure = (1 - nearest) * stability(stable.observations, stable.observations)
    return {
        "verdict": "none",
        "me_layer": None,
        "main_layer": None,
        "effective_layers": None,
        "confidence": sure,
        "cumulative": Cumulative(p10=None, p50=None, p90=None),
        "stages": (),
        "peak_layer": None,
        "erase_layer": None,
        "writer": None,
    }


def _stage(path: Path, ratios: list[float], span: Any) -> Stage:
    """A stage's main step: the largest increase along its own peak direction."""
    end = path.resid[span.peak + 1]
    along = path.resid @ end / end.norm()
    steps = along.diff()[span.start : span.peak + 1]
    dim, value = path.entry(span.peak)
    return Stage(
        layer=span.start + int(steps.argmax()),
        peak=abs(value),
        peak_layer=span.peak,
        norm_ratio=max(ratios[span.start + 1 : (span.erased_at or path.n_layers) + 1]),
        position=path.position,
        dim=dim,
        erased_at=span.erased_at,
    )


def _erase_layer(path: Path) -> int | None:
    after = path.shares[path.peak + 1 :]
    if not len(after) or after.min() > -limits.ERASE_SHARE:
        return None
    return path.peak + 1 + int(after.argmin())


def _writer(path: Path, start: int) -> Writer:
    part = slice(start, path.peak + 1)
    mixer = path.part_shares(path.mixer)[part].sum().item()
    ffn = path.part_shares(path.ffn)[part].sum().item()
    return Writer(attention=mixer / (mixer + ffn), ffn=ffn / (mixer + ffn))


def _massive(groups: Sequence[Group], decode: Decode) -> tuple[MassiveToken, ...]:
    """One row a token and massive dimension."""
    found = (
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
    return tuple(itertools.islice(found, MASSIVE_LISTED))


def _profile(steps: Steps, path: Path | None) -> tuple[LayerRow, ...]:
    shares = path.shares.tolist() if path is not None else None
    made = []
    for layer, rows in enumerate(steps[1:]):
        top = max(rows, key=lambda row: (row.max, -row.position, -row.dim))
        made.append(
            LayerRow(
                layer=layer,
                max=top.max,
                median=_mean([row.median for row in rows]),
                token_median=top.token_median,
                norm_ratio=_mean([row.norm_ratio for row in rows]),
                position=top.position,
                dim=top.dim,
                value=top.value,
                write_share=shares[layer] if shares is not None else None,
            )
        )
    return tuple(made)


def _final_growth(steps: Steps, path: Path | None) -> FinalGrowth | None:
    """The largest jump of max |x| inside the final window, unless it lies along the peak's dim."""
    tops = [max(rows, key=lambda row: row.max) for rows in steps]
    explained = path.entry(path.peak)[0] if path is not None else None
    found = None
    for layer in range(limits.last_body_layer(len(steps) - 1) + 1, len(steps) - 1):
        before, here = tops[layer], tops[layer + 1]
        factor = here.max / max(before.max, 1e-30)
        own = path is not None and here.dim == explained and here.position == path.position
        if factor >= limits.FINAL_FACTOR and not own and (found is None or factor > found.factor):
            found = FinalGrowth(
                layer=layer, factor=factor, position=here.position, dim=here.dim, value=here.value
            )
    return found


def _stability(
    evidence: Evidence, paths: Mapping[Group, Path], probed: Sequence[Path],
    me_layer: int | None, decode: Decode,
) -> Stability:  # fmt: skip
    """Every distinct massive token, and every first token tried alone, is one observation."""
    steps = evidence.steps
    tried = [_first_token(evidence, path, decode) for path in probed]
    answers = [cumulative_layer(evidence, path, limits.FIRST_SHARE) for path in paths.values()]
    answers += [token.me_layer for token in tried if token.massive]
    last = limits.last_body_layer(len(steps) - 1)
    massive = sum(
        any(steps[layer + 1][i].hits for layer in range(last + 1)) for i in range(len(steps[0]))
    )
    return Stability(
        observations=len(answers) if answers else len(tried) + len(steps[0]),
        agreeing=sum(answer == me_layer for answer in answers),
        sequences=len(steps[0]),
        sequences_massive=massive,
        first_tokens=tuple(tried),
    )


def _first_token(evidence: Evidence, path: Path, decode: Decode) -> FirstToken:
    """Is a token massive alone? Held against the medians of the texts' own tokens."""
    ratios = evidence.norm_ratios(path)
    last = limits.last_body_layer(path.n_layers)
    massive = any(
        abs(path.entry(layer)[1])
        > max(
            limits.SUN_ABSOLUTE,
            limits.SUN_RATIO * _mean([row.median for row in evidence.layers[layer]]),
        )
        and ratios[layer + 1] >= limits.NORM_RATIO
        for layer in range(last + 1)
    )
    return FirstToken(
        token_id=path.token_id,
        token=decode(path.token_id),
        massive=massive,
        me_layer=cumulative_layer(evidence, path, limits.FIRST_SHARE) if massive else None,
        value=path.entry(path.peak)[1],
    )


def _mean(values: Sequence[float]) -> float:
    return sum(sorted(values)) / len(values)
