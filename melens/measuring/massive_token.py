"""describe(): what the massive token is like, how rigid it is, and what sets it off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from melens.errors import PromptError
from melens.inputs import Inputs, Source, prepare
from melens.locating.thresholds import ERASE_SHARE, STEP_SHARE
from melens.locating.trajectory import Path, trace_with
from melens.measuring.first_tokens import (
    choose_starts,
    conditions,
    first_token_row,
)
from melens.measuring.located import Located, settle
from melens.metrics import top1_share
from melens.models.anatomy import anatomy
from melens.protocols import JsonObject, ModelLike
from melens.results import MELayer, TokenPortrait
from melens.results.describe import (
    RESID,
    TOPS,
    Coordinate,
    FirstTokenRow,
    MassiveEntry,
    NormView,
    SiteCosines,
    StepLayer,
)
from melens.results.locate import MassiveToken
from melens.results.reading import HoldsMELayer
from melens.settings import Progress

CHUNK_BYTES = 2**28
"""Activations of at most this size are held at a time while inputs are compared."""


@dataclass(frozen=True)
class Observation:
    """One input's token: its trajectory, and its rows after every norm."""

    path: Path
    outputs: dict[str, dict[int, Tensor]]
    """Norm -> layer -> the token's row at the norm's output."""
    inputs: dict[str, dict[int, Tensor]]
    """The same at the norm's input; empty where the model does not show it."""

    def rows(self, site: str) -> dict[int, Tensor]:
        """Rows of the residual, or of a norm's output, by layer."""
        if site == RESID:
            return dict(enumerate(self.path.resid[1:]))
        return self.outputs[site]


