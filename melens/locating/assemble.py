"""From everything measured to the verdict, how sure it is, and the frozen MELayer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from melens.framing import repeated_rows, unknown_rows
from melens.locating.criteria import (
    CRITERIA,
    Evidence,
    StageSpan,
    counted_shares,
    cumulative_layer,
    spans,
)
from melens.locating.profile import Entry, Group, Nearest, SequenceRow
from melens.locating.thresholds import (
    ERASE_SHARE,
    FINAL_FACTOR,
    FIRST_SHARE,
    SINGLE_EFFECTIVE,
    SINGLE_SHARE,
    STEP_SHARE,
    STEPS_MOST,
    STEPS_SHARE,
    last_body_layer,
)
from melens.locating.trajectory import Path
from melens.metrics import effective_number
from melens.metrics.magnitude import NORM_RATIO, SUN_ABSOLUTE, SUN_RATIO
from melens.protocols import JsonObject, Tokenizer
from melens.provenance import RunInfo
from melens.results.locate import (
    Criteria,
    Cumulative,
    FinalGrowth,
    FirstToken,
    LayerRow,
    MassiveToken,
    MELayer,
    Missed,
    NearestMiss,
    Stability,
    Stage,
    Verdict,
    Writer,
)


def final_growth(steps: Sequence[Sequence[SequenceRow]], path: Path | None) -> FinalGrowth | None:
    """The largest jump inside the final window that the massive token's dimension does not explain.

    Both the largest |x| of all tokens and that of ordinary ones are followed, since a massive
    token can hide what the others do.
    """
    own = (path.position, path.entry(path.peak)[0]) if path is not None else None
    jumps: list[tuple[float, int, Entry]] = []
    for kind in ("top", "ordinary"):
        tops = [max((getattr(row, kind) for row in rows), key=_size) for rows in steps]
        for layer in range(last_body_layer(len(steps) - 1) + 1, len(steps) - 1):
            before, here = tops[layer], tops[layer + 1]
            factor = _size(here) / max(_size(before), 1e-30)
            if factor >= FINAL_FACTOR and (here.position, here.dim) != own:
                jumps.append((factor, layer, here))
    if not jumps:
        return None
    factor, layer, here = max(jumps, key=lambda jump: jump[0])
    return FinalGrowth(
        layer=layer, factor=factor, position=here.position, dim=here.dim, value=here.value
    )


def _size(entry: Entry) -> float:
    return abs(entry.value)


def shape_of(counted: Tensor, stages: Sequence[StageSpan], peak: int) -> Verdict:
    """How a massive token emerged.

    Args:    counted: write shares from the first counted layer to the peak.
             stages: all of the token's stages, in order.
             peak: the token's peak layer.
    """
    if any(stage.erased_at is not None and stage.erased_at <= peak for stage in stages):
        return "re-emergent"
    largest = counted.max().item()
    if largest >= SINGLE_SHARE and effective_number(counted) < SINGLE_EFFECTIVE:
        return "single"
    steps = counted[counted >= STEP_SHARE].sort(descending=True).values
    if 2 <= len(steps) <= STEPS_MOST and steps.sum() >= STEPS_SHARE:
        return "multi-step"
    return "gradual"


def agreement(criteria: Criteria, me_layer: int) -> float:
    """Share of the criteria with an answer that name the ME Layer."""
    answers = [answer for answer in criteria.model_dump().values() if answer is not None]
    return sum(answer == me_layer for answer in answers) / len(answers)


def stability(agreeing: int, observations: int) -> float:
    """(k + 1) / (n + 2): k of n independent observations agree (Laplace's rule of succession).

    One observation, however many texts repeat it, gives 2/3 at most.
    """
    return (agreeing + 1) / (observations + 2)


Steps = Sequence[Sequence[SequenceRow]]


@dataclass(frozen=True)
class Texts:
    """What the texts can tell, one flag a sequence."""

    first_ids: int
    """Distinct first tokens of the texts that are evidence for a ``none``."""
    unknown: tuple[bool, ...]
    """Nothing but unknown tokens: no evidence for anything."""
    repeated: tuple[bool, ...]
    """Others that are mostly a few tokens over and over, and large: no evidence that nothing stands
    out, for the median may be massive itself."""

    @classmethod
    def of(cls, ids: Sequence[Sequence[int]], steps: Steps, tokenizer: Tokenizer | None) -> Texts:
        """Look at token ids, padding dropped, and at the size of what they become."""
        unknown = tuple(unknown_rows(ids, tokenizer))
        body = steps[1 : last_body_layer(len(steps) - 1) + 2]
        repeated = tuple(
            again and not empty and max(rows[i].max for rows in body) > SUN_ABSOLUTE
            for i, (again, empty) in enumerate(zip(repeated_rows(ids), unknown, strict=True))
        )
        mute = map(any, zip(unknown, repeated, strict=True))
        first = {row[0] for row, flag in zip(ids, mute, strict=True) if not flag}
        return cls(len(first), unknown, repeated)

    def varied(self, rows: Sequence[SequenceRow]) -> list[SequenceRow]:
        """Rows of the sequences that are not repeated; all where every one is."""
        kept = [row for row, flag in zip(rows, self.repeated, strict=True) if not flag]
        return kept or list(rows)

    def telling(self, *, none: bool) -> float:
        """Share of the sequences that are evidence for a verdict."""
        mute = [u or (none and r) for u, r in zip(self.unknown, self.repeated, strict=True)]
        return 1 - sum(mute) / len(mute)


def gather_support(
    evidence: Evidence,
    traced: Sequence[Path],
    probed: Sequence[Path],
    *,
    texts: Texts,
    decode: Callable[[int], str],
) -> Stability:
    """Every distinct massive token, and every first token tried alone, is one observation.

    Where no token is massive, every distinct first token of the texts is one, and a token that
    turns massive alone speaks against.
    """
    steps = evidence.steps
    last = last_body_layer(len(steps) - 1)
    ordinary = Evidence([texts.varied(rows) for rows in steps], evidence.path)
    tried = [_first_token(ordinary, path, decode) for path in probed]
    if traced:
        answers = [cumulative_layer(evidence, path, FIRST_SHARE) for path in traced]
        agreeing = sum(answer == answers[0] for answer in answers)
        alone = [token.me_layer for token in tried if token.massive]
        agreeing += sum(answer == answers[0] for answer in alone)
        observations = len(answers) + len(alone)
    else:
        agreeing = texts.first_ids + sum(not token.massive for token in tried)
        observations = texts.first_ids + len(tried)
    massive = sum(
        any(steps[layer + 1][i].hits for layer in range(last + 1)) for i in range(len(steps[0]))
    )
    return Stability(
        observations=observations,
        agreeing=agreeing,
        sequences=len(steps[0]),
        sequences_massive=massive,
        first_tokens=tuple(tried),
    )


def _first_token(evidence: Evidence, path: Path, decode: Callable[[int], str]) -> FirstToken:
    """Is a token massive alone? Held against the medians of the texts' own tokens."""
    ratios = evidence.norm_ratios(path)
    medians = [mean([row.median for row in rows]) for rows in evidence.layers]
    massive = massive_alone(path, medians, ratios)
    return FirstToken(
        token_id=path.token_id,
        token=decode(path.token_id),
        massive=massive,
        me_layer=cumulative_layer(evidence, path, FIRST_SHARE) if massive else None,
        value=path.entry(path.peak)[1],
    )


def massive_alone(path: Path, medians: Sequence[float], ratios: Tensor) -> bool:
    """Sun et al.'s rule and the norm ratio, before the final window, for one token by itself.

    Args:    medians: median |x| of the texts, by layer.
             ratios: the token's norm over the texts' median token norm, by step.
    """
    tops = path.resid[1:].abs().amax(dim=-1).tolist()
    return any(
        tops[layer] > max(SUN_ABSOLUTE, SUN_RATIO * medians[layer])
        and ratios[layer + 1] >= NORM_RATIO
        for layer in range(last_body_layer(path.n_layers) + 1)
    )


def mean(values: Sequence[float]) -> float:
    """Mean that does not depend on the order of the values."""
    return sum(sorted(values)) / len(values)


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
    """
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
) -> JsonObject:
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


def _nothing(evidence: Evidence, support: Stability, texts: Texts, decode: Decode) -> JsonObject:
    """A ``none``: sure where no token came near to being massive, in the texts or alone."""
    if any(texts.repeated) and not texts.telling(none=True):
        return {"verdict": "none", "confidence": 0.0}
    body = evidence.layers[: last_body_layer(len(evidence.layers)) + 1]
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
    if size <= SUN_ABSOLUTE:
        missed.append(Missed(threshold="absolute", value=size, needed=SUN_ABSOLUTE))
    if times is not None and times <= SUN_RATIO:
        missed.append(Missed(threshold="median", value=times, needed=SUN_RATIO))
    if near.norm_ratio < NORM_RATIO:
        missed.append(Missed(threshold="norm", value=near.norm_ratio, needed=NORM_RATIO))
    if near.sharing > near.most:
        missed.append(Missed(threshold="sharing", value=near.sharing, needed=near.most))
    return NearestMiss(
        layer=layer,
        position=hit.position,
        token_id=hit.token_id,
        token=decode(hit.token_id),
        dim=hit.dim,
        value=hit.value,
        median_ratio=times,
        norm_ratio=near.norm_ratio,
        missed=tuple(missed),
    )


def _stage(path: Path, ratios: list[float], span: StageSpan) -> Stage:
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
    if not len(after) or after.min() > -ERASE_SHARE:
        return None
    return path.peak + 1 + int(after.argmin())


def _writer(path: Path, start: int) -> Writer | None:
    """Who wrote it; None where the blocks together added less than a tenth (it was embedded), and
    where a block that took part cannot be told apart.
    """  # noqa: D205
    part = slice(start, path.peak + 1)
    if path.whole is not None and path.part_shares(path.whole)[part].abs().sum() >= FIRST_SHARE:
        return None
    mixer = path.part_shares(path.mixer)[part].sum().item()
    ffn = path.part_shares(path.ffn)[part].sum().item()
    if mixer + ffn < FIRST_SHARE:
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
