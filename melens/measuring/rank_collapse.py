"""collapse(): how many directions residual, queries, keys and values fill."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from melens.batches import Batch
from melens.capture import Reducer
from melens.errors import CaptureError, ModelError
from melens.inputs import Inputs, Source, prepare
from melens.measuring.located import Located, run_once, settle
from melens.metrics.spectrum import SPECTRAL
from melens.models.attention import AttentionSites, HeadView, attention_sites
from melens.protocols import ModelLike
from melens.results import Collapse
from melens.results.collapse import CollapseRow
from melens.results.reading import HoldsMELayer
from melens.settings import Progress

FLUSH_BYTES = 2**25
"""Matrices that wait are solved before they would pass this; one batch of a site may be more."""
SHARE = 32
"""Matrices that a thread takes at a time."""
Matrices = Float[Tensor, "group n n"]
_ALONE = threading.Lock()
"""The number of threads is the process's: two callers must not put back each other's."""
Taker = Callable[[list[Tensor]], None]


@dataclass
class EigenQueue:
    """Takes matrices in, gives each caller its eigenvalues back, at the latest on ``flush``."""

    waiting: list[tuple[list[Tensor], Taker]] = field(default_factory=list)
    held: int = 0

    def submit(self, matrices: list[Tensor], take: Taker) -> None:
        """``take`` is called with the eigenvalues ``[group, n]`` of every ``[group, n, n]``."""
        size = sum(matrix.numel() * matrix.element_size() for matrix in matrices)
        if self.held + size > FLUSH_BYTES:
            self.flush()
        self.waiting.append((matrices, take))
        self.held += size

    def flush(self) -> None:
        """Solve everything that waits."""
        ready, self.waiting, self.held = self.waiting, [], 0
        solved = iter(solve([matrix for matrices, _ in ready for matrix in matrices]))
        for matrices, take in ready:
            take([next(solved) for _ in matrices])


def solve(batches: list[Tensor]) -> list[Tensor]:
    """Ascending eigenvalues ``[group, n]`` of every ``[group, n, n]``.

    LAPACK takes matrices one after another, and its own threads gain nothing on small ones (288 of
    64 x 64: 31 ms with one thread and with two, 16 ms on two threads of ours): each of ours takes
    a share, and for that time torch is told to use one thread a call.

    On an accelerator all matrices of one size are one call, there; MELENS_EIG_DEVICE=cpu moves them
    to the CPU, once for all that wait, and solves them as above.
    """
    if eigen_device() == "cpu":
        batches = [batch.cpu() for batch in batches]
    if any(batch.device.type != "cpu" for batch in batches):
        return _solved_there(batches)
    shares = [batch.split(SHARE) for batch in batches]
    with _ALONE:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                parts = [part for share in shares for part in share]
                done = pool.map(torch.linalg.eigvalsh, parts)
                return [torch.cat([next(done) for _ in share]) for share in shares]
        finally:
            torch.set_num_threads(threads)


def eigen_device() -> str:
    """Where eigenvalues are computed: ``same`` as the activations, or ``cpu``.

    Raises:  ModelError: MELENS_EIG_DEVICE says something else.
    """
    chosen = os.environ.get("MELENS_EIG_DEVICE") or "same"
    if chosen not in ("cpu", "same"):
        raise ModelError(f"MELENS_EIG_DEVICE is {chosen!r:.40}; it takes cpu or same.")
    return chosen


def _solved_there(batches: list[Tensor]) -> list[Tensor]:
    """One call for each size and device: an accelerator is slow to start, not to compute."""
    groups: dict[tuple[torch.device, int], list[int]] = {}
    for number, batch in enumerate(batches):
        groups.setdefault((batch.device, batch.shape[-1]), []).append(number)
    found: dict[int, Tensor] = {}
    for numbers in groups.values():
        solved = torch.linalg.eigvalsh(torch.cat([batches[number] for number in numbers]))
        parts = solved.split([len(batches[number]) for number in numbers])
        found |= dict(zip(numbers, parts, strict=True))
    return [found[number] for number in range(len(batches))]


VARIANTS = ("with", "with_centred", "without", "without_centred")
"""All rows or all but the massive ones; as they are or less their mean row."""
NOTHING_LEFT = 1e-12
"""Rows that keep less than this of their energy when centred are equal: nothing is defined."""


@dataclass
class Spectra:
    """Reducer: per head, the mean over sequences of every spectral definition.

    Keeps one sum a head, definition and variant. Each sequence's second moments are formed in
    float64 and their eigenvalues, the squared singular values, are all that is used.
    """

    view: HeadView
    heavy: Sequence[Tensor]
    """[batch, pos] marks of massive rows, batch by batch in the order they come."""
    queue: EigenQueue = field(default_factory=EigenQueue)
    """Shared between sites, so that many spectra are solved together."""
    sums: Tensor | None = None
    """[variant, definition, head], and how many sequences each sum holds in ``counts``."""
    counts: Tensor | None = None
    seen: int = 0

    def update(self, x: Tensor, batch: Batch) -> None:
        """Take in one batch of the site's activations."""
        heavy = self.heavy[self.seen]
        self.seen += 1
        exact = x.detach().cpu() if x.device.type == "mps" else x.detach()
        rows = self.view.by_head(exact).double().contiguous()
        if batch.padded:
            rows = rows.masked_fill(~batch.mask.to(rows.device)[:, None, :, None], 0.0)
        if not rows.isfinite().all():
            raise ModelError(
                f"{self.view.hook} holds NaN or Inf at real tokens; load the model with dtype "
                "float32 or bfloat16."
            )
        moments = list(_moments(rows, batch.mask.to(rows.device), heavy.to(rows.device)))
        shape = moments[0].shape[:-1]
        self.queue.submit(
            [moment.flatten(0, 1) for moment in moments],
            lambda values: self._take(torch.stack([part.reshape(shape) for part in values])),
        )

    def _take(self, values: Float[Tensor, "variant batch head n"]) -> None:
        s = _singular_values(values)
        found = torch.stack([define(s) for define in SPECTRAL.values()], dim=1)
        if len(found) < len(VARIANTS):  # nothing massive: without is with
            found = torch.cat([found, found])
        found = rearrange(found, "variant definition batch head -> batch variant definition head")
        defined = found.isfinite()
        sums = reduce(found.where(defined, 0.0), "batch ... -> ...", "sum").cpu()
        counts = reduce(defined.long(), "batch ... -> ...", "sum").cpu()
        self.sums = sums if self.sums is None else self.sums + sums
        self.counts = counts if self.counts is None else self.counts + counts

    def result(self) -> Float[Tensor, "variant definition head"]:
        """Means over the sequences where a value is defined; NaN where there are none."""
        self.queue.flush()
        if self.sums is None or self.counts is None:
            raise CaptureError("Spectra saw no batch; pass it to stream() first.")
        return self.sums / self.counts


