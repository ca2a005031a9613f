"""Waves: many patched runs resumed together, as many as memory holds."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from melens.batches import Batch
from melens.capture import hooked, stream
from melens.errors import CaptureError, PromptError
from melens.intervals import random_order
from melens.models.anatomy import resid_pre
from melens.patching.readouts import Readout
from melens.patching.sites import PatchPlace
from melens.protocols import HookedModel
from melens.resume import Resumable
from melens.shapes import TokenMask

CPU_TOKENS = 1024
"""Measured on two cores: from 64 to 2,048 tokens a matrix product runs at one speed; larger waves
leave the cache.
"""
GPU_TOKENS = 65536
LEAST_TOKENS = 128
"""Below it a block spends its time on calls and on reading weights."""
SHARE = 0.3
"""Of the free memory: others run too, and the estimate is rough."""
UNKNOWN_BYTES = 2**31


def tokens_at_once(run: Resumable) -> int:
    """Tokens a wave may have."""
    device = run.batch.ids.device
    fits = int(SHARE * free_bytes(device) / bytes_per_token(run))
    return max(1, min(fits, CPU_TOKENS if device.type == "cpu" else GPU_TOKENS))


def bytes_per_token(run: Resumable) -> int:
    """A block's largest tensors at one moment, per token that it runs."""
    cfg, width = run.model.cfg, run.batch.ids.shape[1]
    hidden = getattr(cfg, "d_mlp", None) or 4 * cfg.d_model
    heads = cfg.n_heads * cfg.d_head
    # scores and pattern, and the whole sequences' keys and values that a one-token suffix sees
    attention = 3 * cfg.n_heads * width + 4 * heads * width
    return 4 * (8 * cfg.d_model + 4 * hidden + attention)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device; 2 GB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return UNKNOWN_BYTES
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return UNKNOWN_BYTES


def fits(task: Callable[[], None]) -> bool:
    """Do ``task``; False where memory ran out. Anything else is raised."""
    try:
        task()
    except (MemoryError, torch.OutOfMemoryError):
        pass
    except RuntimeError as error:
        if "alloc" not in str(error) or "memory" not in str(error):
            raise
    else:
        return True
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


@dataclass(frozen=True)
class PatchCell:
    """One patched run: a place, the columns patched there, and a head (None = all)."""

    place: PatchPlace
    columns: tuple[int, ...]
    position: int | None
    """The column swept, None where all of ``columns`` are patched together."""
    head: int | None

    @property
    def start(self) -> int:
        """The first column that can change."""
        return min(self.columns)

    @property
    def key(self) -> str:
        """Its name in a checkpoint."""
        axes = (self.place.layer, self.position, self.head)
        return " ".join([self.place.site, *("-" if axis is None else str(axis) for axis in axes)])


def changes(cell: PatchCell, readout: Readout, *, differs_from: int) -> bool:
    """Whether the metric can feel the patch: not after its positions or layers, and not where
    both runs are one because no token before ``differs_from`` differs.
    """  # noqa: D205
    felt = cell.start <= readout.last_column and cell.place.layer < readout.stop
    return felt and max(cell.columns) >= differs_from


