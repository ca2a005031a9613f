"""collapse(): how many directions residual, queries, keys and values fill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from melens.capture import Reducer
from melens.inputs import Inputs, Source, take_in
from melens.measuring.eigen import EigenQueue
from melens.measuring.located import Located, Progress, settle
from melens.measuring.one_pass import run_once
from melens.measuring.spectra import VARIANTS, Spectra
from melens.metrics.spectrum import SPECTRAL
from melens.models.attention import AttentionSites, attention_sites
from melens.results import Collapse, MELayer
from melens.results.collapse import CollapseRow


def collapse(
    model: Any,
    me_layer: MELayer | None = None,
    prompts: Source = None,
    *,
    batch_size: int = 4,
    progress: Progress = None,
) -> Collapse:
    """Effective rank and its relatives at every layer, site and head.

    Each number is of one sequence's rows, averaged over sequences; always over all rows and over
    all but the massive tokens', since one row can fake a collapse; as the rows are and less their
    mean row. One forward pass; second moments in float64; no activation is kept.
    Definitions: docs/definitions.md.

    Args:    model: anything ``melens.load`` takes.
             me_layer: what ``melens.locate`` found on this model; None = locate first.
             prompts: texts, as for ``melens.locate``.
             progress: called with (rows done, rows in all).
    Raises:  ResultError: ``me_layer`` is of other weights. PromptError, ModelError: as ``locate``.
    """  # fmt: skip
    inputs = take_in(model, prompts, batch_size=batch_size)
    located = settle(inputs, me_layer, progress=progress)
    plan = RankPlan(inputs, located, attention_sites(inputs.model))
    run_once(inputs, plan.taps, progress=progress)
    return plan.result()


class RankPlan:
    """The taps of :func:`collapse`, and how their numbers become its result."""

    def __init__(self, inputs: Inputs, located: Located, sites: AttentionSites) -> None:
        self.inputs, self.located, self.sites = inputs, located, sites
        queue = EigenQueue()
        self.spectra = [Spectra(view, located.heavy, queue) for view in sites.views]

    @property
    def taps(self) -> Mapping[str, Reducer]:
        """Hook -> reducer."""
        return {reducer.view.hook: reducer for reducer in self.spectra}

    def result(self) -> Collapse:
        """The frozen result."""
        massive = self.located.sequences_massive
        rows = [row for reducer in self.spectra for row in _rows(reducer, massive=massive > 0)]
        return Collapse(
            me_layer=self.located.me_layer.me_layer,
            n_layers=self.located.me_layer.n_layers,
            sequences=self.inputs.total,
            sequences_massive=massive,
            rows=tuple(rows),
            missing=self.sites.missing,
            run=self.inputs.run_info(seed=self.located.me_layer.run.seed),
        )


def _rows(reducer: Spectra, *, massive: bool) -> list[CollapseRow]:
    found: dict[str, list[list[float]]] = dict(
        zip(VARIANTS, reducer.result().tolist(), strict=True)
    )
    view, made = reducer.view, []
    for i, name in enumerate(SPECTRAL):
        for ending in ("", "_centred"):
            kept, left = found[f"with{ending}"][i], found[f"without{ending}"][i]
            for head in range(len(kept)):
                made.append(
                    CollapseRow(
                        layer=view.layer,
                        site=view.site,
                        head=head if view.heads else None,
                        definition=name + ending,
                        with_token=_number(kept[head]),
                        without_token=_number(left[head]) if massive else None,
                    )
                )
    return made


def _number(value: float) -> float | None:
    """None for what is undefined; ten digits, which is more than float32 activations carry."""
    return None if value != value else float(f"{value:.10g}")
