"""Run as a program of its own by melens.chat: renders a chat template under limits.

A chat template is a program that came with the model: it may loop for ever or build a string as
large as the memory. This file imports nothing of melens, so that it starts in a moment; reads one
job as JSON from stdin, and writes one answer as JSON to stdout.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

if TYPE_CHECKING:
    from melens.protocols import JsonObject


class Generation(Extension):
    """``{% generation %}`` marks what a model wrote; it changes nothing of the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's own body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class Dicts:
    """``dict`` of a template, without the class itself."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        """A new dict."""
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[object], value: object = None, /) -> dict[object, object]:
        """As ``dict.fromkeys``."""
        return dict.fromkeys(keys, value)


class PublicNamespace(Namespace):
    """``namespace`` of a template; its names cannot reach what Python keeps to itself."""

    def __init__(
        *args: object, **kwargs: object
    ) -> None:  # self among args: a template may say self=
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace takes no name like {name!r}")


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: object, ensure_ascii: bool = False, indent: int | str | None = None, **more: Any
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)  # local time, as templates mean it


def environment() -> ImmutableSandboxedEnvironment:
    """The sandbox that transformers renders chat templates in."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _to_json
    made.globals |= {
        "raise_exception": _refuse,
        "strftime_now": _now,
        "dict": Dicts(),
        "namespace": PublicNamespace,
    }
    return made


def limit(seconds: int, megabytes: int) -> None:
    """Bound this process; where the system has no such limits the parent's clock is left."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, most in (
        (resource.RLIMIT_AS, megabytes << 20),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some of them
            resource.setrlimit(kind, (most, most))


def answer(job: JsonObject) -> JsonObject:
    """``{"texts": [...]}``, or ``{"error": why}``."""
    try:
        template = environment().from_string(job["template"])
        texts, left = [], job["characters"] - job["used"]
        for messages in job["conversations"]:
            text = template.render(messages=messages, **job["variables"])
            left -= len(text)
            if left < 0:
                return {"error": f"it makes more than {job['characters']:,} characters"}
            texts.append(text)
    except TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except TemplateError as error:
        return {"error": str(error) or type(error).__name__}
    except MemoryError:
        return {"error": f"it needs more than {job['megabytes']} MB"}
    except Exception as error:  # whatever a template can make Python raise
        return {"error": f"{type(error).__name__}: {error}"}
    return {"texts": texts}


if __name__ == "__main__":
    given = json.load(sys.stdin)
    limit(given["seconds"], given["megabytes"])
    json.dump(answer(given), sys.stdout)
