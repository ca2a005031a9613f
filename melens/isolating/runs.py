"""Runs of an isolation: what is changed, what came of it, and finished runs on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from melens.batches import Batch
from melens.capture import Hooks
from melens.errors import InterventionError, MetricError, ResultError
from melens.formatting import brief
from melens.inputs import Inputs
from melens.interventions import (
    ffn_ablate_neurons,
    ffn_cap,
    ffn_pull_back,
    norm_flatten,
    norm_ones,
    norm_shuffle,
    write_block,
)
from melens.interventions.experts import expert_prune
from melens.interventions.target import Choice, these
from melens.item_rows import ItemRow, Rows
from melens.measuring.located import Located
from melens.metrics import sequence_loss
from melens.models.anatomy import anatomy, pattern_hook, resid_post
from melens.protocols import HookedModel, JsonObject
from melens.results import MELayer
from melens.results.sinks import SINK_EPS
from melens.resume import Resumable
from melens.shapes import TokenMask


@dataclass(frozen=True)
class LayerEdit:
    """An intervention of one layer, by a name that says all of it on one model and set of texts."""

    name: str
    enter: Callable[[HookedModel, Choice], AbstractContextManager[object]]
    """(model, tokens) -> ready to be entered."""


@dataclass(frozen=True)
class RunChange:
    """Edits of one layer, entered together; none = the model as it is."""

    layer: int
    edits: tuple[LayerEdit, ...] = ()

    @property
    def name(self) -> str:
        """Of all its edits."""
        return " and ".join(edit.name for edit in self.edits) or "clean"


@dataclass(frozen=True)
class EditOutcome:
    """One change's effect, ``[sequence]`` each; the coordinate is NaN without a massive token."""

    coordinate: Float[Tensor, " sequence"]
    sink_rate: Float[Tensor, " sequence"]
    loss: Float[Tensor, " sequence"]


TOKEN = "token"
"""What the massive token alone shows, beside what each batch of texts does."""


class Finished:
    """Runs by name; on disk, each as soon as it is known, if there is a path."""

    def __init__(self, path: Path | None, facts: JsonObject) -> None:
        """Take up an earlier run's.

        Args:    facts: what the numbers depend on.
        Raises:  ResultError: the file is of another isolation, or damaged.
        """
        self.rows = Rows(path, facts, of="isolation")

    def number(self, name: str, measure: Callable[[], float]) -> float:
        """A number of the massive token: known, or measured now.

        Raises:  MetricError: it is not finite.
        """
        if not self.rows.has(TOKEN, name):
            value = measure()
            if not math.isfinite(value):
                raise MetricError(
                    f"under '{name}' the massive coordinate is {value}; load the model in float32 "
                    "or bfloat16."
                )
            self.rows.add([ItemRow(TOKEN, name, value, 1.0)])
        return self.rows.found[TOKEN, name].value

    def outcome(self, batch: int, change: RunChange) -> EditOutcome | None:
        """What a batch of texts showed under a change; None where that is not known yet."""
        found = self.rows.found.get((f"batch {batch}", change.name))
        return (
            None
            if found is None
            else EditOutcome(**{k: _tensor(v) for k, v in found.about.items()})
        )

    def add_outcome(self, batch: int, change: RunChange, found: EditOutcome) -> None:
        """Keep what a batch of texts showed."""
        if not torch.isfinite(found.loss).all():
            raise MetricError(
                f"under '{change.name}' a text's loss is not finite; load the model in float32 or "
                "bfloat16."
            )
        about = {name: _listed(getattr(found, name)) for name in EditOutcome.__dataclass_fields__}
        row = ItemRow(
            f"batch {batch}",
            change.name,
            found.loss.mean().item(),
            float(len(found.loss)),
            about=about,
        )
        self.rows.add([row])

    def remove(self) -> None:
        """The result is there: what led to it is not needed any more."""
        self.rows.remove()


def _listed(x: Tensor) -> list[float | None]:
    """JSON knows no NaN."""
    return [None if math.isnan(value) else value for value in x.tolist()]


