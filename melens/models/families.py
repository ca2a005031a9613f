"""What melens can do with which architecture: a table that was measured beforehand.

By experiments/make_architectures.py, on tiny random models with a planted massive token, for one
version of transformers; a model that is not in it may work all the same, and is checked when it is
loaded.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path

from melens.errors import ModelError, ModelNotFoundError
from melens.models.weight_files import read_json
from melens.registry import did_you_mean

YES, NOTHING = "yes", "-"
Row = dict[str, str]
"""Measure -> "yes", "-" where the model has nothing to measure, or the reason of a refusal."""


@cache
def families() -> dict[str, Row]:
    """Architecture (``LlamaForCausalLM``, ``FalconForCausalLM/40b``) -> what was measured."""
    path = files("melens").joinpath("data", "architectures.json")
    found = json.loads(path.read_text("utf-8"))["families"]
    return {name: _row(dict(said)) for name, said in found.items()}


def family(name: str) -> Row:
    """One architecture's row.

    Raises:  as :func:`family_name`.
    """
    return families()[family_name(name)]


def family_name(name: str) -> str:
    """The architecture that is meant: a class, the beginning of its name, or a model folder.

    Raises:  ModelNotFoundError: it is not in the table; with those that are named alike.
             ModelError: a folder's config.json is not a JSON object.
    """
    known = {key.lower(): key for key in families()}
    if (Path(name) / "config.json").is_file():
        config = read_json(Path(name) / "config.json")
        if not isinstance(config, dict):
            raise ModelError(f"{name}: config.json is not a JSON object.")
        listed = config.get("architectures")
        name = str(listed[0]) if isinstance(listed, list) and listed else name
    asked = name.lower()
    for wanted in (asked, f"{asked}forcausallm", f"{asked}lmheadmodel"):
        if wanted in known:
            return known[wanted]
    raise ModelNotFoundError(
        f"no architecture {name!r} was measured, which does not say that it fails."
        f"{did_you_mean(name, families())} `melens models families` lists them."
    )


def _row(said: Row) -> Row:
    way = said.pop("way")
    refused = said["load"]
    cells = {
        m: YES if not text else NOTHING if text == "none" else text for m, text in said.items()
    }
    if refused:
        cells = {measure: refused if measure == "load" else "" for measure in cells}
    return {"bridge": way or NOTHING, **cells}
