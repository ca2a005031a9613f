"""What an edit changed while it was open: how many tokens, in how many rows, how massive."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from melens.interventions.context import Now
from melens.interventions.massive import MassiveRule
from melens.shapes import TokenMask


@dataclass
class Span:
    """Least, mean and largest of what was seen so far."""

    count: int = 0
    total: float = 0.0
    least: float = float("inf")
    most: float = float("-inf")

    def take(self, values: Tensor) -> None:
        """Take in values of any shape, at least one."""
        self.count += values.numel()
        self.total += float(values.double().sum())
        self.least = min(self.least, float(values.min()))
        self.most = max(self.most, float(values.max()))

    @property
    def mean(self) -> float | None:
        """None where nothing was seen."""
        return self.total / self.count if self.count else None


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


@dataclass
class EditedTokens:
    """Which tokens an edit changed while it was open, and how massive they were.

    Counted once a forward pass, whatever the number of layers that the edit acts in. Coordinate
    (|x| in the massive dimension) and norm ratio (over the located texts' median norm) are read at
    the ME Layer's output, before the edit; they stay empty without a located ME Layer, and where
    the edit acts before that layer.
    """

    tokens: int = 0
    changed: bool = False
    """Whether any of them has other values than before; none has at a rate or strength of 0."""
    rows: int = 0
    """Rows of a pass with at least one edited token, summed over the passes."""
    ordinary: int = 0
    """Edited, but not massive in their pass."""
    missed: int = 0
    """Massive in a pass, but not known to be so where the edit acts (before the ME Layer)."""
    coordinate: Span = field(default_factory=Span)
    norm_ratio: Span = field(default_factory=Span)

    def take(self, chosen: TokenMask, now: Now, rule: MassiveRule | None) -> None:
        """Take in one pass; ``rule`` is None where nothing can be known of the sizes yet."""
        self.tokens += int(chosen.sum())
        self.rows += int(chosen.any(dim=1).sum())
        if rule is None:
            return
        sizes = rule.sizes(now)
        chosen = chosen.to(sizes.device)
        massive = rule(now) & now.real.to(sizes.device)
        self.ordinary += int((chosen & ~massive).sum())
        if chosen.any():
            self.coordinate.take(sizes[0][chosen])
            if rule.median_norm:
                self.norm_ratio.take(sizes[1][chosen] / rule.median_norm)

    def miss(self, chosen: TokenMask | None, now: Now, rule: MassiveRule) -> None:
        """Take in a pass that has come to the rule's layer after the edit acted."""
        massive = rule(now) & now.real.to(now.notes[rule].device)
        self.missed += int((massive if chosen is None else massive & ~chosen.to(massive)).sum())

    def summary(self) -> str:
        """What was edited, in words; layers count from 0 at the block output."""
        text = f"{_count(self.tokens, 'token')} edited in {_count(self.rows, 'row')} of all passes"
        if self.tokens and not self.changed:
            text += ", and nothing changed: every value is as it was (see rate and strength)"
        if self.coordinate.count:
            low, high = self.coordinate.least, self.coordinate.most
            text += f", massive coordinate {low:,.0f} to {high:,.0f}"
        if self.norm_ratio.count:
            low, high = self.norm_ratio.least, self.norm_ratio.most
            text += f", norm {low:.3g} to {high:.3g} x the located median"
        return f"{text}; {self.warning()}" if self.warning() else text

    def warning(self) -> str:
        """What a reader must not miss; empty where every edited token was massive."""
        parts = []
        if self.ordinary:
            parts.append(f"{self.ordinary} of {self.tokens} edited tokens were not massive")
        if self.missed:
            parts.append(
                f"{self.missed} massive tokens were not edited (before the ME Layer only first "
                "tokens are known; name the others with tokens=)"
            )
        return " and ".join(parts)
