"""describe(): what the massive token is like, how rigid it is, and what sets it off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from melens.emergence.thresholds import ERASE_SHARE, STEP_SHARE
from melens.emergence.trajectory import Path
from melens.errors import PromptError
from melens.inputs import Inputs, Source, take_in
from melens.measure.first_tokens import (
    chat_start,
    choose_starts,
    conditions,
    first_token_row,
    lead,
)
from melens.measure.located import Located, Progress, settle
from melens.measure.rigidity import RESID, Observation, Rigidity, consecutive, observe
from melens.metrics import top1_share
from melens.models.anatomy import anatomy
from melens.results import MELayer, TokenPortrait
from melens.results.describe import (
    TOPS,
    Coordinate,
    FirstTokenRow,
    MassiveEntry,
    NormView,
    SiteCosines,
    StepLayer,
)

STEP_FACTOR = 2.0
"""A layer steps up (down) where the token's norm at least doubles (halves) in it, or where its
write share passes the thresholds of ``locate``."""
COORDINATES = 16
"""Dimensions that the layer x dimension view shows."""
LATER_INPUTS = 8
"""Occurrences of a later massive token that are compared with each other."""
FIRST_TOKENS = 64
"""Vocabulary sample by default."""


def describe(
    model: Any,
    me_layer: MELayer | None = None,
    prompts: Source = None,
    *,
    first_tokens: int = FIRST_TOKENS,
    seed: int = 0,
    progress: Progress = None,
) -> TokenPortrait:
    """Describe the massive token: dimensions, energy, steps, rigidity, and what sets it off.

    Rigidity between inputs is over different *first tokens*: with one fixed first token all texts
    are a single observation (causality). Definitions: docs/definitions.md.

    Args:    model: anything ``melens.load`` takes.
             me_layer: what ``melens.locate`` found on this model; None = locate first.
             prompts: texts, as for ``melens.locate``.
             first_tokens: how many tokens of the vocabulary to try alone at position 0.
             seed: chooses them.
             progress: called with (rows done, rows in all) while locating.
    Raises:  ResultError: ``me_layer`` is of other weights. PromptError, ModelError: as ``locate``.
    """  # fmt: skip
    inputs = take_in(model, prompts)
    located = settle(inputs, me_layer, seed=seed, progress=progress)
    return portray(inputs, located, first_tokens=first_tokens, seed=seed)


def portray(inputs: Inputs, located: Located, *, first_tokens: int, seed: int) -> TokenPortrait:
    """:func:`describe` over inputs that were taken in already."""
    if first_tokens < 0:
        raise PromptError(f"first_tokens must be 0 or more, got {first_tokens}.")
    found = located.me_layer
    starts = choose_starts(inputs, count=first_tokens, seed=seed)
    first = bool(found.massive) and found.massive[0].position == 0
    if first:  # the primary token leads, whatever else is tried
        starts = lead(starts, found.massive[0].token_id)
    rigidity = Rigidity(found.n_layers, found.peak_layer or 0)
    rows: list[FirstTokenRow] = []
    primary: Observation | None = None
    for seen in observe(inputs, [[token] for token in starts]):
        token = seen.path.token_id
        row = first_token_row(seen.path, starts[token], found, token=inputs.decode(token))
        rows.append(row)
        if first and row.massive:
            rigidity.add(seen)
        if first and primary is None:
            primary = seen
    if found.massive and not first:
        primary = _watch_later(inputs, located, rigidity)
    return TokenPortrait(
        me_layer=found.me_layer,
        peak_layer=found.peak_layer,
        n_layers=found.n_layers,
        massive=tuple(MassiveEntry(**token.model_dump()) for token in found.massive),
        inputs=rigidity.count,
        conditions=conditions(rows, chat_start(getattr(inputs.model, "tokenizer", None))),
        first_tokens=tuple(rows),
        run=inputs.run_info(seed=seed, first_tokens=first_tokens),
        **_portrait(inputs, found, primary, rigidity),
    )


def _watch_later(inputs: Inputs, located: Located, rigidity: Rigidity) -> Observation | None:
    """The primary token where it stands later in a text, and its other occurrences."""
    wanted = located.me_layer.massive[0]
    prefixes: dict[tuple[int, ...], None] = {}
    for batch, heavy in zip(inputs.batches, located.heavy, strict=True):
        for i, position in zip(
            *(axis.tolist() for axis in heavy.nonzero(as_tuple=True)), strict=True
        ):
            at = int(batch.positions[i, position])
            ids = batch.ids[i][batch.mask[i]][: at + 1].tolist()
            if at > 0 and ids[-1] == wanted.token_id:
                prefixes[tuple(ids)] = None
    chosen = sorted(prefixes, key=len)[:LATER_INPUTS]
    seen = list(observe(inputs, chosen))
    for one in seen:
        rigidity.add(one)
    return seen[0] if seen else None


def _portrait(
    inputs: Inputs, found: MELayer, primary: Observation | None, rigidity: Rigidity
) -> dict[str, Any]:
    if primary is None:
        return {
            "energy": None, "energy_layers": None, "energy_direction": None, "coordinates": (),
            "step_up": (), "step_down": (), "cosine_layers": (), "cosine_inputs": (), "sites": (),
            "norms": (),
        }  # fmt: skip
    path, n = primary.path, found.n_layers
    shares = [_energy(row) for row in path.resid[1:]]
    ups, downs = _steps(path)
    sites = (RESID, *primary.outputs)
    return {
        "energy": shares[path.peak],
        "energy_layers": {top: tuple(share[top] for share in shares) for top in TOPS},
        "coordinates": _coordinates(path),
        "energy_direction": top1_share(torch.stack(rigidity.at_peak)).item(),
        "step_up": ups,
        "step_down": downs,
        "cosine_layers": tuple(path.cosines[1:].tolist()),
        "cosine_inputs": rigidity.between_inputs(RESID),
        "sites": tuple(
            SiteCosines(
                site=site,
                consecutive=consecutive(primary.rows(site), n),
                inputs=rigidity.between_inputs(site),
            )
            for site in sites
        ),
        "norms": _norms(inputs, found, primary),
    }


def _energy(row: Tensor) -> dict[str, float]:
    """Share of a vector's squared norm in its largest 1, 2, 4 and 8 coordinates."""
    squares = row.square().sort(descending=True).values
    total = squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
    return {top: (squares[: int(top)].sum() / total).item() for top in TOPS}


