"""What to train on: JSON lines, checked whole before any model is loaded, then tokenised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from melens.batches import encode_all, read_text
from melens.chat import has_template, render
from melens.errors import PromptError
from melens.framing import frame_of, plain_ids, split_text
from melens.protocols import JsonObject, Tokenizer
from melens.store import digest, is_text, json_object, lines_of

Kind = Literal["messages", "prompt", "question", "preference"]
KINDS: dict[Kind, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "question": ("question", "answer"),
}
"""Kind of a file -> the fields of a row; a file is of one kind."""
FITS = "messages; prompt and completion; question and answer; or prompt, chosen and rejected"
ROLES = ("system", "user", "assistant")
IGNORED = -100
"""The label of a token that is not trained on, as transformers has it."""


@dataclass(frozen=True)
class TrainingRow:
    """One row as a conversation and its answer; a preference has two answers."""

    line: int
    """In the file, from 1."""
    messages: tuple[dict[str, str], ...]
    """Turns before the answer; of a plain prompt one turn of the user."""
    answer: str
    rejected: str | None = None


@dataclass(frozen=True)
class TrainingData:
    """A file of rows, all of one kind."""

    path: Path
    kind: Kind
    rows: tuple[TrainingRow, ...]
    sha256: str
    """Of the file's text."""


