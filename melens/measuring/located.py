"""What a measurement knows of the massive tokens in its texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from melens.capture import Reducer, stream
from melens.inputs import Inputs
from melens.interventions.target import note_weights, require_located_here
from melens.locating.profile import LayerProfile
from melens.locating.search import locate_in
from melens.locating.thresholds import last_body_layer
from melens.models.anatomy import resid_post
from melens.results import MELayer
from melens.results.reading import HoldsMELayer, located_in
from melens.settings import Progress, require_seed


@dataclass(frozen=True)
class Located:
    """A MELayer of the model at hand, and where its massive tokens stand in the texts."""

    me_layer: MELayer
    heavy: Sequence[Tensor]
    """[batch, pos] marks of massive tokens, batch by batch."""

    @property
    def sequences_massive(self) -> int:
        """Sequences with at least one massive token."""
        return sum(int(marks.any(dim=-1).sum()) for marks in self.heavy)


def settle(
    inputs: Inputs,
    me_layer: HoldsMELayer | None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Located:
    """Locate if that was not done, and mark the massive tokens of the texts, in any dimension.

    Raises:  ResultError: ``me_layer`` was located on other weights.
    """
    require_seed(seed)
    found = located_in(me_layer)
    if found is None:
        found = locate_in(inputs, seed=seed, progress=progress)
    check_same_model(inputs, found)
    return Located(found, mark(inputs, found))


def settle_primary(inputs: Inputs, me_layer: HoldsMELayer | None) -> Located:
    """:func:`settle`, marking only tokens that are massive in the primary dimension.

    A token of another dimension may have another cause.
    """
    found = located_in(me_layer) or locate_in(inputs)
    check_same_model(inputs, found)
    dim = found.massive[0].dim if found.massive else None
    return Located(found, mark(inputs, found, dim=dim))


def check_same_model(inputs: Inputs, me_layer: MELayer) -> None:
    """Refuse an ME Layer of another model.

    As for an edit: what was located on the object is good, and what an export's probe accepted.

    Raises:  ResultError: naming both.
    """
    note_weights(inputs.model, inputs.weights)
    require_located_here(inputs.model, me_layer)


def mark(inputs: Inputs, me_layer: MELayer, *, dim: int | None = None) -> list[Tensor]:
    """True at every massive token, batch by batch; of one dimension, or of any (None).

    Where only first tokens are massive, each in every text that it starts, and the texts are those
    that were located, their ids say it all. Else the texts are run again up to the final window.
    """
    if me_layer.verdict == "none":
        return [torch.zeros_like(batch.mask) for batch in inputs.batches]
    firsts = _firsts(inputs, me_layer, dim)
    if firsts is None:
        return _run_and_mark(inputs, me_layer.n_layers, dim)
    wanted = torch.tensor(sorted(firsts))
    return [
        (batch.positions == 0) & torch.isin(batch.ids, wanted.to(batch.ids.device))
        for batch in inputs.batches
    ]


def _firsts(inputs: Inputs, me_layer: MELayer, dim: int | None) -> set[int] | None:
    """Ids that are massive wherever they come first; None if that does not settle every token."""
    if me_layer.run.settings.get("ids") != inputs.settings["ids"]:
        return None
    starts = Counter(row[0] for row in inputs.rows)
    most: dict[int, float] = {}
    for token in me_layer.massive:
        if dim is not None and token.dim != dim:
            continue
        if token.position > 0:
            return None
        most[token.token_id] = max(most.get(token.token_id, 0.0), token.frequency)
    always = all(round(share * inputs.total) == starts[i] for i, share in most.items())
    return set(most) if always else None


def _run_and_mark(inputs: Inputs, n_layers: int, dim: int | None) -> list[Tensor]:
    """Mark the hits of every layer before the final window, as ``locate`` counts them."""
    layers = range(last_body_layer(n_layers) + 1)
    taps = {resid_post(layer): LayerProfile(resid_post(layer)) for layer in layers}
    stream(inputs.model, inputs.batches, taps)
    rows = [tap.result() for tap in taps.values()]
    marks, done = [], 0
    for batch in inputs.batches:
        made = torch.zeros_like(batch.mask)
        for i in range(len(batch)):
            hits = [hit for layer in rows for hit in layer[done + i].hits]
            found = {hit.position for hit in hits if dim is None or hit.dim == dim}
            for position in found:
                made[i] |= batch.positions[i] == position
        done += len(batch)
        marks.append(made)
    return marks


def run_once(inputs: Inputs, *plans: Mapping[str, Reducer], progress: Progress | None) -> None:
    """One pass over the inputs that feeds the taps of every plan; their hooks must differ."""
    taps = {hook: reducer for plan in plans for hook, reducer in plan.items()}
    stream(inputs.model, inputs.batches, taps, progress=inputs.ticker(progress))