def _coordinates(path: Path) -> tuple[Coordinate, ...]:
    """The dimensions of the largest entries over all layers."""
    rows = path.resid[1:]
    dims = rows.abs().amax(dim=0).topk(min(COORDINATES, rows.shape[1])).indices.tolist()
    return tuple(Coordinate(dim=dim, values=tuple(rows[:, dim].tolist())) for dim in dims)


def _steps(path: Path) -> tuple[tuple[StepLayer, ...], tuple[StepLayer, ...]]:
    ups, downs = [], []
    factors = (path.norms[1:] / path.norms[:-1].clamp_min(1e-30)).tolist()
    for layer, (factor, share) in enumerate(zip(factors, path.shares.tolist(), strict=True)):
        step = StepLayer(layer=layer, factor=factor, write_share=share)
        if layer <= path.peak and (factor >= STEP_FACTOR or share >= STEP_SHARE):
            ups.append(step)
        elif factor <= 1 / STEP_FACTOR or share <= -ERASE_SHARE:
            downs.append(step)
    return tuple(ups), tuple(downs)


def _norms(inputs: Inputs, found: MELayer, primary: Observation) -> tuple[NormView, ...]:
    """What the norms that read the residual leave of the massive dimensions."""
    first = found.massive[0]
    dims = [token.dim for token in _alike(found, first)]
    root = inputs.model.cfg.d_model**0.5
    return tuple(
        NormView(
            layer=block.layer,
            site=norm,
            before=_share(primary.inputs[norm][block.layer], dims),
            after=_share(primary.outputs[norm][block.layer], dims),
            norm_ratio=primary.outputs[norm][block.layer].norm().item() / root,
        )
        for block in anatomy(inputs.model).blocks
        for norm in block.norms
        if not norm.endswith("_post") and block.layer in primary.inputs.get(norm, {})
    )


def _alike(found: MELayer, first: Any) -> Sequence[Any]:
    """Rows of the primary token: one a massive dimension."""
    return [
        token for token in found.massive
        if (token.position == 0, token.token_id) == (first.position == 0, first.token_id)
    ]  # fmt: skip


def _share(row: Tensor, dims: Sequence[int]) -> float:
    total = row.square().sum().clamp_min(torch.finfo(row.dtype).tiny)
    return (row[list(dims)].square().sum() / total).item()
