"""Texts through a model's own chat template, which is a program: rendered apart, under limits."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeGuard

from melens.errors import PromptError
from melens.framing import frame_of, plain_ids, prompt_ids
from melens.protocols import Tokenizer
from melens.store import digest

CHILD = Path(__file__).with_name("chat_child.py")
SECONDS = 10
"""Wall time of one child process; a text takes about a millisecond."""
AT_ONCE = 256
"""Texts that one child process renders."""
MEGABYTES = 512
CHARACTERS = 64_000_000
"""Most that all texts of one call may become."""
_FAILED: dict[str, str] = {}
"""What went wrong, by the hash of what was asked; the texts themselves are not kept."""
MOST_FAILED = 256
WITHOUT = "leave it out (--no-chat of generate and eval, no --chat elsewhere; chat=False in Python)"
"""What to do where a template cannot be used."""
Message = Mapping[str, object]


def has_template(tokenizer: Tokenizer | None) -> TypeGuard[Tokenizer]:
    """Whether there is a chat template at all; it is not looked at."""
    return bool(getattr(tokenizer, "chat_template", None))


def in_template(tokenizer: Tokenizer | None, chat: bool | None) -> bool:
    """Whether a text goes through the template: as asked, else (None) where there is one."""
    return has_template(tokenizer) if chat is None else chat


def task_prompt_ids(tokenizer: Tokenizer, prompt: str, *, chat: bool | None = None) -> list[int]:
    """Ids of a prompt as a task that generates wrote it: rendered, where there is a template.

    A rendered text begins as its template says, without what the tokenizer puts before other
    texts: so does transformers' ``apply_chat_template``, and so do :func:`chat_ids`.

    Args:    chat: as :func:`in_template`.
    """
    return prompt_ids(tokenizer, prompt, add=not in_template(tokenizer, chat))


def template_key(tokenizer: Tokenizer, *, chat: bool | None = None) -> str:
    """Tells apart what :func:`task_prompt_ids` depends on, beside the tokenizer's vocabulary."""
    used = in_template(tokenizer, chat)
    said = repr(getattr(tokenizer, "chat_template", None) if used else None)
    said += " alone" * (used and loses_prefix(tokenizer))
    return digest([said])


def loses_prefix(tokenizer: Tokenizer) -> bool:
    """Whether a rendered text goes without a prefix that an earlier melens put before it: where
    the template begins with BOS itself, nothing was put.

    Raises:  PromptError: as :func:`render`.
    """  # noqa: D205
    if not frame_of(tokenizer).prefix:
        return False
    start = getattr(tokenizer, "bos_token", None)
    return not (start and chat_texts(tokenizer, ["a"])[0].startswith(start))


def chat_opening(tokenizer: Tokenizer) -> str:
    """What every rendered text begins with, whoever speaks first; its first line, as a template
    may write a date behind it. Empty where there is no such thing.
    """  # noqa: D205
    if not has_template(tokenizer):
        return ""
    user = [{"role": "user", "content": text} for text in ("a", "Hello there")]
    chats = [user[:1], user[1:]]
    try:
        made = render(tokenizer, chats)
    except PromptError:  # it is said where a chat is asked for
        return ""
    with suppress(PromptError):  # many templates take no system's turn
        made += render(tokenizer, [[{"role": "system", "content": "Be brief."}, *user[:1]]])
    columns = zip(*made, strict=False)
    same = "".join(at[0] for at in itertools.takewhile(lambda at: len(set(at)) == 1, columns))
    found = re.match(r"\s*[^\n]*", same)
    return found[0] if found and found[0].strip() else ""


def template_of(tokenizer: Tokenizer) -> str:
    """The template that plain chats are put in: the only one, or the one named ``default``.

    Raises:  PromptError: there is none, or there are several and none is the default.
    """
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, Mapping):
        if "default" not in found:
            raise PromptError(
                f"this tokenizer has chat templates named {', '.join(sorted(map(str, found)))}, "
                f"and none named default; {WITHOUT}, or set tokenizer.chat_template."
            )
        found = found["default"]
    if not found:
        raise PromptError(f"this tokenizer has no chat template; {WITHOUT}.")
    if not isinstance(found, str):
        raise PromptError(f"the chat template is a {type(found).__name__}, not text; {WITHOUT}.")
    return found


def chat_texts(tokenizer: Tokenizer, contents: Sequence[str]) -> tuple[str, ...]:
    """Each text as a user's message in the chat template, the answer begun.

    Raises:  PromptError: as :func:`render`.
    """
    return render(tokenizer, [[{"role": "user", "content": text}] for text in contents])


def chat_ids(tokenizer: Tokenizer, contents: Sequence[str]) -> list[list[int]]:
    """Token ids of :func:`chat_texts`; the template alone says what stands around a text."""
    made, frame = chat_texts(tokenizer, contents), frame_of(tokenizer)
    return [plain_ids(tokenizer, text, frame=frame) for text in made]


def chat_start(tokenizer: Tokenizer) -> int | None:
    """The first token that the template puts whatever is said; None where it differs.

    Raises:  PromptError: as :func:`render`.
    """
    firsts = {ids[0] if ids else None for ids in chat_ids(tokenizer, ("a", "Hello there"))}
    return firsts.pop() if len(firsts) == 1 else None


def render(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]], *, begin_answer: bool = True
) -> tuple[str, ...]:
    """Conversations in the tokenizer's chat template, a child process for each AT_ONCE of them.

    Equal to ``tokenizer.apply_chat_template(..., tokenize=False)``, but a template that loops,
    fills the memory or fails ends as one error.

    Raises:  PromptError: no template, or why it could not be rendered.
    """
    template = template_of(tokenizer)
    variables = {
        **getattr(tokenizer, "special_tokens_map", {}),
        "tools": None,
        "documents": None,
        "add_generation_prompt": begin_answer,
    }
    texts: list[str] = []
    for start in range(0, len(conversations), AT_ONCE):
        chats = conversations[start : start + AT_ONCE]
        job = {
            "template": template,
            "variables": variables,
            "conversations": [[dict(message) for message in chat] for chat in chats],
            "seconds": SECONDS,
            "megabytes": MEGABYTES,
            "characters": CHARACTERS,
            "used": sum(map(len, texts)),
        }
        texts += _rendered(json.dumps(job))
    return tuple(texts)


def _rendered(job: str) -> list[str]:
    """The texts of one child; what failed is remembered, so that a hang costs its limit once."""
    key = digest([job])
    texts, error = ([], _FAILED[key]) if key in _FAILED else _run(job)
    if error is None:
        return texts
    if len(_FAILED) >= MOST_FAILED:
        _FAILED.clear()
    _FAILED[key] = error
    said = " ".join(error.split())
    said = said if len(said) <= 200 else f"{said[:200]}..."
    raise PromptError(
        f"the model's chat template cannot be used ({said}); {WITHOUT}, or mend the template."
    )


def _run(job: str) -> tuple[list[str], str | None]:
    """Texts, and what went wrong."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(CHILD)],
            input=job.encode(),
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [], f"it was not done within {SECONDS} seconds"
    except OSError as error:
        return [], f"no process can be started for it: {error.strerror or error}"
    try:
        answer = json.loads(done.stdout)
    except ValueError:  # killed by the system, or not even started
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return [], f"its process ended with code {done.returncode}{': ' * bool(last)}{last[:120]}"
    return list(answer.get("texts", ())), answer.get("error")
