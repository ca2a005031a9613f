"""AttentionMaps: what chosen heads attend to in one text, with the size of every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result, added_later

if TYPE_CHECKING:
    from melens.figures.attention_view import HtmlView


MOST_TOKENS = 128
"""A longer text is cut: a head has tokens^2 numbers."""
PAGE_BOXES = 500_000
"""Boxes of all heads together on one page, 30 heads at 128 tokens: 3 MB, and 20 seconds of drawing
for a browser on two slow cores."""
MOST_HEADS = 300
"""Heads on one page, however short the text."""


def most_heads(tokens: int) -> int:
    """How many heads one page holds for a text of so many tokens; at least one."""
    return max(1, min(MOST_HEADS, PAGE_BOXES // tokens**2))


class HeadMap(Part):
    """One head's attention. Heads are query heads, counted from 0."""

    layer: int
    head: int
    rows: tuple[tuple[float, ...], ...]
    """Row i holds query i's attention to keys 0 to i (causal), rounded to four digits."""
    learned: tuple[float, ...] = added_later(())
    """What the learned sink logit takes of each query's row; () where the layer has none."""


class TokenNorms(Part):
    """Norm of every token's residual at one layer's output, in residual units."""

    layer: int
    norms: tuple[float, ...]


class AttentionMaps(Result):
    """Attention of chosen layers and heads over one text, as numbers that can be drawn again."""

    schema_id: ClassVar[str] = "melens/attention/1"

    kind: Literal["attention"] = "attention"
    schema_: Literal["melens/attention/1"] = Field(default="melens/attention/1", alias="schema")
    tokens: tuple[str, ...]
    me_layer: int | None
    """Where massive activations emerge in this model (``melens locate``)."""
    massive_positions: tuple[int, ...]
    """Positions of massive tokens in this text."""
    heads: tuple[HeadMap, ...]
    norms: tuple[TokenNorms, ...]
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> AttentionMaps:
        """Refuse what no run can have made; figures and pages rely on it."""
        n = len(self.tokens)
        if not self.heads or n < 1:
            raise ValueError("there must be a token and a head")
        if any([len(row) for row in head.rows] != list(range(1, n + 1)) for head in self.heads):
            raise ValueError("a head needs one row a token, row i with i + 1 entries")
        if any(head.learned and len(head.learned) != n for head in self.heads):
            raise ValueError("a learned sink needs one share a token")
        if any(len(layer.norms) != n for layer in self.norms):
            raise ValueError("norms must have one number a token")
        if any(not 0 <= position < n for position in self.massive_positions):
            raise ValueError("massive_positions must be within the tokens")
        return self

    def rows(self) -> list[JsonObject]:
        """One row a head: mean attention to the first token and to its own position.

        Over the queries after the first, which can only look at itself.
        """
        n = max(len(self.tokens) - 1, 1)
        return [
            {
                "layer": head.layer,
                "head": head.head,
                "attention_to_first": sum(row[0] for row in head.rows[1:]) / n,
                "attention_to_self": sum(row[-1] for row in head.rows[1:]) / n,
            }
            | ({"learned_sink": sum(head.learned[1:]) / n} if head.learned else {})
            for head in self.heads
        ]

    def grids(self) -> dict[str, list[list[list[float]]]]:
        """``patterns``: (heads shown, tokens, tokens), query by key; 0 above the diagonal."""
        n = len(self.tokens)
        square = [[[*row, *[0.0] * (n - len(row))] for row in head.rows] for head in self.heads]
        return {"patterns": square}

    def view(self) -> HtmlView:
        """Circuitsvis views of this result: one page that works offline."""
        from melens.figures.attention_view import attention_view

        return attention_view(self)

    def _repr_html_(self) -> str:
        """The circuitsvis views in a frame of their own; the figure where they are too many."""
        if len(self.heads) > most_heads(len(self.tokens)):
            return super()._repr_html_()
        return self.view()._repr_html_()  # pyright: ignore[reportPrivateUsage]  (a notebook's name)

    def summary(self) -> str:
        """One plain sentence."""
        layers = sorted({head.layer for head in self.heads})
        heads = "1 head" if len(self.heads) == 1 else f"{len(self.heads)} heads"
        of = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
        return (
            f"{self.run.subject}: {heads} of {of} (counted from 0) over {len(self.tokens)} tokens; "
            f"ME Layer {'none' if self.me_layer is None else self.me_layer}"
        )
