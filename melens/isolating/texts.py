"""What texts show under an edit: massive coordinate, sinks and loss, sequence by sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from melens.inputs import Inputs
from melens.interventions.tokens import Choice, these
from melens.isolating.changes import Change, Outcome
from melens.isolating.finished import Finished
from melens.measuring.located import Located
from melens.metrics import sequence_loss
from melens.models.anatomy import anatomy, pattern_hook, resid_post
from melens.results import MELayer
from melens.results.sinks import SINK_EPS
from melens.resume import Resumable
from melens.shapes import TokenMask


@dataclass(frozen=True)
class Marked:
    """Sequences and their massive tokens, ready to be run from any layer."""

    runner: Resumable
    marks: TokenMask
    me_layer: MELayer

    @property
    def choice(self) -> Choice:
        """The rule that marks them; every pass runs the whole batch once."""
        return these(self.marks)

    @property
    def first(self) -> Tensor:
        """Column of each sequence's first massive token; -1 without one."""
        return torch.where(self.marks.any(1), self.marks.int().argmax(1), -1)

    def final(self, change: Change, upto: int, hooks: Sequence[tuple[str, Any]]) -> Tensor:
        """The residual that enters layer ``upto`` under a change; ``hooks`` only read."""
        runner = self.runner
        with ExitStack() as stack:
            for edit in change.edits:
                stack.enter_context(edit.enter(runner.model, self.choice))
            return runner.run(
                change.layer, runner.resid_pre(change.layer), upto=upto, hooks=list(hooks)
            )


@dataclass
class Texts:
    """Runs changes over all texts, batch by batch: one batch's clean run in memory."""

    inputs: Inputs
    located: Located
    dim: int
    finished: Finished = field(default_factory=lambda: Finished(None, {}))
    clean: dict[int, Float[Tensor, "batch head"]] = field(default_factory=dict)

    def outcomes(
        self, changes: Sequence[Change], tick: Callable[[int], None]
    ) -> Iterator[list[Outcome]]:
        """The outcomes of every change, one list a batch; ``tick`` counts changes done."""
        for number in range(len(self.inputs.batches)):
            yield self._of_batch(number, changes, tick)

    def _of_batch(
        self, number: int, changes: Sequence[Change], tick: Callable[[int], None]
    ) -> list[Outcome]:
        self.clean.clear()
        marked: Marked | None = None
        found = []
        for change in changes:
            outcome = self.finished.outcome(number, change)
            if outcome is None:
                marked = marked or self._marked(number)
                outcome = self._outcome(marked, change)
                self.finished.add_outcome(number, change, outcome)
            found.append(outcome)
            tick(1)
        return found

    def _marked(self, number: int) -> Marked:
        """One batch's clean run, with its attention: a change leaves that before its layer."""
        me = self.located.me_layer
        assert me.me_layer is not None
        runner = Resumable(self.inputs.model, self.inputs.batches[number])
        marked = Marked(runner, self.located.heavy[number], me)
        self._outcome(marked, Change(me.me_layer + 1))
        return marked

    def _outcome(self, marked: Marked, change: Change) -> Outcome:
        """A change at layer l leaves the layers before as they were in the clean run."""
        me, runner = marked.me_layer, marked.runner
        assert me.me_layer is not None
        assert me.peak_layer is not None
        first = marked.first
        alphas = dict(self.clean)
        after = [n for n in anatomy(runner.model).attention_layers if n > me.me_layer]
        hooks = [
            (pattern_hook(layer), _alpha_into(alphas, layer, marked))
            for layer in after
            if layer >= change.layer
        ]
        peak: list[Tensor] = [runner.resid_pre(me.peak_layer + 1)]

        def at_peak(x: Tensor, hook: object) -> None:
            peak[:] = [x.detach()]

        if change.layer <= me.peak_layer:
            hooks.append((resid_post(me.peak_layer), at_peak))
        final = marked.final(change, runner.n_layers, hooks)
        if not self.clean:
            self.clean.update(alphas)
        rows = torch.arange(len(first))
        coordinate = peak[0][rows, first.clamp_min(0), self.dim].float().cpu()
        loss = torch.cat([_loss(runner, final, i) for i in range(len(final))])
        return Outcome(
            coordinate.masked_fill(first.cpu() < 0, torch.nan).double(),
            _sink_rate(alphas, first).double(),
            loss.cpu().double(),
        )


def _alpha_into(
    alphas: dict[int, Tensor], layer: int, marked: Marked
) -> Callable[[Tensor, object], None]:
    """Mean attention that each row's first massive token draws from the queries that see it."""
    first, real = marked.first, marked.runner.batch.mask
    columns, rows = first.clamp_min(0), torch.arange(len(first), device=first.device)
    after = real & (
        torch.arange(real.shape[1], device=real.device) >= columns.to(real.device)[:, None]
    )

    def read(x: Tensor, hook: object) -> None:
        seen = after.to(x.device)
        drawn = x[rows.to(x.device), :, :, columns.to(x.device)].float()
        mean = drawn.where(seen[:, None], 0.0).sum(-1) / seen.sum(-1, keepdim=True)
        alphas[layer] = mean.where(first.to(x.device)[:, None] >= 0, 0.0)

    return read


def _sink_rate(alphas: dict[int, Tensor], first: Tensor) -> Tensor:
    if not alphas:
        return torch.zeros(len(first))
    over = torch.stack([(alpha > SINK_EPS).float().mean(-1) for alpha in alphas.values()])
    return over.mean(0).cpu()


def _loss(runner: Resumable, final: Tensor, row: int) -> Tensor:
    """One row at a time: the logits of a batch are the largest tensor there is."""
    one, batch = slice(row, row + 1), runner.batch
    return sequence_loss(runner.logits(final[one]), batch.ids[one], batch.mask[one])
