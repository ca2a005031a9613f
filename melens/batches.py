"""Texts or ids -> token batches: the bundled set, files, stdin, strings; BOS and chat policy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from melens.chat import chat_ids
from melens.errors import PromptError
from melens.formatting import brief, counted
from melens.framing import cut, frame_of, split_text
from melens.protocols import Tokenizer
from melens.settings import require_whole
from melens.shapes import TokenIds, TokenMask
from melens.store import TEXT, decoded, lines_of, read_limited, read_stdin
from melens.token_ids import padded, read_ids, require_no_hole

BUNDLED = "bundled"
BUNDLED_ORDER = (
    "prose_1",
    "code_1",
    "german",
    "digits",
    "chinese",
    "json",
    "prose_2",
    "russian",
    "french",
    "code_2",
    "arabic",
    "prose_3",
    "spanish",
    "japanese",
    "hindi",
)
"""Interleaved, so that the first few sequences already differ in kind and in first token."""
BUNDLED_CHAT = ("chat_1", "chat_2", "chat_3")
DEFAULT_N = 8
DEFAULT_LENGTH = 128


@dataclass(frozen=True)
class Batch:
    """Token ids with their mask and absolute positions, all ``[batch, pos]``.

    ``positions`` counts real tokens from 0 in each row, whatever side the padding is on;
    padding has position -1.
    """

    ids: TokenIds
    mask: TokenMask
    positions: TokenIds

    @classmethod
    def of(cls, ids: TokenIds, mask: TokenMask | None = None) -> Batch:
        """A batch of ready token ids; no mask means no padding."""
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point():
            raise PromptError("ids must be a tensor of integers; Batch.pad takes lists of ids.")
        if ids.ndim != 2 or not ids.numel():
            raise PromptError(f"ids must be [batch, pos] and not empty, got {tuple(ids.shape)}.")
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if mask.shape != ids.shape or not mask.any(dim=1).all():
            raise PromptError("mask must have the shape of ids and a real token in every row.")
        require_no_hole(mask)
        positions = (mask.long().cumsum(-1) - 1).masked_fill(~mask, -1)
        return cls(ids, mask, positions)

    @classmethod
    def pad(cls, rows: Sequence[Sequence[int]], *, pad_id: int = 0, side: str = "right") -> Batch:
        """Pad rows of ids to one length on ``side`` (``right`` or ``left``)."""
        if side not in ("left", "right"):
            raise PromptError(f"padding side {side!r} is neither 'left' nor 'right'.")
        width = max(map(len, rows), default=0)
        ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            span = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[i, span] = torch.tensor(row, dtype=torch.long)
            mask[i, span] = True
        return cls.of(ids, mask)

    @classmethod
    def read(cls, source: object, *, pad_id: int | None = None) -> Batch | None:
        """The batch of ready ids as :func:`melens.token_ids.read_ids` takes them; None for others.

        Raises:  PromptError: ids of another type or shape, or a row without a real token.
        """
        found = read_ids(source, pad_id=pad_id)
        return None if found is None else cls.of(*padded(*found))

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def padded(self) -> bool:
        """Whether any row is shorter than the batch."""
        return not bool(self.mask.all())

    def split(self, size: int) -> list[Batch]:
        """Batches of at most ``size`` rows, in order.

        Raises:  PromptError: a size below 1.
        """
        require_whole("batch_size", size, error=PromptError)
        parts = (part.split(size) for part in (self.ids, self.mask, self.positions))
        return [Batch(*part) for part in zip(*parts, strict=True)]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.ids.to(device), self.mask.to(device), self.positions.to(device))


@dataclass(frozen=True)
class Prompts:
    """Texts and how to cut them; :meth:`pack` turns them into batches for one tokenizer."""

    texts: tuple[str, ...]
    n: int | None = None
    length: int | None = None
    bos: bool | None = None
    chat: bool = False
    places: tuple[str, ...] = ()
    """Where each text stands, as "line 7 of texts.txt"; () where nobody knows."""

    def __repr__(self) -> str:
        texts, chosen = counted(len(self.texts), "text"), ("n", "length", "bos", "chat")
        return f"<Prompts: {texts}, {', '.join(f'{k}={getattr(self, k)}' for k in chosen)}>"

    def place(self, row: int) -> str:
        """What row of :meth:`token_rows` that is, in words; the texts' beginnings come first."""
        return self.places[row] if row < len(self.places) else f"sequence {row}"

    def token_rows(self, tokenizer: Tokenizer, *, max_length: int | None = None) -> list[list[int]]:
        """Rows of ids: the first piece of every text, then the second ones, until ``n``.

        Args:    max_length: the model's context; a longer ``length`` is refused.
        Raises:  PromptError: length over the context, a BOS that the tokenizer lacks, no tokens.
        """
        length = self.length or min(DEFAULT_LENGTH, max_length or DEFAULT_LENGTH)
        if max_length is not None and length > max_length:
            raise PromptError(
                f"length {length} is over the model's context of {max_length} tokens; "
                f"choose at most {max_length}."
            )
        if self.chat:
            pieces = [[ids[:length]] for ids in chat_ids(tokenizer, self.texts)]
        else:
            frame = frame_of(tokenizer)
            parts = [split_text(tokenizer, t, bos=self.bos, frame=frame) for t in self.texts]
            pieces = [list(cut(*part, length)) for part in parts]
        depth = max(map(len, pieces))
        rows = [piece[i] for i in range(depth) for piece in pieces if i < len(piece)]
        return rows[: self.n]

    def pack(
        self,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 4,
        side: str = "right",
        max_length: int | None = None,
    ) -> list[Batch]:
        """Token batches of at most ``batch_size`` rows, in order.

        Padding is id 0: a tokenizer's own pad id may be none of the model's.

        Raises:  PromptError: as :meth:`token_rows`, or a batch size below 1.
        """
        require_whole("batch_size", batch_size, error=PromptError)
        rows = self.token_rows(tokenizer, max_length=max_length)
        return padded_batches(rows, batch_size, side=side)


