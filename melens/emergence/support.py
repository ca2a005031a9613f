"""How many independent observations stand behind a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from melens.emergence import thresholds as limits
from melens.emergence.criteria import Evidence, cumulative_layer
from melens.emergence.trajectory import Path
from melens.results.locate import FirstToken, Stability


def gather_support(
    evidence: Evidence,
    traced: Sequence[Path],
    probed: Sequence[Path],
    *,
    first_ids: int,
    decode: Callable[[int], str],
) -> Stability:
    """Every distinct massive token, and every first token tried alone, is one observation.

    Where no token is massive, every distinct first token of the texts is one, and a token that
    turns massive alone speaks against.
    """  # fmt: skip
    steps = evidence.steps
    last = limits.last_body_layer(len(steps) - 1)
    tried = [_first_token(evidence, path, decode) for path in probed]
    if traced:
        answers = [cumulative_layer(evidence, path, limits.FIRST_SHARE) for path in traced]
        agreeing = sum(answer == answers[0] for answer in answers)
        alone = [token.me_layer for token in tried if token.massive]
        agreeing += sum(answer == answers[0] for answer in alone)
        observations = len(answers) + len(alone)
    else:
        agreeing = first_ids + sum(not token.massive for token in tried)
        observations = first_ids + len(tried)
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
    last = limits.last_body_layer(path.n_layers)
    massive = any(
        abs(path.entry(layer)[1])
        > max(
            limits.SUN_ABSOLUTE,
            limits.SUN_RATIO * mean([row.median for row in evidence.layers[layer]]),
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


def mean(values: Sequence[float]) -> float:
    """Mean that does not depend on the order of the values."""
    return sum(sorted(values)) / len(values)
