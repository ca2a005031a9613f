"""The massive coordinate under an edit, from the shortest inputs that make it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from melens.batches import Batch
from melens.errors import ResultError
from melens.inputs import Inputs
from melens.isolating.changes import Change
from melens.isolating.finished import Finished
from melens.isolating.texts import Marked
from melens.measuring.located import Located
from melens.resume import Resumable

MOST = 16
"""Distinct inputs up to a massive token; with a fixed first token there is one."""


class Prefixes:
    """Distinct inputs that end in a massive token, run up to the peak layer."""

    def __init__(
        self, inputs: Inputs, located: Located, dim: int, finished: Finished | None = None
    ) -> None:
        """Raises:  ResultError: the texts hold no massive token."""
        self.finished = finished or Finished(None, {})
        me = located.me_layer
        assert me.peak_layer is not None
        self.dim, self.peak = dim, me.peak_layer
        rows: dict[tuple[int, ...], list[bool]] = {}
        groups: list[int] = []
        for batch, marks in zip(inputs.batches, located.heavy, strict=True):
            for i in range(len(batch)):
                real = batch.mask[i]
                ids, marked = batch.ids[i][real].tolist(), marks[i][real].tolist()
                end = marked.index(True) + 1 if True in marked else 0
                if end:
                    rows.setdefault(tuple(ids[:end]), marked[:end])
                groups.append(list(rows).index(tuple(ids[:end])) if end else -1)
        self.groups = torch.tensor(groups)
        """Index of every sequence's distinct input; -1 without a massive token."""
        if not rows:
            raise ResultError(
                "none of these texts holds a massive token, so there is nothing to isolate; take "
                "the texts and the BOS setting that melens.locate was given."
            )
        self.distinct = len(rows)
        chosen = list(rows.items())[:MOST]
        self._seen: dict[str, Tensor] = {}
        self.batch = Batch.pad([ids for ids, _ in chosen])
        marks = torch.zeros_like(self.batch.mask)
        for i, (_, marked) in enumerate(chosen):
            marks[i, : len(marked)] = torch.tensor(marked)
        self.marked = Marked(Resumable(inputs.model, self.batch), marks, me)
        self.clean = self.coordinates(Change(self.peak + 1))

    def coordinates(self, change: Change) -> Float[Tensor, " prefix"]:
        """Massive coordinates at the peak under a change."""
        upto = max(self.peak + 1, change.layer)
        if change.layer > self.peak:  # nothing after the peak reaches it
            change = Change(self.peak + 1)
            upto = self.peak + 1
        final = self.marked.final(change, upto, [])
        return self.at_token(final)[:, self.dim].double().cpu()

    def at_token(self, x: Float[Tensor, "prefix pos width"]) -> Float[Tensor, "prefix width"]:
        """Rows of the massive tokens: the last real position of every prefix."""
        return x[torch.arange(len(x)), self.batch.positions.argmax(1)]

    def left(self, change: Change) -> float:
        """Share of the coordinate that a change leaves: mean over mean."""
        return self.finished.number(
            change.name, lambda: (self.coordinates(change).mean() / self.clean.mean()).item()
        )

    def read(self, sites: list[str]) -> dict[str, Float[Tensor, "prefix width"]]:
        """Clean activations of the massive tokens at ``[batch, pos, width]`` sites."""

        def keep(site: str) -> Callable[[Tensor, object], None]:
            def reader(x: Tensor, hook: object) -> None:
                self._seen[site] = self.at_token(x.detach()).float()

            return reader

        runner, new = self.marked.runner, [site for site in sites if site not in self._seen]
        if new:
            runner.run(0, runner.resid_pre(0), hooks=[(site, keep(site)) for site in new])
        return {site: self._seen[site] for site in sites}
