"""One edited layer: the edits that isolation makes of its norm and FFN, alone and together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from melens.errors import InterventionError, SiteError
from melens.inputs import Inputs
from melens.intervals import random_order
from melens.isolating.cells import cell_of, factorial_of
from melens.isolating.neurons import (
    Written,
    decomposition,
    direction_of,
    gains_of,
    input_sites,
    sites_of_writes,
    written_at,
)
from melens.isolating.path import Branch, branch_of, has_part, sizes_of
from melens.isolating.runs import (
    EditOutcome,
    Finished,
    LayerEdit,
    Prefixes,
    RunChange,
    ablate,
    all_ones,
    ffn_edit,
    flatten,
    named,
    shuffle,
)
from melens.measuring.located import Located
from melens.models.anatomy import anatomy
from melens.protocols import JsonObject
from melens.results import MELayer
from melens.results.isolate import Controls, Direction, EditedLayer, Gains, LayerControl, NormEdit
from melens.settings import Progress

MOST_SHARE = 0.9
"""The FFN edit ablates the fewest neurons that make this share of the write."""


@dataclass
class LocatedSubject:
    """A located massive token, ready to be edited at any layer."""

    inputs: Inputs
    located: Located
    kind: str
    """Which FFN edit."""
    finished: Finished
    progress: Progress | None
    missing: list[str] = field(default_factory=list)
    """What could not be measured, and why."""
    without: list[int] = field(default_factory=list)
    """Layers whose FFN has no neurons of its own."""
    done: int = 0
    total: int = 0

    def __post_init__(self) -> None:
        me = self.located.me_layer
        assert me.peak_layer is not None
        self.dim, self.model = me.massive[0].dim, self.inputs.model
        self.blocks = anatomy(self.model).blocks
        self.prefixes = Prefixes(self.inputs, self.located, self.dim, self.finished)
        self.upto = min(me.peak_layer, len(self.blocks) - 1)
        # one pass for all layers, each of which would run the model again
        self.prefixes.read(sites_of_writes(self.model, [block.layer for block in self.blocks]))
        self.written = {block.layer: self._written(block.layer) for block in self.blocks}
        if self.without:
            layers = ", ".join(map(str, self.without))
            self.missing.append(
                f"neurons of layer {layers}: experts, or no FFN of their own, so that the whole "
                "write is edited"
            )
        sized = self.kind in ("pull-back", "cap")
        self.sizes = sizes_of(self.inputs, self.located) if sized else {}

    @property
    def me(self) -> MELayer:
        """What was located."""
        return self.located.me_layer

    def tick(self, steps: int = 1) -> None:
        """That many more steps are done."""
        self.done += steps
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)

    def left(self, layer: int, *chosen: LayerEdit) -> float:
        """Share of the coordinate that edits of one layer leave."""
        self.tick()
        return self.prefixes.left(RunChange(layer, chosen))

    def can_edit(self, layer: int) -> bool:
        """Whether a block has what the chosen FFN edit changes."""
        needs_neurons = self.kind in ("neurons", "pull-back")
        has = self.written[layer] is not None if needs_neurons else True
        return has and has_part(self.model, layer, "ffn")

    def ffn_change(self, layer: int, neurons: list[int]) -> LayerEdit:
        """The chosen FFN edit."""
        return ffn_edit(self.kind, layer, neurons, self.sizes.get(layer))

    def _written(self, layer: int) -> Written | None:
        try:
            return written_at(self.model, layer, self.prefixes)
        except SiteError:
            self.without.append(layer)
            return None

    def facts(self) -> JsonObject:
        """What the result says of the model and the texts."""
        return {
            "me_layer": self.me.me_layer,
            "main_layer": self.me.main_layer,
            "peak_layer": self.prefixes.peak,
            "dim": self.dim,
            "n_layers": len(self.blocks),
            "sequences": self.inputs.total,
            "sequences_massive": self.located.sequences_massive,
            "observations": self.prefixes.distinct,
            "observations_used": len(self.prefixes.clean),
        }


DRAWS = 10
LIKE = 32
"""Random neurons are drawn among this many whose down-projection norm is nearest."""


class Edited:
    """The edits of one layer, chosen at once and then measured."""

    def __init__(self, subject: LocatedSubject, layer: int) -> None:
        """Choose the edits.

        Raises:  SiteError: the block has no norm around its FFN. InterventionError: it has not
                 what the FFN edit changes.
        """
        self.subject, self.layer = subject, layer
        block = subject.blocks[layer]
        around = (block.ffn_norm, "ln2_post" if "ln2_post" in block.norms else None)
        self.norms = [norm for norm in around if norm is not None]
        if block.untold:
            raise SiteError(f"block {layer}'s parts cannot be told apart: {block.untold}.")
        if not self.norms:
            raise SiteError(f"block {layer} has no norm around its FFN.")
        if not subject.can_edit(layer):
            raise InterventionError(
                f"layer {layer} has no neurons of its own for ffn_edit '{subject.kind}'; take "
                "'cap' or 'drop'."
            )
        self.neurons = self._neurons(layer)
        flat = flatten(layer, self.norms[0])
        edited = subject.ffn_change(layer, self.neurons)
        me = subject.me.me_layer
        assert me is not None
        self.main = [
            RunChange(me + 1),
            RunChange(layer, (flat,)),
            RunChange(layer, (edited,)),
            RunChange(layer, (flat, edited)),
        ]
        self.shuffled = RunChange(layer, (shuffle(layer, self.norms[0], 0),))
        self.random = self._random_neurons()
        self.around = self._around()
        self.steps = 1 + len(self.norms) * (3 + DRAWS) + len(self.random)
        """Runs of the massive token alone, and one pass over the texts."""

    @property
    def changes(self) -> list[RunChange]:
        """All that the texts are run under."""
        return [
            *self.main,
            *self.random[:1],
            self.shuffled,
            *(change for row in self.around.values() for change in row.values()),
        ]

    def result(self, found: Mapping[str, EditOutcome]) -> EditedLayer:
        """Measure on the massive token, and put it together with what the texts showed.

        Args:    found: outcomes of ``changes`` by name.
        """
        subject, groups = self.subject, self.subject.prefixes.groups
        branch = branch_of(subject.inputs, subject.located, self.layer)
        subject.tick()
        base, here = found[self.main[0].name], subject.written[self.layer]
        cells = {
            n: {which: cell_of(found[change.name], base, groups) for which, change in row.items()}
            for n, row in self.around.items()
        }
        clean = subject.prefixes.clean.mean().item()
        return EditedLayer(
            layer=self.layer,
            factorial=factorial_of(
                [found[change.name] for change in self.main],
                groups,
                self.norms[0],
                named(subject.kind, self.neurons),
            ),
            norms=self._norm_edits(),
            path=branch.steps,
            neurons_for=decomposition(here, clean).neurons_for if here is not None else {},
            direction=self._direction(branch),
            gains=self._gains(),
            controls=Controls(
                layers=tuple(
                    LayerControl(layer=n, flat=row.get("flat"), edited=row.get("edited"))
                    for n, row in cells.items()
                ),
                neurons=tuple(subject.left(self.layer, *change.edits) for change in self.random),
                neurons_loss=cell_of(found[self.random[0].name], base, groups)
                if self.random
                else None,
                shuffled=cell_of(found[self.shuffled.name], base, groups),
            ),
        )

    def _neurons(self, layer: int) -> list[int]:
        """What the FFN edit ablates: enough neurons here, as many of the strongest elsewhere."""
        if self.subject.kind != "neurons":
            return []
        found = self.subject.written[layer]
        assert found is not None
        return found.top(MOST_SHARE) if layer == self.layer else found.strongest(len(self.neurons))

    def _around(self) -> dict[int, dict[str, RunChange]]:
        """The same edits at every other layer that can have them."""
        subject, norm = self.subject, self.norms[0]
        made: dict[int, dict[str, RunChange]] = {}
        for n in (n for n in range(len(subject.blocks)) if n != self.layer):
            if norm in subject.blocks[n].norms:
                made.setdefault(n, {})["flat"] = RunChange(n, (flatten(n, norm),))
            if subject.can_edit(n):
                change = RunChange(n, (subject.ffn_change(n, self._neurons(n)),))
                made.setdefault(n, {})["edited"] = change
        return made

    def _norm_edits(self) -> tuple[NormEdit, ...]:
        at, left, made = self.layer, self.subject.left, []
        for norm in self.norms:
            flat, half = (left(at, flatten(at, norm, alpha)) for alpha in (0.0, 0.5))
            ones = left(at, all_ones(at, norm))
            shuffled = tuple(left(at, shuffle(at, norm, seed)) for seed in range(DRAWS))
            made.append(NormEdit(norm=norm, flat=flat, half=half, ones=ones, shuffled=shuffled))
        return tuple(made)

    def _random_neurons(self) -> list[RunChange]:
        """As many other neurons, of like norm in the down projection."""
        found = self.subject.written[self.layer]
        if found is None or not self.neurons:
            return []
        size = found.ffn.down.float().norm(dim=-1)
        aim = size[self.neurons].mean()
        rest = torch.ones(len(size), dtype=torch.bool)
        rest[self.neurons] = False
        free = rest.nonzero().flatten()
        if len(free) < len(self.neurons):
            self.subject.missing.append(
                f"random neurons: the edit takes more than half of layer {self.layer}'s"
            )
            return []
        near = free[(size[free.to(size.device)] - aim).abs().argsort().cpu()]
        pool = near[: max(LIKE, 2 * len(self.neurons))]
        changes = []
        for seed in range(DRAWS):
            order = random_order(len(pool), seed=seed)
            chosen = pool[order[: len(self.neurons)]].tolist()
            changes.append(RunChange(self.layer, (ablate(self.layer, chosen),)))
        return changes

    def _direction(self, branch: Branch) -> Direction | None:
        subject, here = self.subject, self.subject.written[self.layer]
        if here is None or branch.others is None or not len(branch.others):
            return None
        massive = subject.prefixes.read([input_sites(subject.model, self.layer)[0]])
        return direction_of(here.ffn, subject.dim, next(iter(massive.values())), branch.others)[0]

    def _gains(self) -> Gains | None:
        subject = self.subject
        _, site = input_sites(subject.model, self.layer)
        if site is None or subject.written[self.layer] is None:
            subject.missing.append(
                f"gains of layer {self.layer}: its FFN has no norm before it, or no neurons"
            )
            return None
        normalized = subject.prefixes.read([site])[site]
        return gains_of(subject.model, self.layer, subject.dim, normalized)
