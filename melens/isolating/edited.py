"""One edited layer: its norm and FFN, alone and together, and what that is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from melens.errors import InterventionError, SiteError
from melens.isolating import edits
from melens.isolating.cells import cell_of, factorial_of
from melens.isolating.changes import Change, Outcome
from melens.isolating.neurons import decomposition, direction_of, gains_of, input_sites
from melens.isolating.path import Branch, branch_of
from melens.isolating.subject import MOST_SHARE, Subject
from melens.results.isolate import Controls, EditedLayer, LayerControl, NormEdit

DRAWS = 10
LIKE = 32
"""Random neurons are drawn among this many whose down-projection norm is nearest."""


class Edited:
    """The edits of one layer, chosen at once and then measured."""

    def __init__(self, subject: Subject, layer: int) -> None:
        """Choose the edits.

        Raises:  SiteError: the block has no norm around its FFN. InterventionError: it has not
                 what the FFN edit changes.
        """
        self.subject, self.layer = subject, layer
        norms = subject.blocks[layer].norms
        self.norms = [norm for norm in ("ln2", "ln2_post") if norm in norms]
        if not self.norms:
            raise SiteError(f"block {layer} has no norm around its FFN.")
        if not subject.can_edit(layer):
            raise InterventionError(
                f"layer {layer} has no neurons of its own for ffn_edit '{subject.kind}'; take "
                "'cap' or 'drop'."
            )
        self.neurons = self._neurons(layer)
        flat = edits.flatten(layer, self.norms[0])
        edited = subject.ffn_change(layer, self.neurons)
        me = subject.me.me_layer
        assert me is not None
        self.main = [Change(me + 1), Change(layer, (flat,)), Change(layer, (edited,)),
                     Change(layer, (flat, edited))]  # fmt: skip
        self.shuffled = Change(layer, (edits.shuffle(layer, self.norms[0], 0),))
        self.random = self._random_neurons()
        self.around = self._around()
        self.steps = 1 + len(self.norms) * (3 + DRAWS) + len(self.random)
        """Runs of the massive token alone, and one pass over the texts."""

    @property
    def changes(self) -> list[Change]:
        """All that the texts are run under."""
        return [
            *self.main, *self.random[:1], self.shuffled,
            *(change for row in self.around.values() for change in row.values()),
        ]  # fmt: skip

    def result(self, found: Mapping[str, Outcome]) -> EditedLayer:
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
                [found[change.name] for change in self.main], groups, self.norms[0],
                edits.named(subject.kind, self.neurons),
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
        )  # fmt: skip

    def _neurons(self, layer: int) -> list[int]:
        """What the FFN edit ablates: enough neurons here, as many of the strongest elsewhere."""
        if self.subject.kind != "neurons":
            return []
        found = self.subject.written[layer]
        assert found is not None
        return found.top(MOST_SHARE) if layer == self.layer else found.strongest(len(self.neurons))

    def _around(self) -> dict[int, dict[str, Change]]:
        """The same edits at every other layer that can have them."""
        subject, norm = self.subject, self.norms[0]
        made: dict[int, dict[str, Change]] = {}
        for n in (n for n in range(len(subject.blocks)) if n != self.layer):
            if norm in subject.blocks[n].norms:
                made.setdefault(n, {})["flat"] = Change(n, (edits.flatten(n, norm),))
            if subject.can_edit(n):
                change = Change(n, (subject.ffn_change(n, self._neurons(n)),))
                made.setdefault(n, {})["edited"] = change
        return made

    def _norm_edits(self) -> tuple[NormEdit, ...]:
        at, left, made = self.layer, self.subject.left, []
        for norm in self.norms:
            flat, half = (left(at, edits.flatten(at, norm, alpha)) for alpha in (0.0, 0.5))
            ones = left(at, edits.all_ones(at, norm))
            shuffled = tuple(left(at, edits.shuffle(at, norm, seed)) for seed in range(DRAWS))
            made.append(NormEdit(norm=norm, flat=flat, half=half, ones=ones, shuffled=shuffled))
        return tuple(made)

    def _random_neurons(self) -> list[Change]:
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
            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
            chosen = pool[order[: len(self.neurons)]].tolist()
            changes.append(Change(self.layer, (edits.ablate(self.layer, chosen),)))
        return changes

    def _direction(self, branch: Branch) -> Any:
        subject, here = self.subject, self.subject.written[self.layer]
        if here is None or branch.others is None or not len(branch.others):
            return None
        massive = subject.prefixes.read([input_sites(subject.model, self.layer)[0]])
        return direction_of(here.ffn, subject.dim, next(iter(massive.values())), branch.others)[0]

    def _gains(self) -> Any:
        subject = self.subject
        _, site = input_sites(subject.model, self.layer)
        if site is None or subject.written[self.layer] is None:
            subject.missing.append(
                f"gains of layer {self.layer}: its FFN has no norm before it, or no neurons"
            )
            return None
        normalized = subject.prefixes.read([site])[site]
        return gains_of(subject.model, self.layer, subject.dim, normalized)