def _singular_values(
    values: Float[Tensor, "variant batch head n"],
) -> Float[Tensor, "variant batch head n"]:
    """Roots of the eigenvalues; rounding noise is zero, and so are all of rows that are equal."""
    noise = values.shape[-1] * torch.finfo(values.dtype).eps
    values = values.where(values > noise * values.amax(-1, keepdim=True), 0.0)
    energy = reduce(values, "variant batch head n -> variant batch head 1", "sum")
    whole = energy.unflatten(0, (-1, 2))[:, :1].expand(-1, 2, -1, -1, -1).flatten(0, 1)
    return values.where(energy > NOTHING_LEFT * whole, 0.0).sqrt()


def _moments(
    rows: Float[Tensor, "batch head pos d"],
    mask: Bool[Tensor, "batch pos"],
    heavy: Bool[Tensor, "batch pos"],
) -> Iterator[Float[Tensor, "batch head n n"]]:
    """Second moments in the order of VARIANTS; only the first two where nothing is massive.

    In the smaller of token and feature space: both have the same nonzero eigenvalues. ``rows`` are
    zero at padding.
    """
    kept = [mask, mask & ~heavy] if heavy.any() else [mask]
    if rows.shape[-2] <= rows.shape[-1]:
        gram = rows @ rows.mT
        for keep in kept:
            yield from _in_token_space(gram, keep)
        return
    moment, total = rows.mT @ rows, reduce(rows, "batch head pos d -> batch head d 1", "sum")
    for keep in kept:
        if keep is not mask:
            gone = _picked(rows, heavy)
            moment = _less(moment, gone.mT)
            total = total - reduce(gone, "batch head pos d -> batch head d 1", "sum")
        yield moment
        yield _less(moment, total / _count(keep).sqrt())


def _less(
    moment: Float[Tensor, "batch head n n"], columns: Float[Tensor, "batch head n some"]
) -> Float[Tensor, "batch head n n"]:
    """Moments less those of a few columns, in one operation."""
    flat = columns.flatten(0, 1)
    return torch.baddbmm(moment.flatten(0, 1), flat, flat.mT, alpha=-1).reshape(moment.shape)


def _in_token_space(
    gram: Float[Tensor, "batch head n n"], keep: Bool[Tensor, "batch n"]
) -> Iterator[Float[Tensor, "batch head n n"]]:
    """The kept rows as they are, then less their mean: H G H with H = I - 1 1^T / n."""
    both = keep[:, None, :, None] & keep[:, None, None, :]
    gram = gram * both
    yield gram
    row = reduce(gram, "batch head i j -> batch head i 1", "sum") / _count(keep)
    total = reduce(row, "batch head i 1 -> batch head 1 1", "sum") / _count(keep)
    yield (gram - row - row.mT + total) * both


def _picked(
    rows: Float[Tensor, "batch head pos d"], heavy: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch head most d"]:
    """The massive rows alone, filled up with zeros where a sequence has fewer."""
    most = int(heavy.sum(-1).max())
    at = heavy.int().argsort(dim=-1, descending=True, stable=True)[:, :most]
    real = heavy.gather(1, at)[:, None, :, None]
    index = at[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[-1])
    return rows.gather(2, index) * real


def _count(keep: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch 1 1 1"]:
    return reduce(keep.double(), "batch pos -> batch 1 1 1", "sum").clamp_min(1)


def collapse(
    model: ModelLike,
    me_layer: HoldsMELayer | None = None,
    prompts: Source = None,
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
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
    """
    eigen_device()  # refused before work starts
    inputs = prepare(model, prompts, batch_size=batch_size)
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
