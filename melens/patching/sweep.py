"""patch(): put one run's activations into another, everywhere; finished cells stay on disk."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from melens.batches import Batch
from melens.batches import prompts as make_prompts
from melens.capture import evaluating
from melens.errors import MetricError, ModelError, PromptError, ResultError
from melens.inputs import Inputs, Source
from melens.measuring.located import check_same_model
from melens.patching.choices import Sweep, cells_of, columns_of
from melens.patching.metrics import Own, PatchMetric, metric_of
from melens.patching.readouts import Readout
from melens.patching.sites import PatchPlace, places_of
from melens.patching.waves import (
    LEAST_TOKENS,
    PatchCell,
    Values,
    changes,
    fits,
    mean_values,
    plan_waves,
    resampled_values,
    run_wave,
    tokens_at_once,
    values_of,
    written,
)
from melens.protocols import JsonObject, ModelLike
from melens.results.patch import Axis, Nested, PatchGrid
from melens.resume import Resumable
from melens.settings import Progress
from melens.store import (
    ROWS,
    Heading,
    Refusal,
    hash_facts,
    json_object,
    read_text,
    write_atomically,
)

SCHEMA = "melens/patch-cells/1"
REFUSAL = Refusal(
    damaged="the checkpoint {path} is damaged; delete it to start again.",
    foreign="{path} is no patching checkpoint; choose another path.",
    other="the checkpoint {path} is of another sweep (other weights, tokens, sites, metric or "
    "mode); delete it to start again, or choose another path.",
)
SECONDS = 3.0
"""Between two savings: what a power cut may cost."""


class Cells:
    """Values of finished cells by key, one a row of the batch; on disk if there is a path."""

    def __init__(self, path: Path | None, inputs: str) -> None:
        """Go on from ``path`` if it is there.

        Args:    inputs: fingerprint of everything the numbers depend on.
        Raises:  ResultError: the file is of other inputs, or no checkpoint.
        """
        self.path, self.heading = path, Heading(SCHEMA, inputs)
        self.done: dict[str, list[float]] = {}
        self._saved = time.monotonic()
        self._dirty = False
        if path is not None and path.exists():
            self.done = self._read(path)

    def add(self, found: dict[str, list[float]]) -> None:
        """Take in a finished wave; saves every few seconds."""
        self.done.update(found)
        self._dirty = True
        if time.monotonic() - self._saved > SECONDS:
            self.save()

    def save(self) -> None:
        """Write what is not on disk yet."""
        if self.path is None or not self._dirty:
            return
        data = {"schema": SCHEMA, "inputs": self.heading.key, "cells": self.done}
        write_atomically(self.path, json.dumps(data, sort_keys=True, allow_nan=False))
        self._saved, self._dirty = time.monotonic(), False

    def _read(self, path: Path) -> dict[str, list[float]]:
        text = read_text(path, ROWS, error=ResultError, what="the checkpoint")
        data = json_object(text) or {}  # what is no JSON is no checkpoint either
        self.heading.fits({**data, "key": data.get("inputs")}, REFUSAL, path)
        cells = data.get("cells")
        if not isinstance(cells, dict) or not all(map(_is_values, cells.values())):
            raise ResultError(REFUSAL.damaged.format(path=path))
        return cells


def _is_values(found: object) -> bool:
    return isinstance(found, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
        for value in found
    )


def fields_of(
    choice: Sweep,
    metric: PatchMetric,
    places: Mapping[str, Sequence[PatchPlace]],
    inputs: Sequence[Inputs],
    cells: Sequence[PatchCell],
    done: Mapping[str, Sequence[float]],
) -> JsonObject:
    """A PatchGrid's fields but for the unpatched values and the record of the run.

    Args:    inputs: the clean run's and the corrupted one's.
             done: values of every cell, one a sequence.
    """
    axes = {site: _axes(choice, site, found, inputs) for site, found in places.items()}
    at = {(c.place.site, c.place.layer, c.position, c.head): done[c.key] for c in cells}
    rows = inputs[0].total

    def values(row: int | None) -> dict[str, Nested]:
        return {site: _nest(site, shape, at, row) for site, shape in axes.items()}

    return {
        "mode": choice.mode,
        "metric": metric.name,
        "metric_about": metric.about,
        "sites": tuple(places),
        "axes": axes,
        "values": values(None),
        "sequences": rows,
        "by_sequence": tuple(values(row) for row in range(rows)) if rows > 1 else (),
    }


def _axes(
    choice: Sweep, site: str, places: Sequence[PatchPlace], inputs: Sequence[Inputs]
) -> tuple[Axis, ...]:
    layers = tuple(place.layer for place in places)
    heads = tuple(range(places[0].heads or 0))
    made = {
        "layer": Axis(name="layer", index=layers, label=tuple(map(str, layers))),
        "position": Axis(
            name="position",
            index=columns_of(choice, inputs[0].batches[0]),
            label=_tokens(choice, inputs),
        ),
        "head": Axis(name="head", index=heads, label=tuple(map(str, heads))),
    }
    return tuple(made[name] for name in choice.axes(site))


def _tokens(choice: Sweep, inputs: Sequence[Inputs]) -> tuple[str, ...]:
    """Of the first sequence that has the position; both where clean and corrupted differ, clean
    first; dots where other sequences hold another token.
    """  # noqa: D205
    columns = columns_of(choice, inputs[0].batches[0])
    clean, corrupted = ([_token(found, column) for column in columns] for found in inputs)
    return tuple(a if a == b else f"{a} | {b}" for a, b in zip(clean, corrupted, strict=True))


def _token(found: Inputs, column: int) -> str:
    batch = found.batches[0]
    here = batch.ids[:, column][batch.mask[:, column]].tolist()
    return found.decode(here[0]) + (" ..." if len(set(here)) > 1 else "")


def _nest(
    site: str,
    axes: Sequence[Axis],
    at: Mapping[tuple[str, int, int | None, int | None], Sequence[float]],
    row: int | None,
) -> Nested:
    names = [axis.name for axis in axes]

    def value(chosen: Mapping[str, int]) -> float:
        found = at[(site, chosen["layer"], chosen.get("position"), chosen.get("head"))]
        return float(math.fsum(found) / len(found)) if row is None else float(found[row])

    def nest(chosen: dict[str, int], depth: int) -> Any:
        if depth == len(axes):
            return value(chosen)
        return tuple(nest({**chosen, names[depth]: i}, depth + 1) for i in axes[depth].index)

    return nest({}, 0)


LONG = 1 << 20


@torch.no_grad()
def patch(
    model: ModelLike,
    clean: Source,
    corrupted: Source = None,
    *,
    progress: Progress | None = None,
    checkpoint: Path | str | None = None,
    **sweep: Any,
) -> PatchGrid:
    """Patch activations of one run into another, cell by cell, and measure each patched run.

    Equal to running the model once a cell with a hook, at a fraction of the cost: a run is resumed
    at the layer and position of its patch, many together, and unembedded only where the metric
    looks. Interventions entered before the call act on all runs.

    Args:    model: anything ``melens.load`` takes.
             clean: a text, texts, or one token batch.
             corrupted: the same, of equal shape token by token; None = ablation of ``clean``.
             sweep: the fields of :class:`melens.patching.Sweep`: ``sites``, ``metric``, ``mode``,
             ``by``, ``layers``, ``positions``, ``seed``.
             progress: called with (cells done, cells in all).
             checkpoint: a file that keeps finished cells; the same call goes on from it.
    Returns: a frozen :class:`melens.results.patch.PatchGrid`.
    Raises:  PromptError: texts that do not fit each other. SiteError: a site, layer, position or
             axis that is not there. MetricError: a metric that is undefined here.
             ContractError: the model cannot be resumed. ResultError: a checkpoint of another sweep,
             or a ME Layer of another model. UnknownNameError: a site, metric or mode.
    """
    choice = Sweep(paired=corrupted is not None, **sweep)
    metric = metric_of(choice.metric)
    ready = Inputs.of(model)
    first = _one_batch(ready, clean, "clean")
    second = None if corrupted is None else _one_batch(ready, corrupted, "corrupted")
    if second is not None:
        _check_pair(first.batches[0], second.batches[0])
    if checkpoint is not None and isinstance(metric, Own):
        raise MetricError(
            "a function of one's own cannot be told from another after an interrupt; drop "
            "checkpoint, or take one of melens.patching's metrics."
        )
    with evaluating(ready.model):
        prepared = _Prepared(first, second, choice, metric)
        cells = Cells(None if checkpoint is None else Path(checkpoint), prepared.fingerprint)
        try:
            _run_all(prepared, cells, progress)
        finally:
            cells.save()
    return prepared.result(cells.done)


class _Prepared:
    """Both runs recorded, what to write at every place, and all cells."""

    def __init__(
        self, clean: Inputs, corrupted: Inputs | None, choice: Sweep, metric: PatchMetric
    ) -> None:
        self.choice, self.metric = choice, metric
        self.clean, self.corrupted = clean, corrupted
        model = clean.model
        _check_located(metric, clean)
        into, self.other = clean, corrupted
        if choice.mode == "denoising" and corrupted is not None:
            into, self.other = corrupted, clean
        found = {site: places_of(model, site, choice.layers) for site in choice.sites}
        self.places = {site: places for site, (places, _) in found.items()}
        self.missing = tuple(line for _, lines in found.values() for line in lines)
        self.cells = cells_of(choice, self.places, clean.batches[0])
        self.run = Resumable(model, into.batches[0])
        self.readout: Readout = metric.bind(self.run, self.run)
        self.unpatched = _finite(self.readout.unpatched().tolist(), "the unpatched run")
        self.others = self._of_other_run()
        self.source = self._source()

    @property
    def fingerprint(self) -> str:
        """Everything the numbers depend on."""
        facts = [
            self.clean.weights,
            self.metric.about,
            self.choice.facts,
            *(_ids(inputs) for inputs in (self.clean, self.corrupted) if inputs is not None),
            str(next(self.run.model.parameters()).dtype),
            # edits that are open around the call change these, and nothing else here
            *(f"{value:.5g}" for value in (*self.unpatched, *(self.others or ()))),
        ]
        return hash_facts(facts)

    @property
    def differs_from(self) -> int:
        """First column whose token differs between a pair in any sequence; 0 under ablation."""
        if self.corrupted is None:
            return 0
        same = self.clean.batches[0].ids.cpu() == self.corrupted.batches[0].ids.cpu()
        return int(same.all(0).long().cumprod(0).sum())

    def result(self, done: dict[str, list[float]]) -> PatchGrid:
        """The grid of all cells."""
        clean, corrupted = self.unpatched, self.others
        if self.choice.mode == "denoising" and self.others is not None:
            clean, corrupted = self.others, self.unpatched
        settings = {
            "sites": ",".join(self.choice.sites),
            "mode": self.choice.mode,
            "metric": self.metric.about,
        }
        info = self.clean.run_info(seed=self.choice.seed, **settings)
        inputs = [self.clean, self.corrupted or self.clean]
        return PatchGrid(
            **fields_of(self.choice, self.metric, self.places, inputs, self.cells, done),
            clean=_mean(clean),
            corrupted=_mean(corrupted) if corrupted is not None else None,
            missing=self.missing,
            run=info,
        )

    def _of_other_run(self) -> list[float] | None:
        """The metric of the run that patches come from; None under ablation."""
        if self.other is None:
            return None
        other = Resumable(self.run.model, self.other.batches[0])
        return _finite(
            self.metric.bind(other, self.run).unpatched().tolist(), "the other unpatched run"
        )

    def _source(self) -> Values:
        places = [place for found in self.places.values() for place in found]
        batch = (self.other or self.clean).batches[0]
        values: Values = values_of(self.run.model, batch, places)
        if self.choice.mode == "mean":
            values = mean_values(values, batch.mask)
        elif self.choice.mode == "resample":
            values = resampled_values(values, batch, seed=self.choice.seed)
        return written(values, self.run.resid_pre)


def _run_all(prepared: _Prepared, cells: Cells, progress: Progress | None) -> None:
    """Run what is not done; half the tokens at once whenever memory runs out."""
    left = [cell for cell in prepared.cells if cell.key not in cells.done]
    idle = {
        cell.key: prepared.unpatched
        for cell in left
        if not changes(cell, prepared.readout, differs_from=prepared.differs_from)
    }
    cells.add(idle)
    left = [cell for cell in left if cell.key not in idle]
    most = tokens_at_once(prepared.run)
    while left:
        for wave in plan_waves(left, prepared.run, most=most, least=min(LEAST_TOKENS, most)):
            if not fits(lambda wave=wave: _run_one(prepared, cells, wave)):
                most = _halved(most, wave, prepared)
                break
            if progress is not None:
                progress(len(cells.done), len(prepared.cells))
        left = [cell for cell in left if cell.key not in cells.done]
    if progress is not None:
        progress(len(prepared.cells), len(prepared.cells))


def _run_one(prepared: _Prepared, cells: Cells, wave: Sequence[PatchCell]) -> None:
    found = run_wave(wave, prepared.run, prepared.source, prepared.readout)
    real = prepared.run.batch.mask.tolist()
    for cell in wave:
        if cell.position is not None:  # a sequence that ends before it has nothing to patch there
            found[cell.key] = [
                value if real[row][cell.position] else prepared.unpatched[row]
                for row, value in enumerate(found[cell.key])
            ]
        _finite(found[cell.key], f"patching {cell.place.site} at layer {cell.place.layer}")
    cells.add(found)


def _halved(most: int, wave: Sequence[PatchCell], prepared: _Prepared) -> int:
    tokens = prepared.run.batch.ids.numel()
    if len(wave) == 1:
        raise _TooLarge(
            f"out of memory on one patched run of {tokens} tokens; give fewer or shorter sequences."
        )
    return max(1, min(most, len(wave) * tokens) // 2)


class _TooLarge(ModelError):
    """Not even one patched run fits."""

    exit_code = 3


def _one_batch(ready: Inputs, source: Source, name: str) -> Inputs:
    """Texts keep their full length here: the last token is what most metrics look at."""
    texts = [source] if isinstance(source, str) else source
    if isinstance(texts, (list, tuple)) and texts and all(isinstance(t, str) for t in texts):
        limit = getattr(ready.model.cfg, "n_ctx", None)
        source = make_prompts(list(map(str, texts)), length=limit or LONG)
    inputs = ready.over(source, batch_size=LONG, least=1)
    if len(inputs.batches) != 1:
        raise PromptError(
            f"{name} makes {len(inputs.batches)} batches; patching runs on one: put the sequences "
            "into a single melens.batches.Batch."
        )
    return inputs


def _check_pair(clean: Batch, corrupted: Batch) -> None:
    """Every token of one run must have its counterpart in the other."""
    if clean.ids.shape != corrupted.ids.shape:
        raise PromptError(
            f"clean is {tuple(clean.ids.shape)} tokens, corrupted {tuple(corrupted.ids.shape)} "
            "(sequences, tokens); patching puts token i into token i, so reword one until both "
            "have the same shape."
        )
    if torch.equal(clean.ids.cpu(), corrupted.ids.cpu()):
        raise PromptError(
            "clean and corrupted are the same tokens, so no patch can change a thing."
        )
    if not torch.equal(clean.mask.cpu(), corrupted.mask.cpu()):
        rows = (clean.mask.cpu() != corrupted.mask.cpu()).any(1).nonzero().flatten().tolist()
        raise PromptError(
            f"sequences {rows[:4]} have other lengths in clean and corrupted; each pair must have "
            "the same number of tokens, padded on the same side."
        )


def _check_located(metric: PatchMetric, inputs: Inputs) -> None:
    found = getattr(metric, "me_layer", None)
    if found is not None:
        check_same_model(inputs, found)


def _ids(inputs: Inputs) -> list[list[list[int]]]:
    batch = inputs.batches[0]
    return [batch.ids.tolist(), batch.mask.long().tolist()]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _finite(values: list[float], what: str) -> list[float]:
    if not all(map(math.isfinite, values)):
        raise MetricError(f"{what} makes the metric NaN or Inf; load the model in float32.")
    return values
