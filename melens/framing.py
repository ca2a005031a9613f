"""What a tokenizer puts around a text of its own accord: BOS, [CLS], a language's token, EOS."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from melens.errors import PromptError
from melens.protocols import Encoding, Tokenizer

T = TypeVar("T")
PROBES = ("a", "0", " the", "\n", "\u4e00")
"""Texts to look at a frame with: the first of which a tokenizer makes any token."""
MIN_TAIL = 4
REPEATED_IDS, REPEATED_TIMES = 3, 3
"""A text is repeated where so few ids, so often each, fill more than half of it."""


@dataclass(frozen=True)
class Frame:
    """Token ids that stand before and after every text."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    inside: bool = False
    """Whether they come even where the tokenizer is told to add none."""

    def without(self, row: Sequence[T]) -> list[T]:
        """What belongs to the text itself, of a row that was made without special tokens."""
        if not self.inside:
            return list(row)
        return list(row[len(self.prefix) : len(row) - len(self.suffix)])


def encoded(tokenizer: Tokenizer, text: str, **options: object) -> Encoding:
    """What a tokenizer makes of a text, asked to put nothing around it; it may not obey.

    Raises:  PromptError: characters that no text has (half of a surrogate pair).
    """
    try:
        return tokenizer(text, add_special_tokens=False, verbose=False, **options)
    except (TypeError, UnicodeEncodeError):
        if text.isascii() or text == text.encode("utf-8", "replace").decode():
            raise
        raise PromptError(
            f"a text holds half of a surrogate pair ({text[:40]!a}); it is no Unicode text."
        ) from None


def plain_ids(tokenizer: Tokenizer, text: str, *, frame: Frame | None = None) -> list[int]:
    """Token ids of a text alone, nothing around it, whatever the tokenizer does of its own accord.

    Args:    frame: :func:`frame_of` the tokenizer, where it is known already.
    Raises:  PromptError: as :func:`encoded`.
    """
    frame = frame or frame_of(tokenizer)
    return frame.without(encoded(tokenizer, text)["input_ids"])


def frame_of(tokenizer: Tokenizer) -> Frame:
    """What the tokenizer puts around a text, found by asking it."""
    for probe in PROBES:
        plain = list(encoded(tokenizer, probe)["input_ids"])
        whole = list(tokenizer(probe, verbose=False)["input_ids"])
        at = _find(plain, whole)
        if not plain or at is None:
            continue
        if whole != plain:
            return Frame(tuple(whole[:at]), tuple(whole[at + len(plain) :]))
        return _inside(tokenizer, plain)
    return Frame()


def split_text(
    tokenizer: Tokenizer, text: str, *, bos: bool | None, frame: Frame | None = None
) -> tuple[list[int], list[int]]:
    """What stands first in every piece of a text, and the text's own tokens.

    What the tokenizer puts after a text is left out: a text that goes on has no end.

    Args:    bos: None as the tokenizer does, True with BOS first whatever it does, False with
             nothing before the text.
             frame: :func:`frame_of` the tokenizer, where it is known already.
    Raises:  PromptError: no BOS to force, or no tokens at all.
    """
    frame = frame or frame_of(tokenizer)
    body = plain_ids(tokenizer, text, frame=frame)
    start = getattr(tokenizer, "bos_token_id", None)
    head = list(frame.prefix)
    if not head and body and start is not None and body[0] == start:  # written in the text itself
        head, body = body[:1], body[1:]
    if bos is True and (not head or head[0] != start):
        if start is None:
            raise PromptError("this tokenizer has no BOS token; leave bos at its default or off.")
        head = [start, *head]
    elif bos is False:
        head = []
    if not head and not body:
        raise PromptError(f"the tokenizer makes no tokens of {text[:40]!r}; give another text.")
    return head, body


def head_size(tokenizer: Tokenizer, *, bos: bool | None) -> int:
    """How many tokens stand before every text under a BOS policy of :func:`split_text`."""
    prefix, start = frame_of(tokenizer).prefix, getattr(tokenizer, "bos_token_id", None)
    if bos is False:
        return 0
    return len(prefix) + (bos is True and prefix[:1] != (start,))


