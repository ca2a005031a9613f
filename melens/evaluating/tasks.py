"""The tasks that are teacher-forced: the answer is given, and how well it was foreseen counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from melens.batches import Prompts, encode_all, prompts, read_text
from melens.chat import in_template
from melens.errors import PromptError
from melens.evaluating.forced import Forced, Foreseen
from melens.framing import frame_of, head_size, split_text
from melens.protocols import JsonObject, Tokenizer
from melens.registry import Registry
from melens.results.evaluation import NATS
from melens.settings import Items
from melens.store import is_text, json_object, lines_of

Measured = tuple[float, float]
"""A value and its weight."""
LN2 = 0.6931471805599453


@dataclass(frozen=True)
class ForcedTask:
    """Items, and what each is worth."""

    name: str
    unit: str
    higher_is_better: bool
    about: str
    items: tuple[Forced, ...]
    score: Callable[[Forced, Foreseen], tuple[Measured, dict[str, Measured]]]
    facts: JsonObject = field(default_factory=dict)


Maker = Callable[[Tokenizer, Items], ForcedTask]
FORCED_TASKS: Registry[Maker] = Registry("task")
LIKELIHOOD_FILES = {
    "gsm8k-likelihood": ("gsm8k/test.jsonl", ("question", "answer")),
    "math500-likelihood": ("math500/test.jsonl", ("problem", "solution")),
}
"""Task -> its file in a data folder, and the fields of a line: question and reference answer."""


def token_loss(item: Forced, found: Foreseen) -> tuple[Measured, dict[str, Measured]]:
    """Nats a scored token, with what perplexity, KL and agreement need."""
    tokens = float(len(found.loss))
    also = {
        "kl": (found.kl.double().mean().item(), tokens),
        "agreement": (found.agree.double().mean().item(), tokens),
    }
    total = found.loss.double().sum().item()
    if size := item.about.get("bytes"):
        also["bits_per_byte"] = (total / LN2 / size, float(size))
    return (total / tokens, tokens), also


@FORCED_TASKS.register("perplexity")
def perplexity(tokenizer: Tokenizer, chosen: Items) -> ForcedTask:
    """Next-token loss of texts: nats a token; bits a byte, KL and agreement beside it."""
    texts = prompts(
        "bundled" if chosen.data is None else chosen.data,
        n=chosen.n or 8,
        length=chosen.length,
        bos=chosen.bos,
    )
    items, head = [], max(1, head_size(tokenizer, bos=chosen.bos))
    for i, ids in enumerate(texts.token_rows(tokenizer)):
        text = tokenizer.decode(ids[head:])
        about = {"text": tokenizer.decode(ids), "bytes": len(text.encode())}
        items.append(Forced.scored_from(head, str(i), ids, about))
    return ForcedTask(
        "perplexity",
        NATS,
        higher_is_better=False,
        items=tuple(items),
        score=token_loss,
        about="Mean next-token loss of all tokens but each text's first; perplexity is its "
        "exponential. Bits a byte count the bytes of the text behind the first token.",
    )


@FORCED_TASKS.register("gsm8k-likelihood")
def gsm8k_likelihood(tokenizer: Tokenizer, chosen: Items) -> ForcedTask:
    """Loss of GSM8K's reference solutions, the question given."""
    return _solutions("gsm8k-likelihood", tokenizer, chosen)


@FORCED_TASKS.register("math500-likelihood")
def math500_likelihood(tokenizer: Tokenizer, chosen: Items) -> ForcedTask:
    """Loss of MATH-500's reference solutions, the problem given."""
    return _solutions("math500-likelihood", tokenizer, chosen)


PLAIN_TEXTS = ("perplexity",)
"""Tasks whose texts are no questions, and so never in the chat template."""


def alike(tokenizer: Tokenizer, task: str, chosen: Items) -> Prompts:
    """The bundled texts with the beginning that a task's items have: where to locate for them."""
    chat = task not in PLAIN_TEXTS and in_template(tokenizer, chosen.chat)
    return prompts(bos=None if chat else chosen.bos, chat=chat)


def _solutions(name: str, tokenizer: Tokenizer, chosen: Items) -> ForcedTask:
    """Question and reference answer; the answer's tokens are scored."""
    file, (asked, told) = LIKELIHOOD_FILES[name]
    pairs = [(row[asked], " " + row[told]) for row in read_jsonl(chosen, file, (asked, told))]
    chat = in_template(tokenizer, chosen.chat)
    asks = [question if chat else f"Question: {question}\nAnswer:" for question, _ in pairs]
    heads = encode_all(tokenizer, asks, bos=None if chat else chosen.bos, chat=chat)
    items, frame = [], frame_of(tokenizer)
    for i, (head, (_, answer)) in enumerate(zip(heads, pairs, strict=True)):
        if not head:
            raise PromptError("a question came out without any token.")
        text = answer.lstrip() if chat else answer
        _, tail = split_text(tokenizer, text, bos=False, frame=frame)
        about = {"prompt": tokenizer.decode(head), "answer": text, "bytes": len(text.encode())}
        items.append(Forced.scored_from(len(head), str(i), (*head, *tail), about))
    how = "the chat template" if chat else "'Question: ... Answer:'"
    return ForcedTask(
        name,
        NATS,
        higher_is_better=False,
        items=tuple(items),
        score=token_loss,
        about=f"Mean loss of the reference solution's tokens, the question given by {how}, zero "
        "shots. No answer is generated.",
    )


def read_jsonl(chosen: Items, name: str, fields: Sequence[str]) -> list[JsonObject]:
    """The first rows of a JSON-lines file, all of them objects with these text fields.

    Raises:  PromptError: no such file, a line that is no such object, or no line at all.
    """
    if chosen.data is None:
        raise PromptError(f"this task has no bundled items; give --data FILE (as {name}).")
    path = chosen.data / name if chosen.data.is_dir() else chosen.data
    rows = []
    for number, line in enumerate(lines_of(read_text(path)), start=1):
        if chosen.n is not None and len(rows) == chosen.n:
            break
        if not line.strip():
            continue
        row = json_object(line)
        if row is None or not all(is_text(row.get(f)) for f in fields):
            raise PromptError(f"{path}, line {number}: no object with {' and '.join(fields)}.")
        rows.append(row)
    if not rows:
        raise PromptError(f"{path} holds no item.")
    return rows