def observe(inputs: Inputs, prefixes: Sequence[Sequence[int]]) -> Iterator[Observation]:
    """Trajectories of every prefix's last token with its rows around every norm, in order."""
    model, blocks = inputs.model, anatomy(inputs.model).blocks
    known = model.hook_dict
    taps = {
        (end, norm, block.layer): name
        for block in blocks
        for norm in block.norms
        for end in ("in", "out")
        if (name := f"blocks.{block.layer}.{norm}.hook_{end}") in known
    }
    per_prefix = 8 * model.cfg.d_model * (len(taps) + 4 * len(blocks))
    step = max(1, min(128, CHUNK_BYTES // per_prefix))
    for start in range(0, len(prefixes), step):
        part = prefixes[start : start + step]
        paths, found = trace_with(model, part, taps.values(), batch_size=step)
        for i, path in enumerate(paths):
            ends: dict[str, dict[str, dict[int, Tensor]]] = {"in": {}, "out": {}}
            for (end, norm, layer), name in taps.items():
                ends[end].setdefault(norm, {})[layer] = found[name][i]
            yield Observation(path, ends["out"], ends["in"])


@dataclass
class Rigidity:
    """Cosines between inputs, from running sums of unit vectors; keeps each input's peak alone."""

    n_layers: int
    peak: int
    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Site -> [layer, d_model], for the layers in ``layers``."""
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    at_peak: list[Tensor] = field(default_factory=list)

    def add(self, seen: Observation) -> None:
        """Take in one input."""
        self.count += 1
        self.at_peak.append(seen.path.resid[self.peak + 1])
        for site in (RESID, *seen.outputs):
            rows = seen.rows(site)
            units = torch.nn.functional.normalize(torch.stack(list(rows.values())), dim=-1)
            if site in self.sums:
                units = units + self.sums[site]
            self.sums[site], self.layers[site] = units, tuple(rows)

    def between_inputs(self, site: str) -> tuple[float | None, ...]:
        """Mean cosine over all pairs of inputs: (|sum of units|^2 - n) / (n (n - 1))."""
        n = self.count
        if n < 2:
            return (None,) * self.n_layers
        means = (self.sums[site].square().sum(-1) - n) / (n * (n - 1))
        by_layer = dict(zip(self.layers[site], means.tolist(), strict=True))
        return tuple(by_layer.get(layer) for layer in range(self.n_layers))


def consecutive(rows: dict[int, Tensor], n_layers: int) -> tuple[float | None, ...]:
    """Cosine of every layer's row with the layer before; None at the first, and at gaps."""
    return tuple(
        torch.nn.functional.cosine_similarity(rows[layer], rows[layer - 1], dim=0).item()
        if layer in rows and layer - 1 in rows
        else None
        for layer in range(n_layers)
    )


STEP_FACTOR = 2.0
"""A layer steps up (down) where the token's norm at least doubles (halves) in it, or where its
write share passes the thresholds of ``locate``."""
COORDINATES = 8
"""Dimensions that the layer x dimension view shows; more of them hide each other."""
LATER_INPUTS = 8
"""Occurrences of a later massive token that are compared with each other."""
FIRST_TOKENS = 64
"""Vocabulary sample by default."""


def describe(
    model: ModelLike,
    me_layer: HoldsMELayer | None = None,
    prompts: Source = None,
    *,
    first_tokens: int = FIRST_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
) -> TokenPortrait:
    """Describe the massive token: dimensions, energy, steps, rigidity, and what sets it off.

    Rigidity between inputs is over different *first tokens*: with one fixed first token all texts
    are a single observation (causality). Definitions: docs/definitions.md.

    Args:    model: anything ``melens.load`` takes.
             me_layer: what ``melens.locate`` found on this model; None = locate first.
             prompts: texts, as for ``melens.locate``.
             first_tokens: how many tokens of the vocabulary to try alone at position 0.
             seed: chooses them.
             progress: called with (rows done, rows in all) while locating, then with first tokens.
    Raises:  ResultError: ``me_layer`` is of other weights. PromptError, ModelError: as ``locate``.
    """
    check_count(first_tokens)
    inputs = prepare(model, prompts)
    located = settle(inputs, me_layer, seed=seed, progress=progress)
    return portray(inputs, located, first_tokens=first_tokens, seed=seed, progress=progress)


def check_count(first_tokens: int) -> None:
    """Refuse a negative number of first tokens."""
    if not isinstance(first_tokens, int) or first_tokens < 0:
        raise PromptError(f"first_tokens must be a whole number from 0 on, got {first_tokens!r}.")


def portray(
    inputs: Inputs,
    located: Located,
    *,
    first_tokens: int,
    seed: int,
    progress: Progress | None = None,
) -> TokenPortrait:
    """:func:`describe` over inputs that were taken in already."""
    found = located.me_layer
    starts, untried = choose_starts(inputs, count=first_tokens, seed=seed)
    rigidity = Rigidity(found.n_layers, found.peak_layer or 0)
    chosen = _primary_prefixes(inputs, located)
    primary: Observation | None = None
    for seen in observe(inputs, chosen):
        primary = primary or seen
        rigidity.add(seen)
    first = bool(chosen) and len(chosen[0]) == 1
    rows: list[FirstTokenRow] = []
    for seen in observe(inputs, [[token] for token in starts]):
        token = seen.path.token_id
        row = first_token_row(seen.path, starts[token], found, token=inputs.decode(token))
        rows.append(row)
        if progress is not None:
            progress(len(rows), len(starts))
        if first and row.massive and token != chosen[0][0]:
            rigidity.add(seen)
    return TokenPortrait(
        me_layer=found.me_layer,
        peak_layer=found.peak_layer,
        n_layers=found.n_layers,
        massive=tuple(MassiveEntry(**token.model_dump()) for token in found.massive),
        inputs=rigidity.count,
        conditions=conditions(rows),
        first_tokens=tuple(rows),
        missing=(*_missing(inputs), *untried),
        run=inputs.run_info(seed=seed, first_tokens=first_tokens),
        **_portrait(inputs, found, primary, rigidity),
    )


def _primary_prefixes(inputs: Inputs, located: Located) -> list[list[int]]:
    """What makes the primary token: itself, where it is first; else its shortest occurrences.

    Raises:  PromptError: a later token that these texts do not hold.
    """
    if not located.me_layer.massive:
        return []
    wanted = located.me_layer.massive[0]
    if wanted.position == 0:
        return [[wanted.token_id]]
    prefixes: dict[tuple[int, ...], None] = {}
    for batch, heavy in zip(inputs.batches, located.heavy, strict=True):
        for i, column in heavy.nonzero().tolist():
            at = int(batch.positions[i, column])
            ids = batch.ids[i][batch.mask[i]][: at + 1].tolist()
            if at > 0 and ids[-1] == wanted.token_id:
                prefixes[tuple(ids)] = None
    if not prefixes:
        raise PromptError(
            f"the massive token {wanted.token!r} was located at position {wanted.position} of "
            "other texts and is not massive in these; locate on the texts that are described."
        )
    return [list(prefix) for prefix in sorted(prefixes, key=len)[:LATER_INPUTS]]


def _portrait(
    inputs: Inputs, found: MELayer, primary: Observation | None, rigidity: Rigidity
) -> JsonObject:
    if primary is None:
        return {
            "energy": None,
            "energy_layers": None,
            "energy_direction": None,
            "coordinates": (),
            "step_up": (),
            "step_down": (),
            "cosine_layers": (),
            "cosine_inputs": (),
            "sites": (),
            "norms": (),
        }
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


def _missing(inputs: Inputs) -> tuple[str, ...]:
    known = inputs.model.hook_dict
    silent = [
        f"{block.layer}.{norm}"
        for block in anatomy(inputs.model).blocks
        for norm in block.norms
        if f"blocks.{block.layer}.{norm}.hook_out" not in known
    ]
    if not silent:
        return ()
    return (f"norm outputs: the model has no such hook (blocks {', '.join(silent)})",)


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


def _alike(found: MELayer, first: MassiveToken) -> list[MassiveToken]:
    """Rows of the primary token: one a massive dimension."""
    return [
        token
        for token in found.massive
        if (token.position == 0, token.token_id) == (first.position == 0, first.token_id)
    ]


def _share(row: Tensor, dims: Sequence[int]) -> float:
    total = row.square().sum().clamp_min(torch.finfo(row.dtype).tiny)
    return (row[list(dims)].square().sum() / total).item()