def padded_batches(rows: Sequence[Sequence[int]], size: int, *, side: str = "right") -> list[Batch]:
    """Rows of ids as batches of at most ``size``, in order."""
    return [Batch.pad(rows[i : i + size], side=side) for i in range(0, len(rows), size)]


def with_prefix(
    rows: Sequence[Sequence[int]], prefix: Sequence[int], *, replaces_first: bool
) -> list[list[int]]:
    """Rows of ids with a prefix before each.

    Args:    replaces_first: the prefix takes the place of each row's first token.
    """
    return [[*prefix, *row[int(replaces_first) :]] for row in rows]


def prompts(
    source: str | Path | Sequence[str] = BUNDLED,
    *,
    n: int | None = None,
    length: int | None = None,
    bos: bool | None = None,
    chat: bool = False,
) -> Prompts:
    """Choose texts: ``"bundled"``, ``"-"`` (stdin), a Path of a UTF-8 file, or strings.

    A string other than those two is itself the text. Long texts are cut into pieces of ``length``
    tokens, BOS included; a short one makes a short row, a one-token text a row of one token.

    Args:    n: how many rows; None = 8 of the bundled set, every first piece of strings, at most
             8 pieces of one file.
             length: tokens a row at most, >= 1; None = 128, or the model's context if shorter.
             bos: None as the tokenizer does, True with BOS first, False with nothing before the
             text. What a tokenizer puts after a text (EOS, [SEP]) is always left out.
             chat: put each text through the tokenizer's chat template as a user's message;
             the template then decides about BOS.
    Raises:  PromptError: nothing to read, not UTF-8, empty texts, or n or length below 1.
    """
    for name, value in (("n", n), ("length", length)):
        require_whole(name, value, or_none=True, error=PromptError)
    for name, value in (("bos", bos), ("chat", chat)):
        if value is not None and not isinstance(value, bool):
            raise PromptError(f"{name} must be True, False or None, got {brief(value, 40)}.")
    if chat and bos is not None:
        raise PromptError("chat=True leaves BOS to the chat template; drop bos.")
    texts, least = _texts(source, chat=chat)
    n = n or least
    if empty := [i for i, text in enumerate(texts) if not text.strip()]:
        raise PromptError(f"text {empty[0]} is empty; give at least one character.")
    if (
        len(texts) == 1
        and "\n" not in texts[0]
        and len(texts[0]) < 200
        and os.path.isfile(texts[0])  # noqa: PTH113 - Path.is_file raises on too long a name
    ):
        raise PromptError(
            f"{texts[0]!r} is a file here; to read it pass pathlib.Path({texts[0]!r})."
        )
    places = source.places if isinstance(source, FileLines) else ()
    return Prompts(texts, n=n, length=length, bos=bos, chat=chat, places=places)


