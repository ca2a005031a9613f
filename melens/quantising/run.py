"""quantise(): what number formats cost a model, and what keeping a few things whole buys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from melens.batches import Batch
from melens.errors import InterventionError, MetricError
from melens.evaluating.edits import check_unedited
from melens.formatting import brief
from melens.inputs import Inputs, Source, prepare
from melens.item_rows import ItemRow, Rows
from melens.metrics.divergence import kl_divergence, same_top1
from melens.metrics.loss import nll
from melens.protocols import ModelLike
from melens.quantising.bench import Protect, SchemeBench
from melens.quantising.running import QuantisedModel, unquantised
from melens.quantising.schemes import DEFAULT, SCHEMES, Scheme
from melens.quantising.summing import AGREES, BASE, DIVERGES, SchemeRun, assembled, condition
from melens.quantising.trials import MarkedTexts, TrialPlan
from melens.results.quantise import Quantisation
from melens.results.reading import HoldsMELayer, located_in
from melens.settings import Run, setting_of


def quantise(  # noqa: PLR0913 (what is run on, what is tried, and how)
    model: ModelLike | Inputs,
    texts: Source = None,
    *,
    schemes: Sequence[str] = DEFAULT,
    me_layer: HoldsMELayer | None = None,
    protect: Protect | None = None,
    batch_size: int = 4,
    run: Run | None = None,
) -> Quantisation:
    """Round a model as engines would, and measure loss, KL and agreement with the model as it is.

    Each scheme is run as it is; with the massive tokens, super weights, the ME and erase layers'
    down projections, the cache's first tokens or a prefix kept in the model's own dtype; and with
    as many random ones instead. Embeddings, the unembedding, norms and routers are never rounded.
    The model is not changed; of its weights a scheme keeps codes, a byte each at most.

    Args:    model: as for ``melens.locate``; not one that is quantised already.
             schemes: names of ``melens.quantising.SCHEMES``.
             me_layer: None = located here, on the same texts.
             run: seed of the bootstrap, file of finished rows, progress.
    Returns: means over tokens, with 95 % intervals over texts.
    Raises:  UnknownNameError: no such scheme. ModelError: a model that is quantised, or whose
             weights do not divide into a scheme's blocks. ResultError: ``me_layer`` of another
             model. InterventionError: an edit is open, or super weights of another model.
             PromptError: too few texts for a static scheme. MetricError: a loss is no number.
    Source:  Dettmers et al., LLM.int8(), 2022; Xiao et al., SmoothQuant, 2023 (per tensor and per
             token); Chen et al., PrefixQuant, 2024; Yu et al., The Super Weight, 2024.
    """
    if not schemes or isinstance(schemes, str) or not isinstance(schemes, Sequence):
        raise InterventionError("schemes must be a list of names, with at least one.")
    if not isinstance(protect, (Protect, type(None))):
        raise InterventionError(
            f"protect must be a melens.quantising.Protect, got {brief(protect, 40)}."
        )
    chosen = [SCHEMES[name] for name in dict.fromkeys(schemes)]
    how = setting_of(run, Run, "run")
    ready = prepare(model, texts, batch_size=batch_size)
    check_unedited(ready.model)
    bench = SchemeBench.of(ready, chosen, located_in(me_layer), protect or Protect(), batch_size)
    loop = SchemeLoop(bench, how)
    return assembled(
        bench, [loop.run(scheme) for scheme in bench.schemes], loop.rows, seed=how.seed
    )


class SchemeLoop:
    """Scheme after scheme, batch after batch; the rows are its only memory."""

    def __init__(self, bench: SchemeBench, how: Run) -> None:
        self.bench, self.how, self.done = bench, how, 0
        self.rows = Rows(how.keep, bench.facts(), of="quantisation")
        self.batches = len(bench.texts.batches)
        self.total = self.batches * sum(len(bench.trials(s)) for s in bench.schemes)

    @torch.no_grad()
    def run(self, scheme: Scheme) -> SchemeRun:
        """All trials of a scheme; what an earlier run left is not run again."""
        trials = self.bench.trials(scheme)
        quantised = QuantisedModel.of(self.bench.plain, scheme)
        every = (self.bench.texts, self.bench.prefixed)
        sides = [(x, [t for t in trials if self.bench.texts_of(t) is x]) for x in every]
        for at in range(self.batches):
            for texts, own in sides:
                if texts is not None and own:
                    self._batch(quantised, texts, own, at)
                self._tick(len(own))
        bases = sum(bool(own) for _, own in sides)
        passes = len(trials) + bases * (1 + scheme.static)
        bits = {trial.key: quantised.bits(trial.entries, trial.modules) for trial in trials}
        return SchemeRun(scheme, trials, passes, bits)

    def _batch(
        self, quantised: QuantisedModel, texts: MarkedTexts, trials: Sequence[TrialPlan], at: int
    ) -> None:
        batch, first = texts.batches[at], self.bench.texts.before(at)
        items = [str(first + row) for row in range(len(batch))]
        names = [condition(quantised.scheme, trial) for trial in trials]
        if all(self.rows.has(item, name) for item in items for name in names):
            return
        base = unquantised(self.bench.plain, batch)
        for trial, name in zip(trials, names, strict=True):
            whole = self.bench.spared(trial, texts, at, quantised.scheme)
            found = quantised.logits(batch, whole)
            kept = whole.prefix * len(batch)
            kept += 0 if whole.tokens is None else int(whole.tokens.sum())
            self.rows.add(_scored(items, name, base, found, batch, texts.prefix, kept))

    def _tick(self, trials: int) -> None:
        self.done += trials
        if self.how.progress is not None:
            self.how.progress(self.done, self.total)


def _scored(  # noqa: PLR0913 (two runs of one batch, and what to call it)
    items: Sequence[str],
    name: str,
    base: Float[Tensor, "batch pos vocab"],
    found: Float[Tensor, "batch pos vocab"],
    batch: Batch,
    start: int,
    kept: int,
) -> Iterator[ItemRow]:
    """One text at a time: a batch's logits are the largest tensors there are.

    Args:    start: column of the first logits that are scored.
    """
    for row, item in enumerate(items):
        at = slice(start, int(batch.mask[row].sum()) - 1)
        wanted = batch.ids[row, start + 1 : at.stop + 1].to(base.device)
        before = base[row, at].float().log_softmax(-1)
        after = found[row, at].float().log_softmax(-1)
        loss, plain = (float(nll(x, wanted).double().mean()) for x in (after, before))
        kl = float(kl_divergence(before, after).clamp_min(0).double().mean())
        if not all(map(math.isfinite, (loss, plain, kl))):
            raise MetricError(
                f"text {item} under {name} has a loss of {loss} and a KL of {kl}; load the model "
                "in float32 or bfloat16."
            )
        agrees = float(same_top1(before, after).double().mean())
        size = float(len(wanted))
        also = {BASE: (plain, size), DIVERGES: (kl, size), AGREES: (agrees, size)}
        yield ItemRow(item, name, loss, size, also, {"kept": kept if row == 0 else 0})
