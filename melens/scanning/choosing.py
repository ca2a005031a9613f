"""Which first tokens are tried: what begins texts and chats, and a sample of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from melens.chat import chat_start, has_template
from melens.errors import PromptError
from melens.framing import frame_of, known_ids
from melens.intervals import random_order
from melens.protocols import PretrainedConfig, Tokenizer
from melens.results.scan import Why

SAMPLE = 16
"""Tokens drawn from the vocabulary, where none are given."""


@dataclass(frozen=True)
class Vocabulary:
    """What is known of a model's tokens."""

    tokenizer: Tokenizer | None
    config: PretrainedConfig | None
    """transformers' config, or None: it names BOS where there is no tokenizer."""
    size: int


def choose(
    words: Vocabulary, tokens: Sequence[int] | None, sample: int, seed: int
) -> tuple[dict[int, Why], dict[str, str]]:
    """Token ids in order, each once, with the reason for it; and what could not be tried.

    Raises:  PromptError: a token that the vocabulary does not have, or none at all.
    """
    found: dict[int, Why] = {}
    lacking: dict[str, str] = {}
    for token in tokens or ():
        found[token] = "given"
    if tokens is None and (start := _bos(words)) is not None:
        found[start] = "bos"
    if tokens is None and has_template(tokenizer := words.tokenizer):
        try:
            start = chat_start(tokenizer)
        except PromptError as error:  # nobody asked for a chat: the other tokens are tried
            lacking["chat_start"] = str(error)
        else:
            found |= {} if start is None or start in found else {start: "chat"}
    if too_high := [token for token in found if token >= words.size]:
        raise PromptError(f"token {too_high[0]} is outside the vocabulary, 0 to {words.size - 1}.")
    known = known_ids(words.tokenizer, words.size)
    order = random_order(len(known), seed=seed).tolist()
    for token in [known[i] for i in order if known[i] not in found][:sample]:
        found[token] = "sample"
    if not found:
        raise PromptError("this model has no BOS token or chat template; give token ids.")
    return found, lacking


def _bos(words: Vocabulary) -> int | None:
    """BOS, or what the tokenizer puts first in its place."""
    tokenizer = words.tokenizer
    if tokenizer is not None:
        start, prefix = tokenizer.bos_token_id, frame_of(tokenizer).prefix
        return prefix[0] if start is None and prefix else start
    return getattr(words.config, "bos_token_id", None)
