"""mixers(): how each kind of token mixer writes, keeps and reads the sink token. From 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from melens.batches import Batch
from melens.errors import ModelError
from melens.inputs import Inputs, Source, prepare
from melens.locating.trajectory import Path, trace
from melens.measuring.attention_sinks import LEAST_QUERIES
from melens.measuring.gates import GateSums, gates
from melens.measuring.located import run_once, settle
from melens.measuring.states import STEPS, Followed, follow
from melens.metrics import key_attention, write_shares
from melens.metrics.hybrid import (
    Statistic,
    inter_spike_retention,
    shifted_places,
    sink_spike_alignment,
)
from melens.models.anatomy import Block, anatomy, pattern_hook, resid_post
from melens.models.contract import failing
from melens.protocols import HookedModel, ModelLike
from melens.results.mixers import FULL, Gate, MixerRow, Mixers, Rhythm, State, StateWrite
from melens.results.reading import HoldsMELayer
from melens.settings import Progress

WORDS = {
    "sliding_attention": "window attention",
    "hybrid_sliding": "window attention",
    "chunked_attention": "window attention",
    "linear_attention": "linear attention",
    "conv": "convolution",
}
"""transformers' names of layer types that say more than the modules do."""
MARKS = {
    "linear attention": ("delta", "linear", "lightning", "kda", "rwkv"),
    "state space": ("mamba", "ssm"),
    "convolution": ("conv",),
    "recurrence": ("recurrent", "rglru", "mlstm", "slstm", "lstm"),
    FULL: ("attention",),
    "": ("mlp", "moe"),
}
"""Kind -> what is in the class name of a mixer whose attention has no hooks; "" mixes nothing."""
SITES = {"linear_attn": "linear attention", "mamba": "state space"}
"""TransformerLens' own names, where a class name says nothing."""
FEW_TEXTS = 4
"""Texts that gates and states are read in."""


