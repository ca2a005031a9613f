"""The rows of a Difference: one small function a kind of comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from melens.comparing.sides import Side
from melens.errors import ResultError
from melens.results import MELayer
from melens.results.check import CheckReport
from melens.results.diff import Change, SideRow, Value
from melens.results.sinks import USUAL_EPS, Sinks

if TYPE_CHECKING:
    from torch import Tensor

    from melens.results import Result


@dataclass(frozen=True)
class Tolerances:
    """Bounds of ``diff``; layers, tokens, dimensions and verdicts must be equal."""

    value: float = 0.1
    """Relative change of the massive value. The same weights in bf16 move it by up to 3 %, 4-bit
    weights by 1 to 2 % (docs/definitions.md); a tenth is beyond both."""
    share: float = 0.1
    """Absolute change of a share in [0, 1]: the writer's and the sinks'."""
    cosine: float = 0.99
    """Least cosine of the massive token's direction; the criterion ``direction`` uses the same."""
    profile: float = 2.0
    """Factor by which the largest |x| of any one layer may differ: it is an extreme value, so far
    less sure than the massive one."""

    def __post_init__(self) -> None:
        """Refuse bounds that would call everything, or nothing, a change."""
        fits = 0 < self.value < 1 and 0 < self.share < 1 and 0 < self.cosine < 1
        if not fits or self.profile <= 1:
            raise ResultError(
                "tolerances: value, share and cosine lie between 0 and 1, profile above 1; got "
                f"{self.value}, {self.share}, {self.cosine}, {self.profile}."
            )


PLATEAU = "not judged: the peak may move along a plateau"
OTHER_DEPTH = "not judged: the models have another number of layers"


def equal(what: str, a: Value, b: Value, *, why_not: str = "") -> Change:
    """Two things that must be the same; ``why_not`` = shown, but not judged."""
    changed = None if why_not else a != b
    return Change(what=what, a=a, b=b, changed=changed, measure="equal", note=why_not)


def ratio(what: str, a: float, b: float, tolerance: float) -> Change:
    """Two sizes; a change of sign is a change."""
    value = b / a if a else None
    changed = a != b if value is None else abs(value - 1) > tolerance
    return Change(
        what=what, a=a, b=b, changed=changed, measure="ratio", value=value, tolerance=tolerance
    )


def difference(what: str, a: float | None, b: float | None, tolerance: float) -> Change:
    """Two shares in [0, 1]; one that is missing is shown, not judged."""
    if a is None or b is None:
        return equal(what, a, b, why_not="" if a is b else "not judged: one of them has none")
    return Change(
        what=what,
        a=a,
        b=b,
        changed=abs(b - a) > tolerance,
        measure="difference",
        value=b - a,
        tolerance=tolerance,
    )


def shape_rows(a: Side, b: Side) -> Iterator[Change]:
    """Layers, width and vocabulary, as far as both are known."""
    yield equal("number of layers", a.located.n_layers, b.located.n_layers)
    if a.width and b.width:
        yield equal("d_model", a.width[0], b.width[0])
        yield equal("vocabulary size", a.width[1], b.width[1])


def layer_rows(a: MELayer, b: MELayer) -> Iterator[Change]:
    """Verdict and layers; by number only where both models have as many."""
    deep = "" if a.n_layers == b.n_layers else OTHER_DEPTH
    yield equal("verdict", a.verdict, b.verdict)
    yield equal("ME Layer", a.me_layer, b.me_layer, why_not=deep)
    yield equal("main step", a.main_layer, b.main_layer, why_not=deep)
    yield equal("erase layer", a.erase_layer, b.erase_layer, why_not=deep)
    yield equal("peak layer", a.peak_layer, b.peak_layer, why_not=deep or PLATEAU)
    stages = (", ".join(str(stage.layer) for stage in side.stages) or None for side in (a, b))
    yield equal("stages at layers", next(stages), next(stages), why_not=deep)
    moved = [
        f"{name} {first} -> {second}"
        for (name, first), (_, second) in zip(a.criteria, b.criteria, strict=True)
        if first != second
    ]
    if moved and not deep:
        yield equal(
            "criteria that answer otherwise",
            None,
            "; ".join(moved),
            why_not="not judged: criteria disagree within one model too",
        )
    yield equal(
        "confidence in one layer",
        a.confidence,
        b.confidence,
        why_not="not judged: it follows the rest",
    )


def token_rows(a: MELayer, b: MELayer, limits: Tolerances) -> Iterator[Change]:
    """The primary massive token; nothing where neither or only one has one."""
    if not a.massive or not b.massive:
        return
    first, second = a.massive[0], b.massive[0]
    yield equal("token", first.token, second.token)
    yield equal("token's position", first.position, second.position)
    yield equal("dimension", first.dim, second.dim)
    yield ratio("massive value", first.value, second.value, limits.value)
    others = [
        sorted({f"{token.token!r} in {token.dim}" for token in side.massive[1:]}) for side in (a, b)
    ]
    if others[0] != others[1]:
        yield equal(
            "further massive tokens",
            "; ".join(others[0][:6]) or None,
            "; ".join(others[1][:6]) or None,
            why_not="not judged: those near the threshold come and go",
        )
    if a.writer and b.writer:
        yield difference("FFN's part of the write", a.writer.ffn, b.writer.ffn, limits.share)


