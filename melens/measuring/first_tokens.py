"""Tokens tried alone at position 0: BOS, the texts' own, the chat template's, the vocabulary."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from melens.chat import chat_ids, has_template
from melens.errors import PromptError
from melens.framing import Frame, frame_of, known_ids
from melens.inputs import Inputs
from melens.intervals import random_order, wilson
from melens.locating.assemble import massive_alone
from melens.locating.criteria import first_over
from melens.locating.thresholds import FIRST_SHARE
from melens.locating.trajectory import Path
from melens.protocols import HookedModel, Tokenizer
from melens.results import MELayer
from melens.results.describe import Condition, FirstTokenRow, Start

CONDITIONS: dict[Start, str] = {
    "bos": "with BOS",
    "text": "texts' own, no BOS",
    "chat": "chat template",
    "vocabulary": "vocabulary sample",
}
TEXT_STARTS = 64
"""Most first tokens of the texts that are tried; a corpus may have one for every sequence."""


def choose_starts(
    inputs: Inputs, *, count: int, seed: int
) -> tuple[dict[int, tuple[Start, ...]], tuple[str, ...]]:
    """Token ids to try alone, each with everything it stands for; and what could not be tried."""
    tokenizer = getattr(inputs.model, "tokenizer", None)
    frame = Frame() if tokenizer is None else frame_of(tokenizer)
    bos = getattr(tokenizer, "bos_token_id", None)
    bos = frame.prefix[0] if bos is None and frame.prefix else bos
    head = frame.prefix or (() if bos is None else (bos,))
    texts = dict.fromkeys(_own_first(row, head) for row in inputs.rows)
    chat, missing = _chat_start(tokenizer)
    found: dict[Start, list[int]] = {
        "bos": [bos] if bos is not None else [],
        "chat": chat,
        "text": list(texts)[:TEXT_STARTS],
        "vocabulary": sample_vocabulary(inputs.model, count=count, seed=seed),
    }
    ids = dict.fromkeys(token for tokens in found.values() for token in tokens)
    sources: dict[int, tuple[Start, ...]] = {
        token: tuple(start for start, tokens in found.items() if token in tokens) for token in ids
    }
    return sources, missing


def _own_first(row: Sequence[int], head: Sequence[int]) -> int:
    """A text's own first token: what stands before it is the tokenizer's."""
    own = len(head) if list(row[: len(head)]) == list(head) else int(row[0] in head[:1])
    return row[own] if own < len(row) else row[0]


def sample_vocabulary(model: HookedModel, *, count: int, seed: int) -> list[int]:
    """Distinct ids drawn evenly from those that stand for a token, special ones left out."""
    tokenizer = getattr(model, "tokenizer", None)
    known = known_ids(tokenizer, model.cfg.d_vocab)
    special = set(getattr(tokenizer, "all_special_ids", None) or ())
    order = random_order(len(known), seed=seed).tolist()
    return [known[i] for i in order if known[i] not in special][:count]


def _chat_start(tokenizer: Tokenizer | None) -> tuple[list[int], tuple[str, ...]]:
    """The first token that the chat template puts, if there is one; or why that is not known."""
    if not has_template(tokenizer):
        return [], ()
    try:
        (ids,) = chat_ids(tokenizer, ["Hi"])
    except PromptError as error:  # what is measured without a chat stands all the same
        return [], (f"the first token of a chat: {error}",)
    return ids[:1], ()


def first_token_row(
    path: Path, sources: tuple[Start, ...], located: MELayer, *, token: str
) -> FirstTokenRow:
    """Is a token massive alone? Held against the profile's medians, of all located texts.

    ``locate`` leaves repeated texts out of its own: it has the medians of each text.
    """
    norms = torch.tensor([1.0, *(row.median_norm for row in located.profile)]).double()
    ratios = path.norms / norms
    massive = massive_alone(path, [row.median for row in located.profile], ratios)
    return FirstTokenRow(
        sources=sources,
        token_id=path.token_id,
        token=token,
        massive=massive,
        value=path.entry(path.peak)[1],
        first_share=first_over(path, ratios, FIRST_SHARE) if massive else None,
    )


def conditions(rows: Sequence[FirstTokenRow]) -> tuple[Condition, ...]:
    """One line a way to start a text."""
    made = []
    for source, name in CONDITIONS.items():
        if here := [row for row in rows if source in row.sources]:
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