def _tensor(values: list[float | None]) -> Tensor:
    return torch.tensor(
        [math.nan if value is None else value for value in values], dtype=torch.float64
    )


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

    def final(self, change: RunChange, upto: int, hooks: Hooks) -> Tensor:
        """The residual that enters layer ``upto`` under a change; ``hooks`` only read."""
        runner = self.runner
        with ExitStack() as stack:
            for edit in change.edits:
                stack.enter_context(edit.enter(runner.model, self.choice))
            return runner.run(
                change.layer, runner.resid_pre(change.layer), upto=upto, hooks=list(hooks)
            )


@dataclass
class EditedTexts:
    """Runs changes over all texts, batch by batch: one batch's clean run in memory."""

    inputs: Inputs
    located: Located
    dim: int
    finished: Finished = field(default_factory=lambda: Finished(None, {}))
    clean: dict[int, Float[Tensor, "batch head"]] = field(default_factory=dict)

    def outcomes(
        self, changes: Sequence[RunChange], tick: Callable[[int], None]
    ) -> Iterator[list[EditOutcome]]:
        """The outcomes of every change, one list a batch; ``tick`` counts changes done."""
        for number in range(len(self.inputs.batches)):
            yield self._of_batch(number, changes, tick)

    def _of_batch(
        self, number: int, changes: Sequence[RunChange], tick: Callable[[int], None]
    ) -> list[EditOutcome]:
        self.clean.clear()
        marked: Marked | None = None
        clean: EditOutcome | None = None
        found = []
        for change in changes:
            outcome = self.finished.outcome(number, change)
            if outcome is None:
                if marked is None:
                    marked, clean = self._marked(number)
                outcome = self._outcome(marked, change) if change.edits else clean
                assert outcome is not None
                self.finished.add_outcome(number, change, outcome)
            found.append(outcome)
            tick(1)
        return found

    def _marked(self, number: int) -> tuple[Marked, EditOutcome]:
        """One batch's clean run, with its attention: a change leaves that before its layer."""
        me = self.located.me_layer
        assert me.me_layer is not None
        runner = Resumable(self.inputs.model, self.inputs.batches[number])
        marked = Marked(runner, self.located.heavy[number], me)
        return marked, self._outcome(marked, RunChange(me.me_layer + 1))

    def _outcome(self, marked: Marked, change: RunChange) -> EditOutcome:
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
        at_first = first.clamp_min(0).to(peak[0].device)  # a hook reads on its layer's device
        coordinate = peak[0][rows, at_first, self.dim].float().cpu()
        loss = torch.cat([_loss(runner, final, i) for i in range(len(final))])
        return EditOutcome(
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
    # a number a row and layer, of layers that may be on several devices
    over = torch.stack([(alpha > SINK_EPS).float().mean(-1).cpu() for alpha in alphas.values()])
    return over.mean(0)


def _loss(runner: Resumable, final: Tensor, row: int) -> Tensor:
    """One row at a time: the logits of a batch are the largest tensor there is."""
    one, batch = slice(row, row + 1), runner.batch
    return sequence_loss(runner.logits(final[one]), batch.ids[one], batch.mask[one])


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
        self.clean = self.coordinates(RunChange(self.peak + 1))

    def coordinates(self, change: RunChange) -> Float[Tensor, " prefix"]:
        """Massive coordinates at the peak under a change."""
        upto = max(self.peak + 1, change.layer)
        if change.layer > self.peak:  # nothing after the peak reaches it
            change = RunChange(self.peak + 1)
            upto = self.peak + 1
        final = self.marked.final(change, upto, [])
        return self.at_token(final)[:, self.dim].double().cpu()

    def at_token(self, x: Float[Tensor, "prefix pos width"]) -> Float[Tensor, "prefix width"]:
        """Rows of the massive tokens: the last real position of every prefix."""
        return x[torch.arange(len(x)), self.batch.positions.argmax(1)]

    def left(self, change: RunChange) -> float:
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


FFN_EDITS = ("neurons", "pull-back", "cap", "drop")
"""Ablate the neurons that make most of the write; F1; F3; no FFN write at all."""

CAP = 2.0


@dataclass(frozen=True)
class Sizes:
    """Ordinary tokens at one layer: what pull-back and cap are measured against."""

    product_rms: float
    write_norm: float


def flatten(layer: int, norm: str, alpha: float = 0.0) -> LayerEdit:
    """The norm's gain pulled to its mean."""
    return LayerEdit(
        f"flatten {norm} {alpha:g} at {layer}",
        lambda model, tokens: norm_flatten(model, layer, tokens=tokens, norm=norm, alpha=alpha),
    )


def shuffle(layer: int, norm: str, seed: int) -> LayerEdit:
    """The norm's gain in another order."""
    return LayerEdit(
        f"shuffle {norm} {seed} at {layer}",
        lambda model, tokens: norm_shuffle(model, layer, tokens=tokens, norm=norm, seed=seed),
    )


def all_ones(layer: int, norm: str) -> LayerEdit:
    """Every gain 1: the norm's shape and its overall scale are gone."""
    return LayerEdit(
        f"ones {norm} at {layer}",
        lambda model, tokens: norm_ones(model, layer, tokens=tokens, norm=norm),
    )


def ablate(layer: int, neurons: Sequence[int]) -> LayerEdit:
    """Neurons out."""
    return LayerEdit(
        f"ablate {sorted(neurons)} at {layer}",
        lambda model, tokens: ffn_ablate_neurons(model, layer, tokens=tokens, neurons=neurons),
    )


def drop(layer: int, part: str) -> LayerEdit:
    """A block's attention or FFN writes nothing."""
    return LayerEdit(
        f"drop {part} at {layer}",
        lambda model, tokens: write_block(model, layer, tokens=tokens, part=part),
    )


def prune(layer: int, expert: int) -> LayerEdit:
    """A routed expert writes nothing, at any token."""
    return LayerEdit(
        f"prune expert {expert} at {layer}",
        lambda model, tokens: expert_prune(model, layer, expert),
    )


def pull_back(layer: int, reference: float) -> LayerEdit:
    """The product at an ordinary size."""
    return LayerEdit(
        f"pull-back at {layer}",
        lambda model, tokens: ffn_pull_back(model, layer, tokens=tokens, reference=reference),
    )


def cap(layer: int, reference: float) -> LayerEdit:
    """What is written at most twice the ordinary."""
    return LayerEdit(
        f"cap at {layer}",
        lambda model, tokens: ffn_cap(model, layer, tokens=tokens, reference=reference, factor=CAP),
    )


def ffn_edit(kind: str, layer: int, neurons: Sequence[int], sizes: Sizes | None) -> LayerEdit:
    """The chosen FFN edit at one layer."""
    if kind == "neurons":
        return ablate(layer, neurons)
    if kind == "drop":
        return drop(layer, "ffn")
    assert sizes is not None
    if kind == "pull-back":
        return pull_back(layer, sizes.product_rms)
    return cap(layer, sizes.write_norm)


def named(kind: str, neurons: Sequence[int]) -> str:
    """How a sentence says it."""
    if kind == "neurons":
        which = ", ".join(map(str, neurons[:4])) + (", ..." if len(neurons) > 4 else "")
        return f"{'neuron' if len(neurons) == 1 else f'{len(neurons)} neurons'} {which} ablated"
    return {
        "pull-back": "its FFN product pulled back",
        "cap": f"its FFN write capped at {CAP:g} x",
        "drop": "its FFN write dropped",
    }[kind]


def check_ffn_edit(kind: object) -> None:
    """Refuse an unknown kind of FFN edit."""
    if kind not in FFN_EDITS:
        raise InterventionError(
            f"ffn_edit must be one of {', '.join(FFN_EDITS)}, got {brief(kind, 40)}."
        )