def _texts(source: object, *, chat: bool) -> tuple[tuple[str, ...], int]:
    """The texts, and how many rows they make where nothing is said."""
    if isinstance(source, str) and source == BUNDLED:
        texts = bundled_texts(chat=chat)
        return texts, len(texts) if chat else DEFAULT_N
    if isinstance(source, Path) or (isinstance(source, str) and source == "-"):
        return (_whole(source),), DEFAULT_N
    texts = (source,) if isinstance(source, str) else strings_of(source)
    return texts, len(texts)


def _whole(source: Path | str) -> str:
    """All of a file, or of stdin (``-``)."""
    if str(source) == "-":
        return _not_empty(read_stdin(TEXT, error=PromptError), "standard input")
    return read_text(Path(source))


def read_lines(source: Path | str) -> list[str]:
    """Every line of a UTF-8 file or of stdin (``-``) that is not blank.

    Raises:  PromptError: nothing to read, or not UTF-8.
    """
    name = "standard input" if str(source) == "-" else str(source)
    lines = {f"line {n} of {name}": s for n, s in enumerate(lines_of(_whole(source)), start=1)}
    found = {place: line for place, line in lines.items() if line.strip()}
    return FileLines(found.values(), tuple(found))


class FileLines(list[str]):
    """Lines of a file, which know where they stand in it."""

    def __init__(self, lines: Iterable[str], places: tuple[str, ...]) -> None:
        super().__init__(lines)
        self.places = places


def strings_of(source: object) -> tuple[str, ...]:
    """The texts of a list; nothing else is a list of texts.

    Raises:  PromptError: naming what was given.
    """
    texts = tuple(source) if isinstance(source, (list, tuple)) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise PromptError(
            "texts must be a string, a Path or a list of at least one string, got a "
            f"{type(source).__name__} ({brief(source, 60)}); token ids go to the measurement "
            "itself, as in melens.locate(model, ids)."
        )
    return texts


def bundled_texts(*, chat: bool = False) -> tuple[str, ...]:
    """The texts that come with melens: prose, code, digits, JSON and eight languages; or chat."""
    folder = resources.files("melens") / "texts"
    names = BUNDLED_CHAT if chat else BUNDLED_ORDER
    return tuple((folder / f"{name}.txt").read_text("utf-8").strip() for name in names)


def read_text(path: Path) -> str:
    """A UTF-8 file's text; a missing, unreadable or binary file is a PromptError."""
    try:
        raw = read_limited(path, TEXT)
    except (OSError, ValueError) as error:  # ValueError: a NUL inside the name
        said = getattr(error, "strerror", None) or error
        raise PromptError(f"cannot read the text {path}: {said}.") from None
    return _not_empty(decoded(raw, str(path), error=PromptError), str(path))


def encode(tokenizer: Tokenizer, text: str, *, bos: bool | None) -> list[int]:
    """Token ids of one text under the BOS policy of :func:`prompts`.

    The text is open at its end: what the tokenizer would put after it (EOS, [SEP]) is left out.
    """
    return encode_all(tokenizer, [text], bos=bos)[0]


def encode_all(
    tokenizer: Tokenizer, texts: Sequence[str], *, bos: bool | None, chat: bool = False
) -> list[list[int]]:
    """:func:`encode` of many texts; the chat template is run once for all of them."""
    if chat:
        return chat_ids(tokenizer, texts)
    frame = frame_of(tokenizer)
    parts = [split_text(tokenizer, text, bos=bos, frame=frame) for text in texts]
    return [head + body for head, body in parts]


def _not_empty(text: str, name: str) -> str:
    if not text.strip():
        what = "holds nothing but blank lines" if text else "is empty"
        raise PromptError(f"{name} {what}; give at least one character of text.")
    return text
