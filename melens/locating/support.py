"""How many independent observations stand behind a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from melens.framing import repeated_rows, unknown_rows
from melens.locating import thresholds as limits
from melens.locating.criteria import Evidence, cumulative_layer
from melens.locating.profile import SequenceRow
from melens.locating.trajectory import Path
from melens.results.locate import FirstToken, Stability


@dataclass(frozen=True)
class Texts:
    """What the texts can tell, one flag a sequence."""

    first_ids: int
    """Distinct first tokens of the texts that are not unknown throughout."""
    unknown: tuple[bool, ...]
    """Nothing but unknown tokens: no evidence for anything."""
    repeated: tuple[bool, ...]
    """Mostly a few tokens over and over: no evidence that nothing stands out."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], tokenizer: object) -> Texts:
        """Look at token ids, padding dropped."""
        unknown = tuple(unknown_rows(rows, tokenizer))
        first = {row[0] for row, empty in zip(rows, unknown, strict=True) if not empty}
        return cls(len(first), unknown, tuple(repeated_rows(rows)))

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
    """  # fmt: skip
    steps = evidence.steps
    last = limits.last_body_layer(len(steps) - 1)
    ordinary = Evidence([texts.varied(rows) for rows in steps], evidence.path)
    tried = [_first_token(ordinary, path, decode) for path in probed]
    if traced:
        answers = [cumulative_layer(evidence, path, limits.FIRST_SHARE) for path in traced]
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
        me_layer=cumulative_layer(evidence, path, limits.FIRST_SHARE) if massive else None,
        value=path.entry(path.peak)[1],
    )


def massive_alone(path: Path, medians: Sequence[float], ratios: Tensor) -> bool:
    """Sun et al.'s rule and the norm ratio, before the final window, for one token by itself.

    Args:    medians: median |x| of the texts, by layer.
             ratios: the token's norm over the texts' median token norm, by step.
    """
    tops = path.resid[1:].abs().amax(dim=-1).tolist()
    return any(
        tops[layer] > max(limits.SUN_ABSOLUTE, limits.SUN_RATIO * medians[layer])
        and ratios[layer + 1] >= limits.NORM_RATIO
        for layer in range(limits.last_body_layer(path.n_layers) + 1)
    )


def mean(values: Sequence[float]) -> float:
    """Mean that does not depend on the order of the values."""
    return sum(sorted(values)) / len(values)
