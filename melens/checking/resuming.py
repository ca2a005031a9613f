"""A finished check taken up again: told from files alone, before torch or the model is loaded."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from melens import __version__
from melens.checking.keeping import FOLDER, Keeper, read_head
from melens.errors import MelensError
from melens.models.resolve import asked
from melens.provenance import RunInfo, versions
from melens.results import CheckReport
from melens.results.check import REPORT_JSON
from melens.store import TEXT, digest, hash_facts, hash_file, read_limited, write_atomically

SCHEMA = "melens/check-asked/1"
ASKED = "asked.json"
CODE = (".py", ".jinja")
"""What a model may read from folders inside its own."""
NOTES = (".md", ".html", ".xml")
"""What it never reads: a check may write its own into a model's folder, as its report."""


def asked_of(model: object, texts: object, **options: object) -> str | None:
    """Short hash of what a check is asked: every byte of model and texts, options and versions.

    Args:    texts: as given, before a tokenizer cuts them. options: of loading and cutting.
    Returns: None where files do not say all of it: a hub id, a model in memory, standard input.
    """
    if options.get("chat") or options.get("trust_remote_code"):
        return None  # a template may write today's date, and code may lie elsewhere
    if not isinstance(model, (str, Path)):
        return None
    try:
        files = _files_of(model)
        words = None if files is None else _words_of(texts)
        name = asked(model).shown
    except (MelensError, OSError):  # what is wrong with either is said when it is loaded
        return None
    if files is None or words is None:
        return None
    facts = {
        "melens": __version__,
        "versions": [versions(), version("tokenizers")],
        "machine": [platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES")],
        "model": name,
        "files": {name: hash_file(path) for name, path in files},
        "texts": words,
        "options": options,
    }
    return hash_facts(facts)


def remember(folder: Path, question: str, report: CheckReport) -> None:
    """Write down what the stages in a folder answer, if they are this report's."""
    key = read_head(folder / FOLDER / "locate.key").get("key")
    kept = Keeper(folder, key).read("locate") if isinstance(key, str) else None
    if kept is None or kept[0] != report.result("locate"):
        return  # another check writes into the same folder
    made = {"schema": SCHEMA, "asked": question, "key": key, "run": report.run.model_dump()}
    write_atomically(folder / FOLDER / ASKED, json.dumps(made, sort_keys=True) + "\n")


def answered_before(folder: Path, question: str) -> tuple[Keeper, RunInfo] | None:
    """The keeper of the stages that answer this, and the run that they are of."""
    found = read_head(folder / FOLDER / ASKED)
    if (found.get("schema"), found.get("asked")) != (SCHEMA, question):
        return None
    if not isinstance(found.get("key"), str):
        return None
    try:
        return Keeper(folder, found["key"]), RunInfo.model_validate(found.get("run"))
    except ValueError:
        return None


def _files_of(model: str | Path) -> list[tuple[str, Path]] | None:
    """The files that a local model is loaded from."""
    from melens.models.named import NAMED

    wanted = asked(model)
    folder = NAMED[wanted.name].converted if wanted.kind == "named" else wanted.path
    if wanted.kind not in ("named", "folder") or not (folder / "config.json").is_file():
        return None
    return [(str(path.relative_to(folder)), path) for path in sorted(_read_by_models(folder))]


def _read_by_models(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_file() and path.suffix not in NOTES and path.name != REPORT_JSON:
            yield path
        elif path.is_dir():
            yield from (one for one in path.rglob("*") if one.is_file() and one.suffix in CODE)


def _words_of(texts: object) -> object:
    if texts is None or (isinstance(texts, str) and texts != "-"):
        return "bundled" if texts is None else {"text": texts}
    if isinstance(texts, Path):
        return {"file": digest([read_limited(texts, TEXT)], length=64)}
    if "melens.batches" in sys.modules:  # there where its Prompts are; it needs torch
        from melens.batches import Prompts

        if isinstance(texts, Prompts):
            return None if texts.chat else asdict(texts)
    if isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts):
        return list(texts)
    return None
