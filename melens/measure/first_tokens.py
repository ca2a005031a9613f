"""Tokens tried alone at position 0: BOS, the texts' own, the chat template's, the vocabulary."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal

import torch

from melens.emergence.thresholds import (
    FIRST_SHARE,
    NORM_RATIO,
    SUN_ABSOLUTE,
    SUN_RATIO,
    last_body_layer,
)
from melens.emergence.trajectory import Path
from melens.inputs import Inputs
from melens.results import MELayer
from melens.results.describe import Condition, FirstTokenRow

Start = Literal["bos", "text", "chat", "vocabulary"]
CONDITIONS: dict[Start, str] = {
    "bos": "with BOS",
    "text": "without BOS",
    "chat": "chat template",
    "vocabulary": "vocabulary sample",
}
WILSON_Z = 1.96


def choose_starts(inputs: Inputs, *, count: int, seed: int) -> dict[int, Start]:
    """Token ids to try alone, each with where it comes from; the first source of an id counts."""
    tokenizer = getattr(inputs.model, "tokenizer", None)
    bos = getattr(tokenizer, "bos_token_id", None)
    found: dict[int, Start] = {}
    if bos is not None:
        found[bos] = "bos"
    if (chat := chat_start(tokenizer)) is not None:
        found.setdefault(chat, "chat")
    for row in inputs.rows:
        found.setdefault(row[1] if row[0] == bos else row[0], "text")
    for token in sample_vocabulary(inputs.model, count=count, seed=seed):
        found.setdefault(token, "vocabulary")
    return found


def lead(starts: dict[int, Start], token: int) -> dict[int, Start]:
    """The same tokens with one of them in front; a new one counts as the texts'."""
    made: dict[int, Start] = {token: starts.get(token, "text")}
    made.update(starts)
    return made


def sample_vocabulary(model: Any, *, count: int, seed: int) -> list[int]:
    """Distinct ids drawn evenly from the vocabulary, special tokens left out."""
    tokenizer = getattr(model, "tokenizer", None)
    size = min(model.cfg.d_vocab, len(tokenizer)) if tokenizer else model.cfg.d_vocab
    special = set(getattr(tokenizer, "all_special_ids", None) or ())
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return [token for token in order if token not in special][:count]


def chat_start(tokenizer: Any) -> int | None:
    """The first token that the chat template puts; None where there is no template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[0] if ids else None


def first_token_row(path: Path, source: Start, located: MELayer, *, token: str) -> FirstTokenRow:
    """Is a token massive alone? Held against the texts' own medians, as ``locate`` does it."""
    last = last_body_layer(path.n_layers)
    norms, tops = path.norms[1:].tolist(), path.resid[1:].abs().amax(dim=-1).tolist()
    massive = any(
        tops[row.layer] > max(SUN_ABSOLUTE, SUN_RATIO * row.median)
        and norms[row.layer] >= NORM_RATIO * row.median_norm
        for row in located.profile[: last + 1]
    )
    return FirstTokenRow(
        source=source,
        token_id=path.token_id,
        token=token,
        massive=massive,
        value=path.entry(path.peak)[1],
        first_share=_first_share(path) if massive else None,
    )


def _first_share(path: Path) -> int | None:
    """First layer where the cumulative write share passes FIRST_SHARE and stays there."""
    total = path.shares.cumsum(0) + path.embedding_share
    below = (total[: path.peak + 1] <= FIRST_SHARE).nonzero().flatten()
    return int(below[-1]) + 1 if len(below) else -1


def conditions(rows: Sequence[FirstTokenRow], chat: int | None) -> tuple[Condition, ...]:
    """One line a way to start a text."""
    made = []
    for source, name in CONDITIONS.items():
        here = [row for row in rows if row.source == source]
        if source == "chat":  # most templates start with BOS, whose row stands for both
            here = [row for row in rows if row.token_id == chat]
        if here:
            made.append(_condition(name, here, sampled=source == "vocabulary"))
    return tuple(made)


def _condition(name: str, rows: Sequence[FirstTokenRow], *, sampled: bool) -> Condition:
    massive = sum(row.massive for row in rows)
    return Condition(
        name=name,
        first_tokens=len(rows),
        massive=massive,
        interval=wilson(massive, len(rows)) if sampled else None,
        median_value=statistics.median(abs(row.value) for row in rows),
    )


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share.

    Source:  Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    share, z2 = hits / n, WILSON_Z**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = WILSON_Z * (share * (1 - share) / n + z2 / (4 * n * n)) ** 0.5 / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)