def read_training_data(path: Path | str) -> TrainingData:
    """Read and check every line; no model and no tokenizer is needed.

    Args:    path: JSON lines: ``messages`` (a list of role and content, the last an assistant's),
             ``prompt`` and ``completion``, ``question`` and ``answer`` (GSM8K as published), or
             ``prompt``, ``chosen`` and ``rejected``.
    Raises:  PromptError: an empty file or a bad line, naming its number (from 1).
    """
    path = Path(path)
    text = read_text(path)
    kind: Kind | None = None
    rows = []
    for number, line in enumerate(lines_of(text), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = json_object(line)
        if row is None:
            raise PromptError(f"{where}: no JSON object.")
        kind = kind or _kind_of(row, where)
        rows.append(_row(row, kind, number, where))
    if kind is None:
        raise PromptError(f"{path} holds no row; give {FITS}, one object a line.")
    return TrainingData(path, kind, tuple(rows), digest([text], length=64))


def _kind_of(row: JsonObject, where: str) -> Kind:
    for kind, fields in KINDS.items():
        if all(name in row for name in fields):
            return kind
    raise PromptError(f"{where}: a row has {', '.join(sorted(row))[:80]}; give {FITS}.")


def _row(row: JsonObject, kind: Kind, number: int, where: str) -> TrainingRow:
    if kind == "messages":
        turns = _turns(row.get("messages"), where)
        return TrainingRow(number, turns[:-1], turns[-1]["content"])
    fields = KINDS[kind]
    for name in fields:
        if name not in row:
            raise PromptError(
                f"{where}: no {name}; the file's rows have {', '.join(fields)}, as its first one."
            )
        if name == "prompt" and isinstance(row.get(name), list):
            continue
        if not is_text(row.get(name)) or not row[name].strip():
            raise PromptError(f"{where}: {name} must be a text that is not empty.")
    asked = row[fields[0]]
    before = _turns(asked, where, ends="user") if isinstance(asked, list) else _asked(asked)
    if kind != "preference":
        return TrainingRow(number, before, row[fields[1]])
    if row["chosen"].strip() == row["rejected"].strip():
        raise PromptError(
            f"{where}: chosen and rejected are the same text; there is no preference."
        )
    return TrainingRow(number, before, row["chosen"], row["rejected"])


def _asked(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def _turns(found: object, where: str, *, ends: str = "assistant") -> tuple[dict[str, str], ...]:
    """A conversation whose last turn is the assistant's (or, of a prompt, the user's)."""
    turns = found if isinstance(found, list) else []
    for n, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not is_text(turn.get("content")):
            raise PromptError(f"{where}: message {n} must have a role and a content that is text.")
        if turn.get("role") not in ROLES:
            raise PromptError(
                f"{where}: message {n} has the role {str(turn.get('role'))[:40]!r}; melens trains "
                f"on {', '.join(ROLES)} (tools need a template of their own)."
            )
    if not turns or turns[-1]["role"] != ends or not turns[-1]["content"].strip():
        raise PromptError(f"{where}: the last message must be the {ends}'s, and not empty.")
    if ends == "assistant" and len(turns) == 1:
        raise PromptError(f"{where}: there is an answer and nothing that it answers.")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


@dataclass(frozen=True)
class TokenRows:
    """Rows as token ids; what was too long is counted, never cut."""

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...]
    """The same, IGNORED where a token is not trained on."""
    lines: tuple[int, ...]
    """Of the file, from 1."""
    too_long: tuple[int, ...]
    """Lines of rows that have more tokens than allowed, and were left out."""
    chat: bool
    """Whether the chat template was used."""

    @property
    def tokens(self) -> int:
        """In all rows together."""
        return sum(map(len, self.ids))


def tokenise(
    data: TrainingData, tokenizer: Tokenizer, *, max_tokens: int, chat: bool | None = None
) -> TokenRows:
    """Prompts in the tokenizer's chat template, then the answers; only these are trained on.

    Without a template a question is put as ``Question: ... Answer:`` and any other prompt as it is.
    There the end-of-text token closes every answer; a template closes it in its own way.

    Args:    max_tokens: rows with more are left out and counted.
             chat: None = the template where there is one.
    Raises:  PromptError: a conversation of several turns without a template, a template that fails,
             or no row that is short enough.
    """
    used = has_template(tokenizer) if chat is None else chat
    make = _in_template if used else _plain
    kept, labels, lines = [], [], []
    parts = make(data, tokenizer)
    taken = set[int]()
    too_long = {row.line for row, head, tail in parts if len(head) + len(tail) > max_tokens}
    for row, head, tail in parts:
        if row.line in too_long or row.line in taken:  # of a pair the better answer alone
            continue
        taken.add(row.line)
        kept.append((*head, *tail))
        labels.append((*[IGNORED] * len(head), *tail))
        lines.append(row.line)
    if not kept:
        raise PromptError(
            f"all {len(data.rows)} rows of {data.path} have more than {max_tokens} tokens; allow "
            "more (--max-tokens)."
        )
    found = tuple(kept), tuple(labels), tuple(lines)
    return TokenRows(*found, tuple(sorted(too_long)), used)


Parts = list[tuple[TrainingRow, Sequence[int], Sequence[int]]]


def _in_template(data: TrainingData, tokenizer: Tokenizer) -> Parts:
    frame = frame_of(tokenizer)
    rows = _with_rejected(data)
    asked = render(tokenizer, [row.messages for row in rows])
    told = render(
        tokenizer,
        [[*row.messages, {"role": "assistant", "content": row.answer}] for row in rows],
        begin_answer=False,
    )
    made: Parts = []
    for row, before, whole in zip(rows, asked, told, strict=True):
        if not whole.startswith(before):
            raise PromptError(
                f"{data.path}, line {row.line}: the chat template does not write the conversation "
                "before an answer as it writes it alone, so the answer's tokens cannot be told."
            )
        head = plain_ids(tokenizer, before, frame=frame)
        made.append((row, head, plain_ids(tokenizer, whole[len(before) :], frame=frame)))
    return made


def _with_rejected(data: TrainingData) -> list[TrainingRow]:
    """Every answer as a row: of a pair the better one first."""
    return [
        replace(row, answer=answer)
        for row in data.rows
        for answer in (row.answer, row.rejected)
        if answer is not None
    ]


def _plain(data: TrainingData, tokenizer: Tokenizer) -> Parts:
    if long := next((row for row in data.rows if len(row.messages) > 1), None):
        raise PromptError(
            f"{data.path}, line {long.line}: a conversation of {len(long.messages) + 1} messages "
            "needs a chat template, and this tokenizer has none (or --no-chat was asked for)."
        )
    form: Callable[[str], str] = (
        "Question: {}\nAnswer:".format if data.kind == "question" else "{}".format
    )
    rows = _with_rejected(data)
    asks = [form(row.messages[0]["content"]) for row in rows]
    heads = encode_all(tokenizer, asks, bos=None, chat=False)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    made: Parts = []
    for row, head in zip(rows, heads, strict=True):
        answer = row.answer if data.kind in ("prompt", "preference") else f" {row.answer}"
        _, tail = split_text(tokenizer, answer, bos=False, frame=frame_of(tokenizer))
        made.append((row, head, [*tail, *end]))
    return made
