"""locate(): one forward pass over the texts, a second over a few tokens, one honest result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any

from melens.batches import Batch, Prompts, prompts
from melens.capture import check_sites, stream
from melens.emergence.assemble import assemble
from melens.emergence.profile import LayerProfile, SequenceRow
from melens.emergence.thresholds import MIN_TOKENS
from melens.emergence.tokens import Group, group_hits, sample_first_tokens
from melens.emergence.trajectory import Path, trace
from melens.errors import PromptError
from melens.models.anatomy import resid_post, resid_pre
from melens.models.loading import load
from melens.provenance import RunInfo
from melens.results import MELayer

FIRST_PROBES = 8
"""Other first tokens tried alone, sampled from the texts' own tokens."""
FIRST_GROUPS = 16
LATER_GROUPS = 4


def locate(
    model: Any,
    prompts: Prompts | str | FilePath | Sequence[str] | Sequence[Batch] | None = None,
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
    hooked = load(model)
    batches = _batches(hooked, prompts, batch_size)
    run = _run_info(hooked, seed)
    steps = _profile(hooked, batches, progress)
    ids = [
        row[mask].tolist()
        for batch in batches
        for row, mask in zip(batch.ids, batch.mask, strict=True)
    ]
    groups = group_hits(steps)
    probes = sample_first_tokens(ids, groups, count=FIRST_PROBES, seed=seed)
    paths, probed = _trace(hooked, groups, probes, ids)
    decode = _decoder(getattr(hooked, "tokenizer", None))
    return assemble(steps, groups, paths, probed, decode=decode, run=run)


def _batches(model: Any, source: Any, batch_size: int) -> list[Batch]:
    if isinstance(source, Batch):
        source = [source]
    ready = isinstance(source, (list, tuple)) and source and isinstance(source[0], Batch)
    if ready:
        batches = list(source)
    else:
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise PromptError("this model has no tokenizer; pass token batches (melens.Batch.of).")
        made = (
            source
            if isinstance(source, Prompts)
            else prompts("bundled" if source is None else source)
        )
        limit = getattr(model.cfg, "n_ctx", None)
        batches = made.pack(tokenizer, batch_size=batch_size, max_length=limit)
    longest = max(int(batch.mask.sum(-1).max()) for batch in batches)
    shortest = min(int(batch.mask.sum(-1).min()) for batch in batches)
    if shortest < MIN_TOKENS:
        raise PromptError(
            f"a sequence has {shortest} tokens; locating needs at least {MIN_TOKENS}, to have "
            "ordinary tokens to compare with."
        )
    biggest = max(int(batch.ids.max()) for batch in batches)
    if biggest >= model.cfg.d_vocab:
        raise PromptError(f"token id {biggest} is outside the vocabulary of {model.cfg.d_vocab}.")
    if (limit := getattr(model.cfg, "n_ctx", None)) and longest > limit:
        raise PromptError(f"a sequence has {longest} tokens; the model's context is {limit}.")
    return batches


def _profile(
    model: Any, batches: Sequence[Batch], progress: Callable[[int, int], None] | None
) -> list[list[SequenceRow]]:
    """Rows by step: the embedding, then every layer's output."""
    sites = [resid_pre(0), *(resid_post(layer) for layer in range(model.cfg.n_layers))]
    check_sites(model, sites)
    taps = {site: LayerProfile() for site in sites}
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
) -> tuple[dict[Group, Path], list[Path]]:
    """Exact trajectories of the massive tokens and of the first tokens tried beside them."""
    first = [group for group in groups if group.first][:FIRST_GROUPS]
    later = [group for group in groups if not group.first][:LATER_GROUPS]
    prefixes = [[group.token_id] for group in first] + [[token] for token in probes]
    prefixes += [list(ids[group.sequence][: group.position + 1]) for group in later]
    paths = trace(model, prefixes)
    cut = len(first) + len(probes)
    known = dict(zip(first, paths[: len(first)], strict=True))
    known |= dict(zip(later, paths[cut:], strict=True))
    return known, paths[len(first) : cut]


def _run_info(model: Any, seed: int) -> RunInfo:
    from melens.models.origin import fingerprint, origin_of

    origin = origin_of(model)
    parameter = next(model.parameters())
    return RunInfo.collect(
        model=origin.name, revision=origin.revision, weights=fingerprint(model),
        dtype=str(parameter.dtype).removeprefix("torch."), device=str(parameter.device), seed=seed,
    )  # fmt: skip


def _decoder(tokenizer: Any) -> Callable[[int], str]:
    if tokenizer is None:
        return lambda token: f"<{token}>"
    return lambda token: tokenizer.decode([token])
