"""locate(): one forward pass over the texts, a second over a few tokens, one honest result."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from melens.capture import stream
from melens.inputs import Inputs, Source, prepare
from melens.locating.assemble import Texts, assemble
from melens.locating.profile import (
    Group,
    LayerProfile,
    SequenceRow,
    group_hits,
    sample_first_tokens,
)
from melens.locating.trajectory import Path, trace
from melens.models.anatomy import resid_post, resid_pre
from melens.protocols import HookedModel, ModelLike
from melens.results import MELayer
from melens.settings import require_seed

FIRST_PROBES = 8
"""Other first tokens tried alone, sampled from the texts' own tokens."""
FIRST_GROUPS = 16
LATER_GROUPS = 4


def locate(
    model: ModelLike,
    prompts: Source = None,
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
    """
    require_seed(seed)
    inputs = prepare(model, prompts, batch_size=batch_size)
    return locate_in(inputs, seed=seed, progress=progress)


def locate_in(
    inputs: Inputs, *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> MELayer:
    """:func:`locate` over inputs that were taken in already."""
    ids = inputs.rows
    steps = _profile(inputs, progress)
    groups = group_hits(steps)
    probes = sample_first_tokens(ids, groups, count=FIRST_PROBES, seed=seed)
    paths, probed = _trace(inputs.model, groups, probes, ids)
    texts = Texts.of(ids, steps, getattr(inputs.model, "tokenizer", None))
    repeated = sum(texts.repeated)
    run = inputs.run_info(seed=seed, **({"repeated_texts": repeated} if repeated else {}))
    return assemble(steps, paths, probed, texts=texts, decode=inputs.decode, run=run)


def _profile(
    inputs: Inputs, progress: Callable[[int, int], None] | None
) -> list[list[SequenceRow]]:
    """Rows by step: the embedding, then every layer's output."""
    sites = [resid_pre(0), *map(resid_post, range(inputs.model.cfg.n_layers))]
    taps = {site: LayerProfile(site) for site in sites}
    stream(inputs.model, inputs.batches, taps, progress=inputs.ticker(progress))
    return [taps[site].result() for site in sites]


def _trace(
    model: HookedModel, groups: Sequence[Group], probes: Sequence[int], ids: Sequence[Sequence[int]]
) -> tuple[dict[Group, Path | None], list[Path]]:
    """Exact trajectories of massive tokens (the most telling ones) and of other first tokens."""
    chosen = [group for group in groups if group.first][:FIRST_GROUPS]
    chosen += [group for group in groups if not group.first][:LATER_GROUPS]
    prefixes = [list(ids[group.sequence][: group.position + 1]) for group in chosen]
    paths = trace(model, [*prefixes, *([token] for token in probes)])
    found: dict[Group, Path | None] = dict.fromkeys(groups)
    found |= dict(zip(chosen, paths[: len(chosen)], strict=True))
    return found, paths[len(chosen) :]