def plan_waves(
    cells: Sequence[PatchCell], run: Resumable, *, most: int, least: int
) -> list[list[PatchCell]]:
    """Cells in groups that share a start, each of at most ``most`` tokens (at least one cell).

    Late positions leave short suffixes; they are taken together with the next ones until a group
    has ``least`` tokens, so that matrix products stay large.
    """
    rows, width = run.batch.ids.shape
    by_start: dict[int, list[PatchCell]] = defaultdict(list)
    for cell in cells:
        by_start[cell.start if run.suffixes else 0].append(cell)
    waves: list[list[PatchCell]] = []
    group: list[PatchCell] = []
    tokens = 0
    for start in sorted(by_start):
        tokens = tokens or rows * (width - start)
        group += by_start[start]
        if len(group) * tokens >= least:
            waves += _pieces(group, max(1, most // tokens))
            group, tokens = [], 0
    return waves + _pieces(group, max(1, most // tokens) if group else 1)


def _pieces(group: Sequence[PatchCell], size: int) -> list[list[PatchCell]]:
    """Near layers together: a wave begins at its first one."""
    ordered = sorted(group, key=lambda cell: cell.place.joins)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def run_wave(
    wave: Sequence[PatchCell], run: Resumable, source: Mapping[PatchPlace, Tensor], readout: Readout
) -> dict[str, list[float]]:
    """Run one wave; per cell its key and the metric of every row of the batch."""
    start = min(cell.start for cell in wave) if run.suffixes else 0
    joining: dict[int, list[PatchCell]] = defaultdict(list)
    for cell in wave:
        joining[cell.place.joins].append(cell)
    rows = len(run.batch)
    resid = run.resid_pre(0)[:0, start:]
    done: list[PatchCell] = []
    notes: dict[object, Tensor] = {}
    readout.begin(start)
    for layer in range(min(joining), readout.stop + 1):
        fresh = joining.get(layer, [])
        if fresh:
            resid = torch.cat([resid, _entering(fresh, run, source, start)])
            readout.join(layer, len(fresh))
        if layer < readout.stop:
            hooks = [*_edits(fresh, source, len(done) * rows, start), *readout.hooks(layer)]
            with hooked(run.model, hooks):
                resid = run.block(layer, resid, start=start, notes=notes)
        done += fresh
    values = readout.values(resid, start).reshape(len(done), rows).tolist()
    return {cell.key: found for cell, found in zip(done, values, strict=True)}


def _entering(
    cells: Sequence[PatchCell], run: Resumable, source: Mapping[PatchPlace, Tensor], start: int
) -> Tensor:
    """The unpatched stream for each cell, patched where its place is the stream itself."""
    clean = run.resid_pre(cells[0].place.joins)[:, start:]
    made = clean.repeat(len(cells), 1, 1)
    for cell, block in zip(cells, made.split(len(clean)), strict=True):
        if cell.place.enters is not None:
            _write(cell, block, source[cell.place], start)
    return made


def _edits(
    cells: Sequence[PatchCell], source: Mapping[PatchPlace, Tensor], before: int, start: int
) -> list[tuple[str, Callable[..., object]]]:
    """One editing hook a site; it touches the rows of its own cells, which follow ``before``."""
    by_hook: dict[str, list[tuple[int, PatchCell]]] = defaultdict(list)
    for i, cell in enumerate(cells):
        if cell.place.enters is None:
            by_hook[cell.place.hook].append((i, cell))

    def editing(mine: Sequence[tuple[int, PatchCell]]) -> Callable[..., Tensor]:
        def edit(x: Tensor, hook: object) -> Tensor:
            x = x.clone()
            for i, cell in mine:
                rows = len(source[cell.place])
                first = before + i * rows
                _write(cell, cell.place.view(x)[first : first + rows], source[cell.place], start)
            return x

        return edit

    return [(hook, editing(mine)) for hook, mine in by_hook.items()]


def _write(cell: PatchCell, view: Tensor, value: Tensor, start: int) -> None:
    columns = torch.tensor(cell.columns, device=view.device)
    value = value.to(view.device)[:, columns].to(view.dtype)
    write_into(view, value, columns - start, cell.head)


Values = Mapping[PatchPlace, Tensor]
"""Place -> ``[batch, pos, d]`` or ``[batch, pos, head, d]``: what is written there."""


@dataclass
class Whole:
    """Reducer: one batch's tensor as it is."""

    kept: Tensor | None = None

    def update(self, x: Tensor, batch: Batch) -> None:
        """Keep the tensor of the one batch there is."""
        self.kept = x.detach().clone()

    def result(self) -> Tensor:
        """The kept tensor."""
        if self.kept is None:
            raise CaptureError("Whole saw no batch; pass it to stream() first.")
        return self.kept


def values_of(
    model: HookedModel, batch: Batch, places: Sequence[PatchPlace]
) -> dict[PatchPlace, Tensor]:
    """Every place's value in a run over ``batch``; one forward pass."""
    hooks = {place.hook for place in places}
    hooks |= {resid_pre(place.layer) for place in places if place.middle}
    taps = {hook: Whole() for hook in sorted(hooks)}
    stream(model, batch, taps)
    made = {}
    for place in places:
        made[place] = place.view(taps[place.hook].result())
        if place.middle:
            made[place] = made[place] + taps[resid_pre(place.layer)].result().to(made[place].device)
    return made


def mean_values(values: Values, mask: TokenMask) -> dict[PatchPlace, Tensor]:
    """Every token's value replaced by the mean over real tokens and sequences, per channel."""

    def mean(x: Tensor) -> Tensor:
        return x[mask.to(x.device)].float().mean(0).to(x.dtype).expand_as(x)

    return {place: mean(x) for place, x in values.items()}


def resampled_values(values: Values, batch: Batch, *, seed: int) -> dict[PatchPlace, Tensor]:
    """Every sequence's values replaced by those of another one, at the same positions.

    Raises:  PromptError: fewer than two sequences, or sequences of different lengths.
    """
    rows = len(batch)
    if rows < 2:
        raise PromptError(
            "resample ablation takes another sequence's activations and got 1 sequence; give at "
            "least 2, or use mode='mean'."
        )
    if not (batch.mask == batch.mask[:1]).all():
        raise PromptError(
            "resample ablation needs sequences of one length: padding has no activation to lend."
        )
    order = other_rows(rows, seed=seed)
    return {place: x[order.to(x.device)] for place, x in values.items()}


def other_rows(rows: int, *, seed: int) -> Tensor:
    """A seeded permutation of the rows without fixed points: one random cycle through all."""
    cycle = random_order(rows, seed=seed)
    order = torch.empty_like(cycle)
    order[cycle] = cycle.roll(-1)
    return order


def written(values: Values, stream_at: Callable[[int], Tensor]) -> dict[PatchPlace, Tensor]:
    """What to write at each place so that it holds its value.

    The stream after attention cannot be set directly: attention is made to write what is missing.
    """

    def write(place: PatchPlace, x: Tensor) -> Tensor:
        if not place.middle:
            return x
        return (x.float() - stream_at(place.layer).to(x.device).float()).to(x.dtype)

    return {place: write(place, x) for place, x in values.items()}


def write_into(view: Tensor, value: Tensor, columns: Tensor, head: int | None) -> None:
    """Put ``value`` into ``view`` in place, both ``[batch, columns, (head,) d]``."""
    if head is None:
        view.index_copy_(1, columns, value)
    else:
        view[:, :, head].index_copy_(1, columns, value[:, :, head])
