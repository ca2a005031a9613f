"""How routed experts write the massive coordinate, and which of them are pruned to see the cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from melens.capture import stream
from melens.errors import ModelError, SiteError
from melens.inputs import Inputs
from melens.intervals import random_order
from melens.isolating.cells import Groups, cell_of
from melens.isolating.path import Others
from melens.isolating.runs import EditOutcome, Prefixes, RunChange, prune
from melens.measuring.located import Located
from melens.models.anatomy import anatomy, norm_gain
from melens.models.experts import Experts, experts_of
from melens.models.ffn import ffn_input
from melens.protocols import HookedModel
from melens.results.isolate import ExpertDamage, PrunedExpert, RoutedExpert

ExpertAt = tuple[int, int]
"""(layer, expert)."""
MOST_PRUNED, CONTROLS, SEED = 3, 3, 0
NEAR = 0.25
"""A control's share of ordinary tokens is at most this far from the own share of the expert."""


@dataclass
class RoutedWrites:
    """What was read of every layer with routed experts, up to the peak."""

    rows: list[RoutedExpert] = field(default_factory=list)
    """Every expert that a massive token is routed to, the largest of a layer first."""
    written: dict[int, float] = field(default_factory=dict)
    """What a layer's FFN writes into the massive dimension."""
    used: dict[int, Float[Tensor, " expert"]] = field(default_factory=dict)
    """Share of ordinary tokens that go to each of a layer's experts."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Layers whose experts cannot be read."""

    @property
    def trials(self) -> list[PruneTrial]:
        """At most MOST_PRUNED experts to protect, those that write most, with their controls."""
        protected = [row for row in self.rows if row.is_to_protect]
        keep = {(row.layer, row.expert) for row in protected}
        largest = sorted(protected, key=lambda row: -abs(row.share * self.written[row.layer]))
        return [
            PruneTrial(at, self._controls(at, keep))
            for at in ((row.layer, row.expert) for row in largest[:MOST_PRUNED])
        ]

    def _controls(self, at: ExpertAt, keep: Collection[ExpertAt]) -> tuple[ExpertAt, ...]:
        """Other experts with nearly the same share of ordinary tokens; SEED settles ties.

        Of the same layer, and of the other layers where it has no other one.
        """
        every = [(layer, n) for layer, used in self.used.items() for n in range(len(used))]
        free = [other for other in every if other not in keep]
        pool = [other for other in free if other[0] == at[0]] or free
        order = random_order(len(pool), seed=SEED).tolist()
        own = self.share_of(at)
        near = sorted((pool[i] for i in order), key=lambda other: abs(self.share_of(other) - own))
        return tuple(at for at in near[:CONTROLS] if abs(self.share_of(at) - own) <= NEAR)

    def share_of(self, at: ExpertAt) -> float:
        """Share of ordinary tokens that go to an expert."""
        return self.used[at[0]][at[1]].item()

    def damage(
        self, trial: PruneTrial, found: Mapping[str, EditOutcome], base: EditOutcome, groups: Groups
    ) -> ExpertDamage:
        """A trial's costs.

        Args:    found: outcomes of the trial's changes, by name.
        """

        def one(at: ExpertAt) -> PrunedExpert:
            return PrunedExpert(
                layer=at[0],
                expert=at[1],
                others=self.share_of(at),
                without=cell_of(found[change_of(at).name], base, groups),
            )

        return ExpertDamage(pruned=one(trial.at), controls=tuple(map(one, trial.controls)))


@dataclass(frozen=True)
class PruneTrial:
    """One expert to prune, and others to prune instead."""

    at: ExpertAt
    controls: tuple[ExpertAt, ...]

    @property
    def changes(self) -> list[RunChange]:
        """One run over the texts each."""
        return [change_of(at) for at in (self.at, *self.controls)]


def change_of(at: ExpertAt) -> RunChange:
    """Without this one expert."""
    return RunChange(at[0], (prune(*at),))


def routed_writes(
    inputs: Inputs, located: Located, prefixes: Prefixes, layers: Sequence[int]
) -> RoutedWrites:
    """Read the experts of all layers up to the peak, in one pass over the texts.

    Args:    layers: those whose FFN has no neurons of its own.
    """
    found, readable = RoutedWrites(), dict[int, Experts]()
    for layer in (n for n in layers if n <= prefixes.peak):
        try:
            readable[layer] = experts_of(inputs.model, layer)
        except SiteError as error:
            found.reasons[layer] = str(error)
    sites = {layer: ffn_input(inputs.model, layer) for layer in readable}
    others = {site: Others(located.heavy) for site in sites.values()}
    if not sites:
        return found
    stream(inputs.model, inputs.batches, others)
    seen = prefixes.read(list(sites.values()))
    for layer, site in sites.items():
        try:
            here = seen[site], others[site].result()
            _read_layer(found, prefixes, inputs.model, readable[layer], here)
        except (ModelError, SiteError) as error:
            found.reasons[layer] = str(error)
    value = located.me_layer.massive[0].value  # at the peak
    found.rows = [
        row.model_copy(update={"of_peak": row.share * found.written[row.layer] / value})
        for row in found.rows
    ]
    return found


def _read_layer(
    found: RoutedWrites,
    prefixes: Prefixes,
    model: HookedModel,
    experts: Experts,
    seen: tuple[Tensor, Tensor],
) -> None:
    """One layer's rows, from FFN inputs of massive tokens and of ordinary ones."""
    layer, x = experts.layer, seen[0].to(experts.down(0).dtype)
    scale = _after(model, layer, prefixes).to(x.device)
    routed = experts.route(x)
    made = (experts.written(x)[:, prefixes.dim].double() * scale).mean()
    index = experts.route(seen[1].to(x)).index
    used = torch.stack([(index == n).any(1).double().mean() for n in range(experts.count)]).cpu()
    rows = []
    for expert in experts.used(routed):
        weight = torch.where(routed.index == expert, routed.weight, 0).sum(1).double()
        down = experts.down(expert)[:, prefixes.dim].double()
        each = experts.product(x, expert).double() * down * (weight * scale)[:, None]
        parts = each.mean(0)
        top = int(parts.abs().argmax())
        rows.append(
            RoutedExpert(
                layer=layer,
                expert=expert,
                weight=weight.mean().item(),
                share=_share(parts.sum(), made),
                neuron=top,
                neuron_share=_share(parts[top], made),
                entry=down[top].item(),
                others=used[expert].item(),
            )
        )
    found.rows += sorted(rows, key=lambda row: -abs(row.share))
    found.written[layer], found.used[layer] = made.item(), used


def _after(model: HookedModel, layer: int, prefixes: Prefixes) -> Float[Tensor, " prefix"]:
    """What a norm after the FFN multiplies the massive dimension by; ones without one."""
    if "ln2_post" not in anatomy(model).blocks[layer].norms:
        return torch.ones(len(prefixes.clean), dtype=torch.float64)
    site = f"blocks.{layer}.ln2_post.hook_scale"
    gain = norm_gain(model, layer, "ln2_post")[prefixes.dim].double().cpu()
    return gain / prefixes.read([site])[site][:, 0].double().cpu()


def _share(part: Tensor, whole: Tensor) -> float:
    return (part / whole).item() if whole != 0 else 0.0
