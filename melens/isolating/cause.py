"""isolate(): which parameters of the ME Layer make the massive activation, with controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from melens.errors import InterventionError, ResultError, SiteError
from melens.inputs import Inputs, Source, prepare
from melens.interventions.context import require_no_edit
from melens.interventions.residual import write_sites
from melens.isolating.cells import joined
from melens.isolating.edited import MOST_SHARE, Edited, LocatedSubject
from melens.isolating.neurons import Written, decomposition, neuron_rows
from melens.isolating.path import has_neurons, has_part, ordinary_tokens, share_at, sufficiency
from melens.isolating.routed import routed_writes
from melens.isolating.runs import EditedTexts, Finished, check_ffn_edit, drop
from melens.locating.thresholds import STEP_SHARE
from melens.measuring.located import settle_primary
from melens.models.anatomy import check_layer, require_unfolded
from melens.protocols import JsonObject, ModelLike
from melens.results import MELayer
from melens.results.isolate import Isolation, Neuron, Write
from melens.results.reading import HoldsMELayer
from melens.resume import Resumable
from melens.settings import Run, setting_of
from melens.store import digest

TOP_NEURONS = 8
LAYER_SHARE = 0.05
"""Layers that write at least this share of the coordinate have their neurons listed."""
PARTS: tuple[Literal["attention", "ffn"], ...] = ("attention", "ffn")


def isolate(
    model: ModelLike,
    me_layer: HoldsMELayer | None = None,
    prompts: Source = None,
    *,
    layer: int | None = None,
    ffn_edit: str | None = None,
    run: Run | None = None,
) -> Isolation:
    """Find which parameters of the ME Layer make the massive activation.

    Norm and FFN are edited alone and together on the massive tokens; every block's write is
    dropped, and put in alone; the write is split into neurons; the same is done at every other
    layer and with random neurons, as controls. Routed experts that write much are pruned one at a
    time, and so are others whose share of ordinary tokens is nearest. Where the emergence has
    several steps the edits are made at each: the ME Layer, the main step, and of a multi-step
    emergence every layer that adds at least a tenth. Definitions: docs/definitions.md.

    Args:    model: anything ``melens.load`` takes.
             me_layer: what ``melens.locate`` found on this model; None = locate first.
             prompts: texts, as for ``melens.locate``; ready batches stay as they are.
             layer: the one layer to edit, counted from 0; None = every step of the emergence.
             ffn_edit: None = ``neurons``, or ``drop`` where the layer's FFN has experts.
             ``neurons`` ablates the fewest that make 90 % of the write; ``pull-back``,
             ``cap`` (the released code's F1 and F3), or ``drop`` (no FFN write).
             run: progress, and a JSON-lines file of finished runs that the same call goes on from;
             removed at the end.
    Returns: a frozen :class:`Isolation`.
    Raises:  ResultError: no massive token in the model or in these texts, or ``me_layer`` is of
             other weights. FoldedWeightsError: gains were folded away. SiteError: no such layer.
             InterventionError: an unknown ``ffn_edit``, or one the layer does not have.
             ContractError: a model that cannot be resumed from the middle.
    """
    run = setting_of(run, Run, "run")
    if ffn_edit is not None:
        check_ffn_edit(ffn_edit)
    inputs = prepare(model, prompts)
    require_unfolded(inputs.model)
    if layer is not None:
        check_layer(inputs.model, layer)
    located = settle_primary(inputs, me_layer)
    _require_emergence(located.me_layer)
    if ffn_edit is None:
        first = steps_of(located.me_layer)[0] if layer is None else layer
        ffn_edit = "neurons" if has_neurons(inputs.model, first) else "drop"
    if run.keep is not None:
        require_no_edit(inputs.model)
    finished = Finished(run.keep, _facts(inputs, located.me_layer, layer, ffn_edit))
    subject = LocatedSubject(inputs, located, ffn_edit, finished, run.progress)
    asked = steps_of(located.me_layer) if layer is None else [layer]
    result = _Run(subject, asked).result()
    finished.remove()
    return result


def _facts(inputs: Inputs, me_layer: MELayer, layer: int | None, ffn_edit: str) -> JsonObject:
    """What every kept number depends on."""
    texts = [[batch.ids.tolist(), batch.mask.tolist()] for batch in inputs.batches]
    return {
        **inputs.facts(),
        "layer": layer,
        "ffn_edit": ffn_edit,
        "located": [
            me_layer.me_layer,
            me_layer.main_layer,
            me_layer.peak_layer,
            [[token.position, token.token_id, token.dim] for token in me_layer.massive],
        ],
        "texts": digest([repr(texts)]),
    }


def steps_of(me_layer: MELayer) -> list[int]:
    """The layers that an isolation edits, the ME Layer first.

    The main step where that is another layer; of a multi-step emergence every counted layer that
    adds at least a tenth, too.
    """
    me, main, peak = me_layer.me_layer, me_layer.main_layer, me_layer.peak_layer
    assert me is not None
    assert peak is not None
    more = [main]
    if me_layer.verdict == "multi-step":
        more += [
            row.layer
            for row in me_layer.profile[me : peak + 1]
            if (row.write_share or 0.0) >= STEP_SHARE
        ]
    return [me, *sorted({layer for layer in more if layer is not None and layer > me})]


def _require_emergence(found: MELayer) -> None:
    if found.me_layer is None or found.me_layer < 0:
        what = "no massive token" if found.me_layer is None else "an embedding that is massive"
        raise ResultError(
            f"{found.run.model} has {what}: there is no layer to isolate a cause in"
            f"{found.near_miss}."
        )


class _Run:
    """One isolation: everything that is measured, in order."""

    def __init__(self, subject: LocatedSubject, layers: Sequence[int]) -> None:
        """Choose what is done.

        Raises:  SiteError, InterventionError: the first layer has not what is to be edited.
        """
        self.subject, first = subject, layers[0]
        self.edited = [Edited(subject, first)]
        for layer in layers[1:]:
            try:
                self.edited.append(Edited(subject, layer))
            except (SiteError, InterventionError) as error:
                subject.missing.append(f"edits at layer {layer}, a step of the emergence: {error}")
        if first > subject.prefixes.peak:
            subject.missing.append(
                f"an effect on the coordinate: it is read at the peak, layer "
                f"{subject.prefixes.peak}, before layer {first}"
            )
        self.routed = routed_writes(
            subject.inputs, subject.located, subject.prefixes, subject.without
        )
        subject.missing += [f"experts of layer {n}: {w}" for n, w in self.routed.reasons.items()]
        self.trials = self.routed.trials
        parts = (*self.edited, *self.trials)
        every = [change for part in parts for change in part.changes]
        self.changes = list({change.name: change for change in every}.values())
        """Once each: layers share controls."""
        subject.total = sum(edited.steps for edited in self.edited) + 4 * (subject.upto + 1)
        subject.total += len(subject.inputs.batches) * len(self.changes)

    def result(self) -> Isolation:
        """Measure, and put it together."""
        subject, first = self.subject, self.edited[0]
        necessity, (enough, ordinary) = self._necessity(), self._sufficiency()
        texts = EditedTexts(subject.inputs, subject.located, subject.dim, subject.finished)
        found = joined(list(texts.outcomes(self.changes, subject.tick)))
        by_name = {c.name: outcome for c, outcome in zip(self.changes, found, strict=True)}
        here, *others = (edited.result(by_name) for edited in self.edited)
        clean, base = subject.prefixes.clean.mean().item(), by_name[first.main[0].name]
        known = [w for n, w in subject.written.items() if w is not None and self._counts(n, clean)]
        subject.tick(max(0, subject.total - subject.done))
        return Isolation(
            coordinate=clean,
            **dict(here),
            steps=tuple(others),
            necessity=necessity,
            sufficiency=enough,
            ordinary=ordinary,
            decompositions=tuple(decomposition(written, clean) for written in known),
            neurons=tuple(row for written in known for row in self._rows(written)),
            experts=tuple(self.routed.rows),
            pruned_experts=tuple(
                self.routed.damage(trial, by_name, base, subject.prefixes.groups)
                for trial in self.trials
            ),
            missing=tuple(subject.missing),
            run=subject.inputs.run_info(
                seed=0, me_layer=subject.me.me_layer, layer=first.layer, ffn_edit=subject.kind
            ),
            **subject.facts(),
        )

    def _necessity(self) -> tuple[Write, ...]:
        subject, rows = self.subject, []
        for n in range(subject.upto + 1):
            for part in PARTS:
                if has_part(subject.model, n, part):
                    rows.append(Write(layer=n, part=part, left=subject.left(n, drop(n, part))))
        return tuple(rows)

    def _sufficiency(self) -> tuple[tuple[Write, ...], float | None]:
        """Every block's write put in alone; what ordinary tokens have by themselves."""
        subject, rows = self.subject, []
        ordinary = ordinary_tokens(subject.inputs, subject.located)
        if ordinary is None:
            subject.missing.append("sufficiency: the texts hold no ordinary token")
            return (), None
        prefixes = subject.prefixes
        runner = Resumable(subject.model, ordinary)
        parts: list[tuple[int, Literal["attention", "ffn"]]] = [
            (n, part)
            for n in range(subject.upto + 1)
            for part in PARTS
            if has_part(subject.model, n, part)
        ]
        # one pass for all of them
        prefixes.read([s for n, part in parts for s in write_sites(subject.model, n, part)])
        own = share_at(runner.resid_pre(prefixes.peak + 1), ordinary, prefixes)
        for n, part in parts:
            left = subject.finished.number(
                f"put in {part} at {n}",
                lambda n=n, part=part: sufficiency(prefixes, ordinary, n, part, runner),
            )
            rows.append(Write(layer=n, part=part, left=left))
            subject.tick()
        subject.tick(2 * (subject.upto + 1) - len(parts))
        return tuple(rows), own

    def _counts(self, layer: int, clean: float) -> bool:
        """Layers whose neurons are listed: edited ones, and all that write or erase much."""
        me, found = self.subject.me, self.subject.written[layer]
        stages = [n for s in me.stages for n in (s.layer, s.erased_at)]
        large = found is not None and abs(found.made / clean) >= LAYER_SHARE
        edited = [one.layer for one in self.edited]
        return layer in (*edited, me.main_layer, me.erase_layer, *stages) or large

    def _rows(self, found: Written) -> list[Neuron]:
        count = min(max(len(found.top(MOST_SHARE)), 2), TOP_NEURONS)
        return neuron_rows(found, found.strongest(count), self.subject.prefixes)