def prompt_ids(tokenizer: Tokenizer, text: str, *, add: bool | None = None) -> list[int]:
    """Ids of a prompt that may begin with BOS as it is written: then nothing is put before it.

    Args:    add: whether the tokenizer's prefix is put in front; None = it is.
    """
    start = getattr(tokenizer, "bos_token", None)
    if add is False or (start and text.startswith(start)):
        return plain_ids(tokenizer, text)
    head, body = split_text(tokenizer, text, bos=None)
    return head + body


def cut(head: list[int], body: list[int], length: int) -> Iterator[list[int]]:
    """Pieces of at most ``length`` tokens; every piece keeps the head, if there is one. A tail of
    fewer than MIN_TAIL tokens is dropped.
    """  # noqa: D205
    step = length - len(head)
    if step < 1 or not body:
        yield (head + body)[:length]
        return
    for i in range(0, len(body), step):
        if i == 0 or len(body) - i >= min(MIN_TAIL, step):
            yield head + body[i : i + step]


def bos_first(tokenizer: Tokenizer | None, rows: Sequence[Sequence[int]]) -> bool | None:
    """Whether token sequences begin with BOS; None where some do and some do not, or where no
    tokenizer says which token that is.
    """  # noqa: D205
    if tokenizer is None:
        return None
    start = getattr(tokenizer, "bos_token_id", None)
    found = {start is not None and row[0] == start for row in rows}
    return found.pop() if len(found) == 1 else None


def doubled_first(rows: Sequence[Sequence[int]]) -> int | None:
    """The first of the rows that begins with one token twice; None where none does."""
    return next((n for n, row in enumerate(rows) if len(row) > 1 and row[0] == row[1]), None)


def known_ids(tokenizer: Tokenizer | None, size: int) -> list[int]:
    """The ids that stand for something: embeddings often have rows that no token has.

    Args:    tokenizer: None = every id. size: rows of the embedding.
    """
    if tokenizer is None:
        return list(range(size))
    return sorted({token for token in tokenizer.get_vocab().values() if 0 <= token < size})


def require_known(rows: Sequence[Sequence[int]], size: int) -> None:
    """Refuse token ids that a model has no embedding for.

    Raises:  PromptError: with the range found and the one that fits.
    """
    low, high = min(map(min, rows)), max(map(max, rows))
    if low < 0 or high >= size:
        raise PromptError(
            f"token ids run from {low} to {high}; the vocabulary is 0 to {size - 1}. "
            "The tokenizer may be another model's, or have tokens that were added to it alone."
        )


def unknown_rows(rows: Sequence[Sequence[int]], tokenizer: Tokenizer | None) -> list[bool]:
    """Whether sequences hold nothing but the unknown token, special tokens left aside."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return [False] * len(rows)
    special = set(getattr(tokenizer, "all_special_ids", ())) - {unknown}
    return [{unknown} == set(row) - special for row in rows]


def repeated_rows(rows: Sequence[Sequence[int]]) -> list[bool]:
    """Whether a few ids, over and over, fill more than half of a sequence.

    The median of such a sequence is theirs. That is normal of a table, of digits or of bytes; where
    the ids are massive the median is too, and no token stands out from it.
    """
    return [_filled(row) > len(row) / 2 for row in rows]


def _filled(row: Sequence[int]) -> int:
    """Places of the few ids that a sequence repeats most."""
    ranked = Counter(row).most_common(REPEATED_IDS)
    return sum(count for _, count in ranked if count >= REPEATED_TIMES)


def _inside(tokenizer: Tokenizer, ids: list[int]) -> Frame:
    """Special tokens at both ends of a text that came without being asked for."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    special = set(getattr(tokenizer, "all_special_ids", ())) - {unknown}
    first = next((i for i, token in enumerate(ids) if token not in special), len(ids))
    after = next((i for i, t in enumerate(reversed(ids)) if t not in special), 0)
    return Frame(tuple(ids[:first]), tuple(ids[len(ids) - after :]), inside=bool(first or after))


def _find(part: Sequence[int], whole: Sequence[int]) -> int | None:
    last = len(whole) - len(part)
    return next((i for i in range(last + 1) if whole[i : i + len(part)] == part), None)
