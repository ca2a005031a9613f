"""Readouts: what a metric takes from patched runs that share one batch and one start.

A wave of patched runs is resumed together; runs join it layer by layer. All values are
``[P * b]``, variant by variant, like the residuals of :class:`melens.resume.Resumable`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor

from melens.capture import hooked
from melens.errors import MetricError
from melens.metrics.divergence import kl_divergence
from melens.metrics.loss import nll
from melens.models.anatomy import pattern_hook
from melens.resume import Resumable
from melens.shapes import Resid

LOGIT_ROWS = 256
"""Positions unembedded at a time: a vocabulary of 256k makes 260 MB of them."""
Hook = tuple[str, Callable[..., object]]
Rows = Float[Tensor, " row"]


class Readout:
    """Base of all: needs nothing but the residual that leaves the last block."""

    def __init__(self, run: Resumable, *, stop: int, columns: Tensor) -> None:
        self.run, self.stop = run, stop
        self.last_column = int(columns.max())
        """No position after it matters, so a patch there is not run."""
        self.columns = columns

    def begin(self, start: int) -> None:
        """A wave from position ``start`` on begins."""

    def join(self, layer: int, copies: int) -> None:
        """That many more runs enter at ``layer``; before it they were the unpatched run."""

    def hooks(self, layer: int) -> list[Hook]:
        """Readers for one block."""
        return []

    def values(self, resid: Resid, start: int) -> Rows:
        """The metric of every row, from the residual entering layer ``stop``."""
        raise NotImplementedError

    def ends(self, resid: Resid, start: int) -> Float[Tensor, "row d_model"]:
        """Each row's vector at its column; the unpatched run's where that is before ``start``."""
        copies = len(resid) // len(self.columns)
        at = self.columns.repeat(copies)
        clean = self.run.resid_pre(self.stop)
        clean = clean[torch.arange(len(clean)), self.columns].repeat(copies, 1)
        found = resid[torch.arange(len(resid)), (at - start).clamp_min(0)]
        return torch.where((at >= start)[:, None], found, clean)

    def unpatched(self) -> Rows:
        """The metric of the recorded run itself."""
        first = self.run.resid_pre(0)
        self.begin(0)
        self.join(0, 1)
        resid, notes = first, {}
        for layer in range(self.stop):
            with hooked(self.run.model, self.hooks(layer)):
                resid = self.run.block(layer, resid, notes=notes)
        return self.values(resid, 0)


class CoordinateReadout(Readout):
    """One coordinate of the first token after one layer."""

    def __init__(self, run: Resumable, layer: int, *, dim: int) -> None:
        super().__init__(run, stop=layer + 1, columns=first_columns(run))
        self.dim = dim

    def values(self, resid: Resid, start: int) -> Rows:
        """In the units of the residual stream."""
        return self.ends(resid, start)[:, self.dim].double()


class LastLogits(Readout):
    """Needs the logits after each row's last token."""

    def __init__(self, run: Resumable) -> None:
        super().__init__(run, stop=run.n_layers, columns=run.batch.positions.argmax(dim=1))

    def values(self, resid: Resid, start: int) -> Rows:
        """Logits of one position a row, some rows at a time."""
        rows = self.ends(resid, start)
        which = torch.arange(len(rows), device=rows.device) % len(self.columns)
        pieces = [
            self.of_logits(self.run.logits(piece[None])[0].float(), row)
            for piece, row in zip(rows.split(LOGIT_ROWS), which.split(LOGIT_ROWS), strict=True)
        ]
        return torch.cat(pieces).double()

    def of_logits(self, logits: Tensor, row: Tensor) -> Tensor:
        """``[row, vocab]`` logits of the batch's rows ``row`` -> ``[row]``."""
        raise NotImplementedError


class DifferenceReadout(LastLogits):
    """Answer minus wrong answer."""

    def __init__(self, run: Resumable, answer: Tensor, wrong: Tensor) -> None:
        super().__init__(run)
        self.answer, self.wrong = answer, wrong

    def of_logits(self, logits: Tensor, row: Tensor) -> Tensor:
        """In logits."""
        at = torch.arange(len(logits), device=logits.device)
        return logits[at, self.answer[row]] - logits[at, self.wrong[row]]


class DivergenceReadout(LastLogits):
    """KL(target || this)."""

    def __init__(self, run: Resumable, target: Resumable) -> None:
        super().__init__(run)
        ends = target.resid_pre(target.n_layers)
        ends = ends[torch.arange(len(ends)), self.columns]
        self.target = target.logits(ends[None])[0].float().log_softmax(-1)

    def of_logits(self, logits: Tensor, row: Tensor) -> Tensor:
        """In nats."""
        return kl_divergence(self.target[row], logits.log_softmax(-1))


