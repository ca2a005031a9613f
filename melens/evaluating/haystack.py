"""Haystacks: a number hidden in a long text, and the question that only it answers.

Built token by token, so that an item has exactly the length asked for; nothing is downloaded.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from melens.batches import BUNDLED_ORDER, bundled_texts, encode, read_text
from melens.chat import chat_texts
from melens.errors import PromptError
from melens.evaluating.forced import Forced
from melens.formatting import brief
from melens.framing import encoded, frame_of, plain_ids, split_text
from melens.protocols import Tokenizer

TASKS = ("passkey", "needles")
CITIES = (
    "Amsterdam",
    "Athens",
    "Bangkok",
    "Berlin",
    "Boston",
    "Cairo",
    "Chicago",
    "Dublin",
    "Geneva",
    "Havana",
    "Helsinki",
    "Jakarta",
    "Lagos",
    "Lima",
    "Lisbon",
    "London",
    "Madrid",
    "Manila",
    "Moscow",
    "Nairobi",
    "Oslo",
    "Paris",
    "Prague",
    "Rome",
    "Seoul",
    "Sydney",
    "Tokyo",
    "Toronto",
    "Vienna",
    "Warsaw",
)
PROSE = ("prose_1", "prose_2", "prose_3")
"""Bundled texts that needles are hidden in: English, as the question is, and without numbers."""
SENTENCE = re.compile(r"[.!?…।؟][\"'”’»)\]*_]*\s+|[。！？]|\n\s*\n\s*")
LINE = re.compile(r"\n\s*")
REACH = 64
"""Tokens that a needle moves at most to stand between two sentences, or at least two lines."""
MANY = 32
"""Places from which on there is choice enough to end a haystack with a sentence too."""
LEAST_FILLER = 8
"""Tokens of text around the needles; with fewer nothing is hidden."""
HIDDEN = "\x1a"
"""Stands for the text while a chat template is put around it."""


@dataclass(frozen=True)
class Haystack:
    """What is hidden where; every cell of ``lengths`` x ``depths`` gets ``seeds`` items."""

    task: str = "passkey"
    """passkey: one number. needles: several cities' numbers, one of which is asked for."""
    lengths: tuple[int, ...] = (256, 512, 1024)
    """Tokens of a whole item: BOS, text, question and answer."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Of the asked needle in the text: 0 = before it, 1 = behind it, right before the question."""
    seeds: int = 3
    needles: int = 4
    """Cities, the asked one included; only of ``needles``."""
    text: Path | str | None = None
    """A UTF-8 file, or the text itself; None = the bundled English prose, over and over."""
    bos: bool | None = None
    """None = as the tokenizer does."""
    chat: bool = False
    """Whether a chat template goes around text and question, the answer begun for the model."""
    seed: int = 0
    """Another one draws other numbers, cities and places in the text."""
    plain: int = 8
    """Plain texts, as long as the longest item, for the loss by position; 0 = none."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built for any model.

        Raises:  PromptError: with the setting and what fits.
        """
        if self.task not in TASKS:
            raise PromptError(f"task must be passkey or needles, got {brief(self.task, 40)}.")
        if not self.lengths or min(self.lengths) < 1 or len(set(self.lengths)) < len(self.lengths):
            raise PromptError(f"lengths must be different numbers of tokens, got {self.lengths}.")
        if not self.depths or any(not 0 <= depth <= 1 for depth in self.depths):
            raise PromptError(f"depths must be numbers from 0 to 1, got {self.depths}.")
        if len(set(self.depths)) < len(self.depths):
            raise PromptError(f"depths must differ, got {self.depths}.")
        if self.seeds < 1:
            raise PromptError(f"seeds must be at least 1, got {self.seeds}.")
        if self.task == "needles" and not 2 <= self.needles <= len(CITIES):
            raise PromptError(f"needles must be 2 to {len(CITIES)}, got {self.needles}.")
        if self.chat and self.bos is not None:
            raise PromptError("chat=True leaves BOS to the chat template; drop bos.")

    def read(self, *, bundled: Iterable[str] = PROSE) -> str:
        """The text; ``bundled`` names which of the bundled ones.

        Raises:  PromptError: a file that cannot be read, or nothing in it.
        """
        if isinstance(self.text, Path):
            return read_text(self.text)
        if self.text is None:
            texts: dict[str, str] = dict(zip(BUNDLED_ORDER, bundled_texts(), strict=True))
            return "\n\n".join(texts[name] for name in bundled)
        if not self.text.strip():
            raise PromptError("the text is empty; give at least one character.")
        return self.text


