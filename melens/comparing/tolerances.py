"""How far two numbers may lie apart and still count as the same. Provisional, as the verdict's."""

from __future__ import annotations

from dataclasses import dataclass

from melens.errors import ResultError


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