class LossReadout(Readout):
    """Mean next-token loss; what precedes a patch is counted from the unpatched run."""

    def __init__(self, run: Resumable) -> None:
        super().__init__(run, stop=run.n_layers, columns=last_column(run))
        mask = run.batch.mask
        self.pairs = mask[:, :-1] & mask[:, 1:]
        self.before = self._losses(run.resid_pre(run.n_layers), 0)

    def values(self, resid: Resid, start: int) -> Rows:
        """In nats."""
        copies = len(resid) // len(self.pairs)
        sums = self._losses(resid, start).sum(-1)
        sums = sums + self.before[:, :start].sum(-1).repeat(copies)
        return sums / self.pairs.sum(-1).repeat(copies)

    def _losses(self, resid: Tensor, start: int) -> Tensor:
        """``[row, pos - 1 - start]``: losses at real pairs, else 0."""
        copies = len(resid) // len(self.pairs)
        wanted = self.run.batch.ids[:, start + 1 :].repeat(copies, 1)
        flat = rearrange(resid[:, :-1], "row pos d -> (row pos) d")
        pieces = [
            nll(self.run.logits(piece[None])[0].float().log_softmax(-1), ids).double()
            for piece, ids in zip(
                flat.split(LOGIT_ROWS), wanted.flatten().split(LOGIT_ROWS), strict=True
            )
        ]
        losses = torch.cat(pieces).reshape(wanted.shape)
        return losses * self.pairs[:, start:].repeat(copies, 1)


class OwnReadout(Readout):
    """A function of all logits; those before a patch are the unpatched run's."""

    def __init__(self, run: Resumable, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(run, stop=run.n_layers, columns=last_column(run))
        self.function = function
        self.before = run.logits(run.resid_pre(run.n_layers))

    def values(self, resid: Resid, start: int) -> Rows:
        """Variant by variant: whole logits are large."""
        rows, pieces = len(self.before), []
        for piece in resid.split(rows):
            whole = torch.cat([self.before[:, :start], self.run.logits(piece)], dim=1)
            pieces.append(self._called(whole))
        return torch.cat(pieces).double()

    def _called(self, logits: Tensor) -> Tensor:
        found = self.function(logits)
        if not isinstance(found, Tensor) or found.shape != logits.shape[:1]:
            raise MetricError(
                f"the metric must return one number a row, [{len(logits)}], got "
                f"{tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__}."
            )
        return found


class SinkReadout(Readout):
    """Counts heads with a sink on the first token, layer by layer."""

    def __init__(self, run: Resumable, layers: Sequence[int], eps: float) -> None:
        super().__init__(run, stop=max(layers) + 1, columns=last_column(run))
        self.layers, self.eps = tuple(layers), eps
        self.first = first_columns(run)
        self.start = 0
        self.counts = self._none(0)
        self.before: dict[int, Tensor] = {}
        """Layer -> ``[b, head, query]``: the unpatched run's attention to the first token."""
        self.heads = 0
        self.unpatched()

    def begin(self, start: int) -> None:
        """No run has joined."""
        self.start, self.counts = start, self._none(0)

    def join(self, layer: int, copies: int) -> None:
        """Layers before ``layer`` count as in the unpatched run."""
        fresh = self._none(copies * len(self.first))
        for earlier in (i for i in self.layers if i < layer):
            fresh = fresh + self._sinks(self.before[earlier]).repeat(copies)
        self.counts = torch.cat([self.counts, fresh])

    def hooks(self, layer: int) -> list[Hook]:
        """A reader of the layer's pattern, if it counts."""
        if layer not in self.layers:
            return []

        def read(pattern: Tensor, hook: object) -> None:
            copies = len(pattern) // len(self.first)
            key = repeat(
                self.first.repeat(copies),
                "row -> row head query 1",
                head=pattern.shape[1],
                query=pattern.shape[2],
            )
            column = pattern.gather(-1, key.to(pattern.device))[..., 0].float().to(key.device)
            if self.start == 0 and layer not in self.before:
                self.before[layer], self.heads = column, pattern.shape[1]
            prefix = self.before[layer][:, :, : self.start].repeat(copies, 1, 1)
            self.counts = self.counts + self._sinks(torch.cat([prefix, column], dim=-1))

        return [(pattern_hook(layer), read)]

    def values(self, resid: Resid, start: int) -> Rows:
        """A share, in [0, 1]."""
        return self.counts.double() / (len(self.layers) * self.heads)

    def _sinks(self, column: Tensor) -> Tensor:
        """``[row, head, query]`` -> how many heads of each row exceed eps on average."""
        real = self.run.batch.mask.repeat(len(column) // len(self.first), 1)[:, None]
        alpha = reduce(column * real, "row head query -> row head", "sum") / real.sum(-1)
        return (alpha > self.eps).sum(-1)

    def _none(self, rows: int) -> Tensor:
        return torch.zeros(rows, dtype=torch.long, device=self.first.device)


def first_columns(run: Resumable) -> Tensor:
    """Each row's first real column."""
    return run.batch.mask.long().argmax(dim=1)


def last_column(run: Resumable) -> Tensor:
    """The batch's last column for every row: no position is after it."""
    return torch.full_like(run.batch.ids[:, 0], run.batch.ids.shape[1] - 1)