def mixers(
    model: ModelLike,
    me_layer: HoldsMELayer | None = None,
    prompts: Source = None,
    *,
    seed: int = 0,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Mixers:
    """Follow the sink token through full attention, window, linear attention and state space.

    The sink token of a text is the one that full-attention layers look at most. Said of it: its
    size beside the median token at every layer (also where nothing is massive by Sun et al.'s
    absolute rule), each mixer's write, whether it peaks right before full-attention layers and what
    stays between, beside a control with these layers moved; output gates; and what
    recurrent states hold of it. Gates and states are read in four texts. Definitions:
    docs/definitions.md.

    Args:    model: anything ``melens.load`` takes.
             me_layer: what ``melens.locate`` found on this model; None = locate first.
             prompts: texts, as for ``melens.locate``.
             seed: of ``locate``, where it has to run first.
             batch_size: texts a forward pass.
             progress: called with (rows done, rows in all).
    Returns: one row a layer, rhythm and controls; what the model does not show is in ``missing``.
    Raises:  ResultError: ``me_layer`` is of other weights. PromptError, ModelError: as ``locate``.
    Source:  arXiv 2608.12149, for alignment and retention.
    """
    inputs = prepare(model, prompts, batch_size=batch_size)
    located = settle(inputs, me_layer, seed=seed, progress=progress)
    blocks = anatomy(inputs.model).blocks
    kinds = kinds_of(inputs.model)
    seen = _see(inputs, blocks, kinds, located.heavy, progress)
    paths = _paths(inputs, seen.positions)
    few = _few(inputs, seen.positions)
    gated = gates(inputs.model, *few)
    states, missing = _states(inputs.model, blocks, few)
    peak = Counter(path.peak for path in paths).most_common(1)[0][0]
    rows = [
        _row(block, kinds[block.layer], seen, paths, peak).model_copy(
            update={"gate": _gate(gated.get(block.layer)), "state": states.get(block.layer)}
        )
        for block in blocks
    ]
    full = tuple(layer for layer, kind in enumerate(kinds) if FULL in kind)
    tops = Counter((row[at], at) for row, at in zip(inputs.rows, seen.positions, strict=True))
    (token_id, position), often = tops.most_common(1)[0]
    norms = [row.norm for row in rows]
    hybrid = 0 < len(full) < len(blocks)
    return Mixers(
        n_layers=len(blocks),
        me_layer=located.me_layer.me_layer,
        token_id=token_id,
        token=inputs.decode(token_id),
        position=position,
        texts=inputs.total,
        texts_with_it=often,
        texts_massive=sum(seen.massive),
        peak_layer=peak,
        embedding_share=_mean([_shares(path, path.resid[:1], peak)[0] for path in paths]),
        chosen_by=seen.chosen_by,
        full_layers=full,
        alignment=_rhythm(sink_spike_alignment, norms, full) if hybrid else None,
        retention=_rhythm(inter_spike_retention, norms, full) if hybrid else None,
        layers=tuple(rows),
        missing=missing,
        run=inputs.run_info(seed=seed),
    )


def kinds_of(model: HookedModel) -> list[tuple[str, ...]]:
    """What mixes tokens in every block: two kinds where they run in parallel.

    Softmax attention is known by its pattern's hook; whether it has a window, the config says. Only
    for what has no such hook do the classes of the modules decide.
    """
    made: list[tuple[str, ...]] = []
    for block, name in zip(anatomy(model).blocks, _config_types(model), strict=True):
        word = WORDS.get(name, "")
        kinds = [word if word == "window attention" else FULL] if block.attention else []
        for site, part in mixer_parts(model, block).items():
            kinds.append(_by_class(part) or word or SITES.get(site, "another mixer"))
        if block.unread and not any("attention" in kind for kind in kinds):
            modules = model.blocks[block.layer].modules()
            inside = [_by_class(part) for part in modules if "Attention" in type(part).__name__]
            kinds.insert(0, "linear attention" if "linear attention" in inside else FULL)
        if block.untold and not kinds:
            kinds.append("unknown")
        made.append(tuple(dict.fromkeys(kind for kind in kinds if kind != NOTHING)))
    return made


NOTHING = "nothing"
"""A part that a bridge calls a mixer and that is an FFN (Nemotron-H)."""


def mixer_parts(model: HookedModel, block: Block) -> dict[str, nn.Module]:
    """The mixers of a block that are no attention with a pattern to read, by their names."""
    found: dict[str, nn.Module] = {}
    for site in block.mixer_writes:
        part = site.split(".")[2]
        part = "attn" if part in ("hook_attn_out", "ln1_post") else part
        module = getattr(model.blocks[block.layer], part, None)
        if module is not None and not (part == "attn" and block.attention):
            found[part] = module
    return found


def _by_class(part: nn.Module) -> str:
    name = type(getattr(part, "original_component", None) or part).__name__.lower()
    kind = next((kind for kind, marks in MARKS.items() if any(m in name for m in marks)), None)
    return NOTHING if kind == "" else kind or ""


def _config_types(model: HookedModel) -> Sequence[str]:
    from transformers.cache_utils import get_layer_types_and_kwargs

    n = model.cfg.n_layers
    try:
        text = model.original_model.config.get_text_config(decoder=True)
        found = getattr(text, "layer_types", None) or get_layer_types_and_kwargs(text)[0]
    except (AttributeError, TypeError, ValueError, KeyError):
        return [""] * n
    return found if len(found) == n else [""] * n


@dataclass
class TokenSizes:
    """Reducer: every real token's norm at one site, text by text."""

    norms: list[Tensor] = field(default_factory=list)

    def update(self, x: Tensor, batch: Batch) -> None:
        """Take in ``[batch, pos, d_model]``."""
        for row, mask in zip(x.detach(), batch.mask, strict=True):
            self.norms.append(row[mask].float().norm(dim=-1).cpu())

    def result(self) -> list[Tensor]:
        """One ``[pos]`` a text."""
        return self.norms

    def median_beside(self, positions: Sequence[int]) -> float:
        """Median norm of the other tokens, mean over texts."""
        kept = [
            row[torch.arange(len(row)) != at].median()
            for row, at in zip(self.norms, positions, strict=True)
        ]
        return torch.stack(kept).double().mean().item()


@dataclass
class KeyMeans:
    """Reducer: what each key of a text gets, mean over heads and over the queries after it."""

    alpha: list[Tensor] = field(default_factory=list)

    def update(self, x: Tensor, batch: Batch) -> None:
        """Take in ``[batch, head, query, key]``."""
        for pattern, mask in zip(x.detach(), batch.mask, strict=True):
            real = mask.to(x.device)
            self.alpha.append(key_attention(pattern[:, real][:, :, real]).mean(0))

    def result(self) -> list[Tensor]:
        """One ``[pos]`` a text."""
        return self.alpha


@dataclass(frozen=True)
class _Seen:
    positions: list[int]
    massive: list[bool]
    """Whether that token is massive, text by text."""
    chosen_by: str
    resid: list[TokenSizes]
    writes: dict[int, TokenSizes]


def _see(
    inputs: Inputs,
    blocks: Sequence[Block],
    kinds: Sequence[tuple[str, ...]],
    heavy: Sequence[Tensor],
    progress: Progress | None,
) -> _Seen:
    """One pass: the sink token of every text, and every token's size at every layer."""
    keys = {b.layer: KeyMeans() for b in blocks if b.attention and FULL in kinds[b.layer]}
    resid = [TokenSizes() for _ in blocks]
    writes = {b.layer: TokenSizes() for b in blocks if len(b.mixer_writes) == 1}
    run_once(
        inputs,
        {pattern_hook(layer): tap for layer, tap in keys.items()},
        {resid_post(layer): tap for layer, tap in enumerate(resid)},
        {blocks[layer].mixer_writes[0]: tap for layer, tap in writes.items()},
        progress=progress,
    )
    marks = [
        marked[mask].tolist()
        for batch, marks in zip(inputs.batches, heavy, strict=True)
        for mask, marked in zip(batch.mask, marks, strict=True)
    ]
    if keys:
        by_text = zip(*(tap.result() for tap in keys.values()), strict=True)
        positions = [_most_seen(torch.stack(layers).mean(0)) for layers in by_text]
        rule = "most attention in full-attention layers"
    else:
        positions = [row.index(True) if True in row else 0 for row in marks]
        rule = "no full attention can be read: the first massive token, else the first token"
    massive = [bool(row[at]) for row, at in zip(marks, positions, strict=True)]
    return _Seen(positions, massive, rule, resid, writes)


def _most_seen(alpha: Tensor) -> int:
    """The key with the largest mean attention; the last keys have too few queries to count."""
    return int(alpha[: max(1, len(alpha) - LEAST_QUERIES + 1)].argmax())


def _paths(inputs: Inputs, positions: Sequence[int]) -> list[Path]:
    prefixes = [tuple(row[: at + 1]) for row, at in zip(inputs.rows, positions, strict=True)]
    distinct = list(dict.fromkeys(prefixes))
    found = dict(zip(distinct, trace(inputs.model, distinct), strict=True))
    return [found[prefix] for prefix in prefixes]


def _few(inputs: Inputs, positions: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    return inputs.rows[:FEW_TEXTS], list(positions[:FEW_TEXTS])


def _states(
    model: HookedModel, blocks: Sequence[Block], few: tuple[list[list[int]], list[int]]
) -> tuple[dict[int, State], tuple[str, ...]]:
    """The sink token's and its next token's part in every state, and why some cannot be read."""
    keepers = {
        block.layer: part
        for block in blocks
        for part in mixer_parts(model, block).values()
        if _by_class(part) not in (NOTHING, FULL)
    }
    hidden = [b.layer for b in blocks if b.untold and b.layer not in keepers and not b.attention]
    if not keepers:
        return {}, _unseen(hidden)
    pairs = [(row, at) for row, at in zip(*few, strict=True) if len(row) > at + 2]
    if not pairs:
        return {}, ("recurrent states: no text has two tokens after its sink token",)
    steps = min(STEPS, *(len(row) - at - 2 for row, at in pairs))  # of the next token too
    sink: dict[int, list[Followed]] = {}
    other: dict[int, list[Followed]] = {}
    try:
        with failing("recurrent states cannot be followed"):
            for row, at in pairs:
                for kept, place in ((sink, at), (other, at + 1)):
                    for layer, found in follow(model, keepers, row, place, steps).items():
                        kept.setdefault(layer, []).append(found)
    except ModelError as error:
        return {}, (str(error),)
    return {
        layer: State(steps=steps, sink=_written(sink[layer]), other=_written(other[layer]))
        for layer in sink
    }, _unseen([*hidden, *(layer for layer in keepers if layer not in sink)])


def _unseen(layers: Sequence[int]) -> tuple[str, ...]:
    """What is said of layers whose state is not shown."""
    if not layers:
        return ()
    named = ", ".join(map(str, sorted(layers)))
    return (f"recurrent state of layer {named} (from 0): the model's cache does not show it",)


def _written(found: Sequence[Followed]) -> StateWrite:
    ranks = [row.rank for row in found if row.rank is not None]
    return StateWrite(
        norm=_mean([row.norm for row in found]),
        rank=_mean(ranks) if ranks else None,
        left=_mean([row.left for row in found]),
        read=_mean([_mean(row.reads) for row in found]),
    )


def _row(
    block: Block, kinds: tuple[str, ...], seen: _Seen, paths: Sequence[Path], peak: int
) -> MixerRow:
    layer, writes = block.layer, seen.writes.get(block.layer)
    share = _mean([_shares(path, path.mixer, peak)[layer] for path in paths])
    added = [_shares(path, path.resid.diff(dim=0), peak)[layer] for path in paths]
    return MixerRow(
        layer=layer,
        kinds=kinds,
        norm=_mean([path.norms[layer + 1].item() for path in paths]),
        median_norm=seen.resid[layer].median_beside(seen.positions),
        largest=max(abs(path.entry(layer)[1]) for path in paths),
        write=None if writes is None else _mean([p.mixer[layer].norm().item() for p in paths]),
        median_write=None if writes is None else writes.median_beside(seen.positions),
        write_share=None if block.untold else share,
        rest_share=_mean(added) - share,
        gate=None,
        state=None,
    )


def _shares(path: Path, writes: Tensor, peak: int) -> list[float]:
    """Shares of a token's vector at the layer where most texts' tokens peak."""
    return write_shares(writes, path.resid[peak + 1]).tolist()


def _gate(sums: GateSums | None) -> Gate | None:
    return None if sums is None else Gate(sink=_mean(sums.sink), others=_mean(sums.others))


def _rhythm(statistic: Statistic, norms: Sequence[float], full: Sequence[int]) -> Rhythm | None:
    value, control = statistic(norms, full), shifted_places(statistic, norms, full)
    if value is None or control is None:
        return None
    low, high = control.low, control.high
    return Rhythm(value=value, control=control.mean, interval=(low, high), shifts=control.shifts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