@dataclass(frozen=True)
class Filler:
    """A tokenized text that starts again where it ends, and where in it one may cut."""

    ids: tuple[int, ...]
    sentences: tuple[int, ...]
    """Tokens that begin a sentence, 0 among them, in order."""
    lines: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: str) -> Filler:
        """Cuts are known where the tokenizer tells which characters a token stands for.

        Raises:  PromptError: no tokens.
        """
        fast, text = bool(getattr(tokenizer, "is_fast", False)), f"{text.strip()}\n\n"
        made, frame = encoded(tokenizer, text, return_offsets_mapping=fast), frame_of(tokenizer)
        ids = tuple(frame.without(made["input_ids"]))
        if not ids:
            raise PromptError(f"the tokenizer makes no tokens of {text[:40]!r}; give another text.")
        spans = frame.without(made["offset_mapping"]) if fast else []
        return cls(ids, _first_tokens(text, spans, SENTENCE), _first_tokens(text, spans, LINE))

    def begin(self, count: int, rng: random.Random) -> int:
        """Where a stretch of ``count`` tokens begins: a sentence, and if there is much choice one
        whose stretch ends with a sentence too.
        """  # noqa: D205
        starts = set(self.sentences)
        both = [at for at in self.sentences if (at + count) % len(self.ids) in starts]
        return rng.choice(both if len(both) >= MANY else self.sentences)

    def stretch(self, begin: int, count: int) -> list[int]:
        """``count`` ids from ``begin`` on."""
        return [self.ids[(begin + i) % len(self.ids)] for i in range(count)]

    def place(self, begin: int, count: int, depth: float) -> int:
        """Tokens of a stretch before what stands at ``depth``; a deeper one never comes earlier."""
        spot = round(depth * count)
        if spot in (0, count):
            return spot
        reach = min(REACH, count // 6)
        for starts in (self.sentences, self.lines):
            near = self._nearest(starts, begin + spot) - begin
            if abs(near - spot) <= reach and 0 <= near <= count:
                return near
        return spot

    def _nearest(self, starts: Sequence[int], at: int) -> int:
        """The cut nearest to a token, the rounds that the text goes counted on."""
        size = len(self.ids)
        rounds, here = divmod(at, size)
        after = bisect_left(starts, here)
        around = [starts[after - 1] - (0 if after else size)]
        around.append(starts[after] if after < len(starts) else starts[0] + size)
        return rounds * size + min(around, key=lambda start: (abs(start - here), start))


def _first_tokens(
    text: str, spans: Sequence[tuple[int, int]], ends: re.Pattern[str]
) -> tuple[int, ...]:
    """The tokens right behind what ``ends`` finds, and the very first."""
    begins = {found.end() for found in ends.finditer(text)}
    taken: dict[int, int] = {}
    for i, (start, stop) in enumerate(spans):
        piece = text[start:stop]
        if piece.strip():
            taken.setdefault(start + len(piece) - len(piece.lstrip()), i)
    return tuple(sorted({0} | {i for start, i in taken.items() if start in begins}))


def haystacks(
    tokenizer: Tokenizer, haystack: Haystack, *, context: int | None
) -> tuple[Forced, ...]:
    """Every item, lengths outermost, then depths, then seeds; only the answer's tokens are scored.

    Args:    context: tokens that the model can take; None = any number.
    Raises:  PromptError: a length over the context or too short for the question, a tokenizer
             that cannot write the numbers, no chat template.
    """
    longest = max(haystack.lengths)
    if context and longest > context:
        raise PromptError(
            f"length {longest} is over the model's context of {context} tokens; choose at most "
            f"{context}."
        )
    filler = Filler.of(tokenizer, haystack.read())
    return tuple(
        _item(tokenizer, haystack, filler, length, depth, number)
        for length in haystack.lengths
        for depth in haystack.depths
        for number in range(haystack.seeds)
    )


@dataclass(frozen=True)
class _Needle:
    """A sentence with a number, and how deep it is to stand."""

    name: str
    key: str
    depth: float
    text: str


def _item(
    tokenizer: Tokenizer, haystack: Haystack, filler: Filler, length: int, depth: float, number: int
) -> Forced:
    # Each cell draws again: items that shared text or numbers would not be independent.
    rng = random.Random(f"{haystack.seed} {haystack.task} {length} {depth:g} {number}")
    needles = _needles(haystack, depth, rng)
    asked = needles[0]
    head, tail, answer = _frame(tokenizer, haystack, asked)
    _check_written(tokenizer, answer, asked.key)
    pieces = [plain_ids(tokenizer, f"\n{needle.text}\n") for needle in needles]
    count = length - len(head) - len(tail) - len(answer) - sum(map(len, pieces))
    if count < LEAST_FILLER:
        raise PromptError(
            f"length {length} is too short for {haystack.task} with this tokenizer; it needs at "
            f"least {length - count + LEAST_FILLER} tokens."
        )
    begin = filler.begin(count, rng)
    places = [filler.place(begin, count, needle.depth) for needle in needles]
    body, last = [], 0
    text = filler.stretch(begin, count)
    for i in sorted(range(len(needles)), key=lambda i: (places[i], needles[i].depth)):
        body += [*text[last : places[i]], *pieces[i]]
        last = places[i]
    prompt = [*head, *body, *text[last:], *tail]
    about = {
        "task": haystack.task,
        "length": length,
        "depth": depth,
        "seed": number,
        "placed": places[0] / count,
        "begin": begin,
        "answer": asked.key,
        "asked": asked.name,
        "needles": [[n.name, n.key, at / count] for n, at in zip(needles, places, strict=True)],
        "prompt": tokenizer.decode(prompt),
    }
    name = f"{haystack.task}-{length}-{depth:g}-{number}"
    return Forced.scored_from(len(prompt), name, (*prompt, *answer), about)


def _needles(haystack: Haystack, depth: float, rng: random.Random) -> list[_Needle]:
    """The asked one first; the others spread over the text, the slot nearest to it left free."""
    if haystack.task == "passkey":
        key = str(rng.randrange(10_000, 100_000))
        text = f"The pass key is {key}. Remember it: {key} is the pass key."
        return [_Needle("", key, depth, text)]
    n = haystack.needles
    slots = [(i + 0.5) / n for i in range(n)]
    slots.remove(min(slots, key=lambda slot: abs(slot - depth)))
    names, keys = rng.sample(CITIES, n), rng.sample(range(10_000, 100_000), n)
    return [
        _Needle(name, str(key), at, f"The special number of {name} is {key}.")
        for name, key, at in zip(names, keys, [depth, *slots], strict=True)
    ]


def _frame(
    tokenizer: Tokenizer, haystack: Haystack, asked: _Needle
) -> tuple[list[int], list[int], list[int]]:
    """Tokens before the text, behind it up to the answer, and of the answer."""
    if haystack.task == "passkey":
        intro = "A pass key is hidden in the text below. Remember it: you will be asked for it.\n\n"
        question, said = "What is the pass key?", "The pass key is"
    else:
        intro = (
            "Special numbers of cities are hidden in the text below. Remember them: you will be "
            "asked for one of them.\n\n"
        )
        question = f"What is the special number of {asked.name}?"
        said = f"The special number of {asked.name} is"
    if haystack.chat:
        before, after = _template(tokenizer, f"{intro}{HIDDEN}\n\n{question}").split(HIDDEN)
        head, after = plain_ids(tokenizer, before), after + said
    else:
        head = encode(tokenizer, intro, bos=haystack.bos)
        after = f"\n\nQuestion: {question}\nAnswer: {said}"
    tail, whole = plain_ids(tokenizer, after), plain_ids(tokenizer, f"{after} {asked.key}")
    # Tokens that the answer changes are the answer's: what stands before is what was asked.
    same = next((i for i, (a, b) in enumerate(zip(tail, whole, strict=False)) if a != b), len(tail))
    return head, whole[:same], whole[same:]


def _template(tokenizer: Tokenizer, content: str) -> str:
    (made,) = chat_texts(tokenizer, [content])
    if made.count(HIDDEN) != 1:
        raise PromptError("this chat template does not keep a message as it is; drop --chat.")
    return made


def _check_written(tokenizer: Tokenizer, answer: Sequence[int], key: str) -> None:
    """A vocabulary without digits makes every number the same token, which anyone would find."""
    written = re.sub(r"\s", "", tokenizer.decode(list(answer)))
    if not written.endswith(key):
        raise PromptError(
            f"this tokenizer cannot write the number {key} (it gives {brief(written, 40)}); "
            "long-context needs one that has digits."
        )


def plain_texts(
    tokenizer: Tokenizer, haystack: Haystack, *, length: int, n: int, per_bin: int
) -> tuple[Forced, ...]:
    """Stretches of the text as it stands, spread over it and never overlapping; BOS by policy.

    Fewer than ``n`` where the text is short. At most ``per_bin`` positions of each of
    :func:`bins` are scored, evenly spread: logits of all would be the largest tensor there is.

    Raises:  PromptError: not one stretch of ``length`` tokens.
    """
    names = [name for name in BUNDLED_ORDER if name != "digits"]
    text = haystack.read(bundled=names)
    head, body = split_text(tokenizer, text, bos=haystack.bos)
    step = length - len(head)
    count = min(n, len(body) // step)
    if not count:
        raise PromptError(
            f"the text has {len(body)} tokens, loss by position needs {step} in a row; give a "
            "longer --text, shorter --lengths, or --texts 0."
        )
    scored = set(scored_positions(length, per_bin))
    stride = len(body) // count
    made = []
    for i in range(count):
        row = (*head, *body[i * stride : i * stride + step])
        about = {"task": "plain", "length": length, "prompt": tokenizer.decode(row)}
        made.append(Forced(f"text-{i}", row, tuple(at in scored for at in range(length)), about))
    return tuple(made)


def bins(length: int) -> tuple[tuple[int, int], ...]:
    """First and last-but-one positions of log-spaced stretches, two an octave, from 1 on."""
    edges = sorted({min(length, round(2 ** (k / 2))) for k in range(2 * length.bit_length() + 1)})
    return tuple((low, high) for low, high in pairwise(edges) if low < high)


def scored_positions(length: int, per_bin: int) -> tuple[int, ...]:
    """Positions of a plain text whose loss counts."""
    found: list[int] = []
    for low, high in bins(length):
        size = min(per_bin, high - low)
        found += [low + i * (high - low) // size for i in range(size)]
    return tuple(found)
