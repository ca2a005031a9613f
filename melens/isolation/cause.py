"""isolate(): which parameters of the ME Layer make the massive activation, with its controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from melens.errors import InterventionError, ResultError, SiteError
from melens.inputs import Inputs, Source, take_in
from melens.isolation import edits
from melens.isolation.cells import cell_of, factorial_of, joined
from melens.isolation.neurons import (
    Written,
    decomposition,
    direction_of,
    gains_of,
    input_sites,
    neuron_rows,
    written_at,
)
from melens.isolation.path import Branch, branch_of, sizes_of
from melens.isolation.prefixes import Prefixes
from melens.isolation.sufficiency import has_part, ordinary_tokens, share_at, sufficiency
from melens.isolation.texts import Change, Outcome, Texts
from melens.measure.located import Located, Progress, settle_primary
from melens.models.anatomy import anatomy, check_layer, require_unfolded
from melens.results import MELayer
from melens.results.isolate import Controls, Isolation, LayerControl, NormEdit, Write
from melens.resume import Resumable

MOST_SHARE = 0.9
"""The FFN edit ablates the fewest neurons that make this share of the write."""
TOP_NEURONS = 8
LAYER_SHARE = 0.05
"""Layers that write at least this share of the coordinate have their neurons listed."""
DRAWS = 10
LIKE = 32
"""Random neurons are drawn among this many whose down-projection norm is nearest."""
PARTS = ("attention", "ffn")


def isolate(
    model: Any,
    me_layer: MELayer | None = None,
    prompts: Source = None,
    *,
    layer: int | None = None,
    ffn_edit: str = "neurons",
    progress: Progress = None,
) -> Isolation:
    """Find which parameters of the ME Layer make the massive activation.

    Norm and FFN are edited alone and together on the massive tokens; every block's write is
    dropped, and put in alone; the write is split into neurons; the same is done at every other
    layer and with random neurons, as controls. Definitions: docs/definitions.md.

    Args:    model: anything ``melens.load`` takes.
             me_layer: what ``melens.locate`` found on this model; None = locate first.
             prompts: texts, as for ``melens.locate``; ready batches stay as they are.
             layer: the layer to edit, counted from 0; None = the ME Layer.
             ffn_edit: ``neurons`` ablates the fewest that make 90 % of the write; ``pull-back``,
             ``cap`` (the released code's F1 and F3), or ``drop`` (no FFN write).
             progress: called with (steps done, steps in all).
    Returns: a frozen :class:`Isolation`.
    Raises:  ResultError: no massive token in the model or in these texts, or ``me_layer`` is of
             other weights. FoldedWeightsError: gains were folded away. SiteError: no such layer.
             InterventionError: an unknown ``ffn_edit``, or one the layer does not have.
             ContractError: a model that cannot be resumed from the middle.
    """  # fmt: skip
    edits.check_ffn_edit(ffn_edit)
    inputs = take_in(model, prompts)
    require_unfolded(inputs.model)
    if layer is not None:
        check_layer(inputs.model, layer)
    located = settle_primary(inputs, me_layer)
    _require_emergence(located.me_layer)
    return _Run(inputs, located, layer, ffn_edit, progress).result()


def _require_emergence(found: MELayer) -> None:
    if found.me_layer is None or found.me_layer < 0:
        what = "no massive token" if found.me_layer is None else "an embedding that is massive"
        raise ResultError(
            f"{found.run.model} has {what}: there is no layer to isolate a cause in"
            f"{found.near_miss}."
        )


@dataclass
class _Run:
    """One isolation: everything that is measured, in order."""

    inputs: Inputs
    located: Located
    asked: int | None
    kind: str
    progress: Progress
    missing: list[str] = field(default_factory=list)
    done: int = 0
    ordinary: float | None = None

    def __post_init__(self) -> None:
        me = self.me = self.located.me_layer
        assert me.me_layer is not None
        assert me.peak_layer is not None
        self.layer = me.me_layer if self.asked is None else self.asked
        self.dim, self.model = me.massive[0].dim, self.inputs.model
        self.blocks = anatomy(self.model).blocks
        self.prefixes = Prefixes(self.inputs, self.located, self.dim)
        self.upto = min(me.peak_layer, len(self.blocks) - 1)
        self.norms = [norm for norm in ("ln2", "ln2_post") if norm in self.blocks[self.layer].norms]
        if not self.norms:
            raise SiteError(f"block {self.layer} has no norm around its FFN.")
        self.written = {block.layer: self._written(block.layer) for block in self.blocks}
        self.sizes = (
            sizes_of(self.inputs, self.located) if self.kind in ("pull-back", "cap") else {}
        )
        if not self._can_edit(self.layer):
            raise InterventionError(
                f"layer {self.layer} has no neurons of its own for ffn_edit '{self.kind}'; take "
                "'cap' or 'drop'."
            )
        self.neurons = self._neurons(self.layer)
        if self.layer > self.prefixes.peak:
            self.missing.append(
                f"an effect on the coordinate: it is read at the peak, layer {self.prefixes.peak}, "
                f"before layer {self.layer}"
            )
        count = 1 + len(self.norms) * (3 + DRAWS) + 4 * (self.upto + 1) + DRAWS
        self.total = count + len(self.inputs.batches) * (6 + 2 * (len(self.blocks) - 1))

    def result(self) -> Isolation:
        """Measure, and put it together."""
        branch = branch_of(self.inputs, self.located, self.layer)
        self._tick()
        necessity, norms = self._necessity(), self._norm_edits()
        enough, random = self._sufficiency(), self._random_neurons()
        main, layers, others = self._texts(random)
        here, groups = self.written[self.layer], self.prefixes.groups
        clean = self.prefixes.clean.mean().item()
        known = [w for n, w in self.written.items() if w is not None and self._counts(n, clean)]
        direction, gains = self._direction(branch), self._gains()
        controls = Controls(
            layers=layers,
            neurons=tuple(self.prefixes.left(change) for change in random),
            neurons_loss=cell_of(others[0], main[0], groups) if len(others) > 1 else None,
            shuffled=cell_of(others[-1], main[0], groups),
        )
        return Isolation(
            coordinate=clean,
            factorial=factorial_of(
                main, groups, self.norms[0], edits.named(self.kind, self.neurons)
            ),
            norms=norms,
            necessity=necessity,
            sufficiency=enough,
            ordinary=self.ordinary,
            path=branch.steps,
            decompositions=tuple(decomposition(found, clean) for found in known),
            neurons=tuple(row for found in known for row in self._rows(found)),
            neurons_for=decomposition(here, clean).neurons_for if here is not None else {},
            direction=direction,
            gains=gains,
            controls=controls,
            missing=tuple(self.missing),
            **self._facts(),
        )

    def _facts(self) -> dict[str, Any]:
        """What the result says of the model, the texts and the run."""
        return {
            "layer": self.layer,
            "me_layer": self.me.me_layer,
            "peak_layer": self.prefixes.peak,
            "dim": self.dim,
            "n_layers": len(self.blocks),
            "sequences": self.inputs.total,
            "sequences_massive": self.located.sequences_massive,
            "observations": self.prefixes.distinct,
            "observations_used": len(self.prefixes.clean),
            "run": self.inputs.run_info(
                seed=0, me_layer=self.me.me_layer, layer=self.layer, ffn_edit=self.kind
            ),
        }

    def _tick(self, steps: int = 1) -> None:
        self.done += steps
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)

    def _written(self, layer: int) -> Written | None:
        try:
            return written_at(self.model, layer, self.prefixes)
        except SiteError as error:
            self.missing.append(f"neurons of layer {layer}: {error}")
            return None

    def _neurons(self, layer: int) -> list[int]:
        """What the FFN edit ablates: enough neurons here, as many of the strongest elsewhere."""
        if self.kind != "neurons":
            return []
        found = self.written[layer]
        assert found is not None
        if layer == self.layer:
            return found.top(MOST_SHARE)
        return found.strongest(len(self.neurons))

    def _ffn_change(self, layer: int) -> edits.Edit:
        neurons = self.neurons if layer == self.layer else self._neurons(layer)
        return edits.ffn_edit(self.kind, layer, neurons, self.sizes.get(layer))

    def _can_edit(self, layer: int) -> bool:
        """Whether a block has what the chosen FFN edit changes."""
        needs_neurons = self.kind in ("neurons", "pull-back")
        has = self.written[layer] is not None if needs_neurons else True
        return has and has_part(self.model, layer, "ffn")

    def _necessity(self) -> tuple[Write, ...]:
        rows = []
        for n in range(self.upto + 1):
            for part in PARTS:
                if has_part(self.model, n, part):
                    left = self.prefixes.left(Change(n, (edits.drop(n, part),)))
                    rows.append(Write(layer=n, part=part, left=left))
                self._tick()
        return tuple(rows)

    def _sufficiency(self) -> tuple[Write, ...]:
        ordinary = ordinary_tokens(self.inputs, self.located)
        if ordinary is None:
            self.missing.append("sufficiency: the texts hold no ordinary token")
            return ()
        runner, rows = Resumable(self.model, ordinary), []
        self.ordinary = share_at(runner.resid_pre(self.prefixes.peak + 1), ordinary, self.prefixes)
        for n in range(self.upto + 1):
            for part in PARTS:
                if has_part(self.model, n, part):
                    rows.append(sufficiency(self.prefixes, ordinary, n, part, runner))
                self._tick()
        return tuple(rows)

    def _norm_edits(self) -> tuple[NormEdit, ...]:
        made = []
        for norm in self.norms:
            shown = [self._left(edits.flatten(self.layer, norm, alpha)) for alpha in (0.0, 0.5)]
            shown.append(self._left(edits.all_ones(self.layer, norm)))
            shuffled = [self._left(edits.shuffle(self.layer, norm, s)) for s in range(DRAWS)]
            made.append(
                NormEdit(norm=norm, flat=shown[0], half=shown[1], ones=shown[2],
                         shuffled=tuple(shuffled))
            )  # fmt: skip
        return tuple(made)

    def _left(self, edit: edits.Edit) -> float:
        self._tick()
        return self.prefixes.left(Change(self.layer, (edit,)))

    def _random_neurons(self) -> list[Change]:
        """As many other neurons, of like norm in the down projection."""
        found = self.written[self.layer]
        if found is None or not self.neurons:
            return []
        size = found.ffn.down.float().norm(dim=-1)
        aim = size[self.neurons].mean()
        rest = torch.ones(len(size), dtype=torch.bool)
        rest[self.neurons] = False
        free = rest.nonzero().flatten()
        if len(free) < len(self.neurons):
            self.missing.append("random neurons: the edit takes more than half of the layer's")
            return []
        near = free[(size[free.to(size.device)] - aim).abs().argsort().cpu()]
        pool = near[: max(LIKE, 2 * len(self.neurons))]
        changes = []
        for seed in range(DRAWS):
            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
            chosen = pool[order[: len(self.neurons)]].tolist()
            changes.append(Change(self.layer, (edits.ablate(self.layer, chosen),)))
            self._tick()
        return changes

    def _texts(
        self, random: Sequence[Change]
    ) -> tuple[list[Outcome], tuple[LayerControl, ...], list[Outcome]]:
        """The 2 x 2, every other layer, and the random controls, over all texts."""
        at, norm = self.layer, self.norms[0]
        flat, edited = edits.flatten(at, norm), self._ffn_change(at)
        me = self.me.me_layer
        assert me is not None
        main = [Change(me + 1), Change(at, (flat,)), Change(at, (edited,)),
                Change(at, (flat, edited))]  # fmt: skip
        extra = [*random[:1], Change(at, (edits.shuffle(at, norm, 0),))]
        around: list[tuple[int, str, Change]] = []
        for n in (n for n in range(len(self.blocks)) if n != at):
            if norm in self.blocks[n].norms:
                around.append((n, "flat", Change(n, (edits.flatten(n, norm),))))
            if self._can_edit(n):
                around.append((n, "edited", Change(n, (self._ffn_change(n),))))
        changes = [*main, *extra, *(change for _, _, change in around)]
        texts = Texts(self.inputs, self.located, self.dim)
        found = joined(list(texts.outcomes(changes, self._tick)))
        cells: dict[int, dict[str, Any]] = {n: {} for n, _, _ in around}
        rest = found[len(main) + len(extra) :]
        for (n, which, _), outcome in zip(around, rest, strict=True):
            cells[n][which] = cell_of(outcome, found[0], self.prefixes.groups)
        layers = tuple(
            LayerControl(layer=n, flat=c.get("flat"), edited=c.get("edited"))
            for n, c in cells.items()
        )
        return found[: len(main)], layers, found[len(main) : len(main) + len(extra)]

    def _counts(self, layer: int, clean: float) -> bool:
        """Layers whose neurons are listed: the edited one, and all that write or erase much."""
        found = self.written[layer]
        stages = [n for s in self.me.stages for n in (s.layer, s.erased_at)]
        large = found is not None and abs(found.made / clean) >= LAYER_SHARE
        return layer in (self.layer, self.me.main_layer, self.me.erase_layer, *stages) or large

    def _rows(self, found: Written) -> list[Any]:
        count = len(found.top(MOST_SHARE))
        return neuron_rows(found, found.strongest(min(max(count, 2), TOP_NEURONS)), self.prefixes)

    def _direction(self, branch: Branch) -> Any:
        here = self.written[self.layer]
        if here is None or branch.others is None or not len(branch.others):
            return None
        massive = self.prefixes.read([input_sites(self.model, self.layer)[0]])
        return direction_of(here.ffn, self.dim, next(iter(massive.values())), branch.others)[0]

    def _gains(self) -> Any:
        _, site = input_sites(self.model, self.layer)
        if site is None or self.written[self.layer] is None:
            self.missing.append("gains: the block's FFN has no norm before it, or no neurons")
            return None
        return gains_of(self.model, self.layer, self.dim, self.prefixes.read([site])[site])
