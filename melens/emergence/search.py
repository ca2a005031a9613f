"""locate(): one forward pass over the texts, a second over a few tokens, one honest result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path as FilePath
from typing import Any

import torch

from melens.batches import Batch, Prompts
from melens.batches import prompts as make_prompts
from melens.capture import check_ids, stream
from melens.emergence.assemble import assemble
from melens.emergence.profile import LayerProfile, SequenceRow
from melens.emergence.thresholds import MIN_TOKENS
from melens.emergence.tokens import Group, group_hits, sample_first_tokens
from melens.emergence.trajectory import Path, trace
from melens.errors import PromptError
from melens.models.anatomy import is_folded, resid_post, resid_pre
from melens.models.loading import adopt
from melens.models.origin import fingerprint, origin_of
from melens.provenance import ModelFacts, RunInfo
from melens.results import MELayer

FIRST_PROBES = 8
"""Other first tokens tried alone, sampled from the texts' own tokens."""
FIRST_GROUPS = 16
LATER_GROUPS = 4


def locate(
    model: Any,
    prompts: Prompts | str | FilePath | Iterable[str] | Iterable[Batch] | Batch | None = None,
    *,
    batch_size: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> MELayer:
    """Find the layer where a model's massive activations emerge.

    Layers count from 0 and mean the output of the block; all statistics are float32 or float64.
    Definitions: docs/definitions.md.

    Args:    model: anything ``melens.load`` takes.
             prompts: what ``melens.prompts`` makes, a source for it, or token batches; None =
             the bundled texts, 8 x 128 tokens, BOS as the tokenizer does.
             batch_size: rows a forward pass, for texts (ready batches stay as they are).
             seed: chooses the first tokens that are tried alone.
             progress: called with (rows done, rows in all).
    Returns: a frozen :class:`MELayer`.
    Raises:  PromptError: no row of at least 4 tokens, or no tokenizer to make rows with.
             ModelError and its kinds: the model cannot be loaded or its hooks do not add up.
    """  # fmt: skip
    hooked = adopt(model)
    batches = _batches(hooked, prompts, batch_size)
    ids = [
        row[mask].tolist()
        for batch in batches
        for row, mask in zip(batch.ids, batch.mask, strict=True)
    ]
    run = _run_info(hooked, seed, _settings(hooked, prompts, ids))
    steps = _profile(hooked, batches, progress)
    groups = group_hits(steps)
    probes = sample_first_tokens(ids, groups, count=FIRST_PROBES, seed=seed)
    paths, probed = _trace(hooked, groups, probes, ids)
    decode = _decoder(getattr(hooked, "tokenizer", None))
    first_ids = len({row[0] for row in ids})
    return assemble(steps, paths, probed, first_ids=first_ids, decode=decode, run=run)


def _batches(model: Any, source: Any, batch_size: int) -> list[Batch]:
    limit = getattr(model.cfg, "n_ctx", None)
    if isinstance(source, Batch):
        source = [source]
    elif isinstance(source, Iterable) and not isinstance(source, (str, Prompts)):
        source = list(source)
    if isinstance(source, list) and source and all(isinstance(item, Batch) for item in source):
        batches = source
    else:
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise PromptError(
                "this model has no tokenizer; load it with melens.load(model, tokenizer=...), or "
                "pass token batches (melens.Batch.of)."
            )
        if not isinstance(source, Prompts):
            source = make_prompts("bundled" if source is None else source)
        batches = source.pack(tokenizer, batch_size=batch_size, max_length=limit)
    lengths = torch.cat([batch.mask.sum(-1).cpu() for batch in batches])
    if lengths.min() < MIN_TOKENS:
        raise PromptError(
            f"sequence {int(lengths.argmin())} has {int(lengths.min())} tokens; locating needs at "
            f"least {MIN_TOKENS}, to have ordinary tokens to compare with."
        )
    if limit and lengths.max() > limit:
        raise PromptError(
            f"a sequence has {int(lengths.max())} tokens; the model's context is {limit}."
        )
    for batch in batches:
        check_ids(model, batch)
    return batches


def _settings(model: Any, source: Any, ids: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What a run was fed, so that it can be made again."""
    start = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    made = source if isinstance(source, Prompts) else Prompts(())
    return {
        "sequences": len(ids),
        "tokens": sum(map(len, ids)),
        "ids": hashlib.sha256(repr(sorted(map(list, ids))).encode()).hexdigest()[:16],
        "bos_first": start is not None and all(row[0] == start for row in ids),
        "length": max(map(len, ids)),
        "bos": made.bos,
        "chat": made.chat,
        "folded_norms": is_folded(model),
    }


def _profile(
    model: Any, batches: Sequence[Batch], progress: Callable[[int, int], None] | None
) -> list[list[SequenceRow]]:
    """Rows by step: the embedding, then every layer's output."""
    sites = [resid_pre(0), *(resid_post(layer) for layer in range(model.cfg.n_layers))]
    taps = {site: LayerProfile(site) for site in sites}
    total = sum(map(len, batches))
    done = 0

    def tick(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    stream(model, batches, taps, progress=tick)
    return [taps[site].result() for site in sites]


def _trace(
    model: Any, groups: Sequence[Group], probes: Sequence[int], ids: Sequence[Sequence[int]]
) -> tuple[dict[Group, Path | None], list[Path]]:
    """Exact trajectories of massive tokens (the most telling ones) and of other first tokens."""
    chosen = [group for group in groups if group.first][:FIRST_GROUPS]
    chosen += [group for group in groups if not group.first][:LATER_GROUPS]
    prefixes = [list(ids[group.sequence][: group.position + 1]) for group in chosen]
    paths = trace(model, [*prefixes, *([token] for token in probes)])
    found: dict[Group, Path | None] = dict.fromkeys(groups)
    found |= dict(zip(chosen, paths[: len(chosen)], strict=True))
    return found, paths[len(chosen) :]


def _run_info(model: Any, seed: int, settings: dict[str, Any]) -> RunInfo:
    origin, parameter = origin_of(model), next(model.parameters())
    facts = ModelFacts(
        name=origin.name,
        revision=origin.revision,
        weights=fingerprint(model),
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=str(parameter.device),
    )
    return RunInfo.collect(facts, seed=seed, settings=settings)


def _decoder(tokenizer: Any) -> Callable[[int], str]:
    if tokenizer is None:
        return lambda token: f"<{token}>"
    return lambda token: tokenizer.decode([token])