def direction_rows(a: Side, b: Side, limits: Tolerances) -> Iterator[Change]:
    """Cosine of the massive tokens, each at its own peak; only where both vectors are at hand."""
    if a.steps is None or b.steps is None or a.steps.shape[1] != b.steps.shape[1]:
        return
    one, two = a.steps[a.located.peak_layer or 0], b.steps[b.located.peak_layer or 0]
    value = _cosine(one, two)
    yield Change(
        what="massive token's direction",
        a=None,
        b=None,
        changed=value < limits.cosine,
        measure="cosine",
        value=value,
        tolerance=limits.cosine,
    )


def profile_rows(a: Side, b: Side) -> tuple[SideRow, ...]:
    """Both layer profiles, side by side."""
    first, second = a.located.profile, b.located.profile
    angles = _angles(a, b)
    made = []
    for layer in range(max(len(first), len(second))):
        one = first[layer] if layer < len(first) else None
        two = second[layer] if layer < len(second) else None
        both = one is not None and two is not None and one.max > 0
        made.append(
            SideRow(
                layer=layer,
                max_a=one.max if one else None,
                max_b=two.max if two else None,
                ratio=two.max / one.max if both and one and two else None,
                share_a=one.write_share if one else None,
                share_b=two.write_share if two else None,
                cosine=angles[layer] if angles else None,
            )
        )
    return tuple(made)


def profile_change(
    rows: tuple[SideRow, ...], limits: Tolerances, *, why_not: str = ""
) -> Iterator[Change]:
    """The layer whose largest |x| differs most: first one that is 0 in one of the two alone."""
    known = [row for row in rows if row.max_a is not None and row.max_b is not None]
    if not known:
        return
    worst = max(known, key=_factor)
    where = f"layer {worst.layer}, where it differs most"
    yield Change(
        what="largest |x| of a layer",
        a=worst.max_a,
        b=worst.max_b,
        measure="factor",
        value=1.0 if worst.max_a == worst.max_b else worst.ratio,
        changed=None if why_not else _factor(worst) > limits.profile,
        tolerance=None if why_not else limits.profile,
        note=f"{where}; {why_not}" if why_not else where,
    )


def _factor(row: SideRow) -> float:
    """How many times the larger is the smaller; infinite where only one of them is 0."""
    if row.max_a == row.max_b:
        return 1.0
    return max(row.ratio, 1 / row.ratio) if row.ratio else math.inf


def report_rows(
    a: CheckReport | None, b: CheckReport | None, limits: Tolerances
) -> Iterator[Change]:
    """What two reports of ``melens check`` add: sinks and findings."""
    if a is None or b is None:
        return
    if "sinks" in a.results and "sinks" in b.results:
        yield from _sink_rows(a.result("sinks"), b.result("sinks"), limits)
    if a.policy != b.policy:
        yield equal(
            "policy", a.policy.name, b.policy.name, why_not="other thresholds: findings not judged"
        )
        return
    yield equal("check's verdict", a.verdict, b.verdict, why_not="not judged: it follows the rules")
    second = {rule.id: rule.status for rule in b.rules}
    for rule in a.rules:
        now = second.get(rule.id, "not measured")
        if rule.status != now:
            unknown = {rule.status, now} & {"not measured", "off"}
            why_not = "not judged: not measured in both" if unknown else ""
            yield equal(f"rule {rule.id}", rule.status, now, why_not=why_not)


def _sink_rows(a: Result, b: Result, limits: Tolerances) -> Iterator[Change]:
    assert isinstance(a, Sinks)
    assert isinstance(b, Sinks)
    what = f"share of heads with a sink (eps {USUAL_EPS})"
    yield difference(what, a.usual_rate, b.usual_rate, limits.share)
    deep = "" if a.n_layers == b.n_layers else OTHER_DEPTH
    yield equal("first layer with sinks", a.onset_layer, b.onset_layer, why_not=deep)


def _angles(a: Side, b: Side) -> list[float] | None:
    """Cosine by layer, of one token of one text in two models of one shape."""
    if a.steps is None or b.steps is None or a.prefix != b.prefix or a.steps.shape != b.steps.shape:
        return None
    return [_cosine(one, two) for one, two in zip(a.steps, b.steps, strict=True)]


def _cosine(one: Tensor, two: Tensor) -> float:
    from melens.metrics import cosines  # which loads torch: two saved results need none

    return cosines(one[None], two).item()
