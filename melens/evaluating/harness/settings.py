"""What stands in lm-eval's ``--model_args``, checked before any weights are read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from melens.errors import InterventionError, UnknownNameError
from melens.formatting import brief
from melens.results import MELayer, load_located
from melens.results.edit import Edit

MASK = ("mask_select", "mask_rate", "mask_strength", "mask_layers", "mask_seed")
LOADING = ("device", "dtype", "revision", "trust_remote_code")
PASSED_ON = (
    "batch_size", "max_batch_size", "max_length", "truncation", "logits_cache", "softmax_dtype",
    "add_bos_token", "prefix_token_id", "think_end_token", "enable_thinking", "chat_template_args",
)  # fmt: skip
"""Arguments of lm-eval's HFLM that mean something for a model that is loaded already."""
PLAIN = ("none", "wemask", "drop-key")
"""Edits that a transformers model takes without a bridge."""


@dataclass(frozen=True)
class Wanted:
    """A model under an edit, as asked for."""

    edit: Edit
    me_layer: MELayer | None
    locate: bool
    """The ME Layer is needed and was not given."""
    loading: dict[str, Any] = field(default_factory=dict)
    passed_on: dict[str, Any] = field(default_factory=dict)


def read_settings(given: Mapping[str, Any]) -> Wanted:
    """Sort and check every model argument but ``pretrained``.

    ``edit`` is wemask where a ``mask_...`` is given and none where nothing is. ``mask_select,
    mask_rate, mask_strength, mask_layers, mask_seed`` are an Edit's settings; ``mask_layers`` is
    ``after``, ``next`` or layers from 0 as in ``12-29`` or ``12+14-16``. ``located`` is the JSON
    that ``melens locate`` saved; layers named by number mask the first token without it.

    Raises:  UnknownNameError: no such argument. InterventionError: settings that mean nothing.
             ResultError: ``located`` is no located ME Layer.
    """
    _check_names(given)
    masks = {name.removeprefix("mask_"): given[name] for name in MASK if name in given}
    edit = _edit(str(given.get("edit", "wemask" if masks else "none")), masks)
    me_layer = _located(given.get("located"), edit)
    named = edit.name in PLAIN and isinstance(edit.layers, tuple)
    return Wanted(
        edit, me_layer, locate=edit.name != "none" and me_layer is None and not named,
        loading={name: given[name] for name in LOADING if given.get(name) is not None},
        passed_on={name: given[name] for name in PASSED_ON if name in given},
    )  # fmt: skip


def _check_names(given: Mapping[str, Any]) -> None:
    known = ("edit", *MASK, "located", *LOADING, *PASSED_ON)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise UnknownNameError(
                f"unknown model argument '{name}'.{hint} Known: pretrained, {', '.join(known)}."
            )


def _edit(name: str, masks: dict[str, Any]) -> Edit:
    if "layers" in masks:
        masks["layers"] = _layers(masks["layers"])
    try:
        return Edit.model_validate({"name": name, **masks})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"][:1]))
        where = "" if not place else "edit" if place == "name" else f"mask_{place}"
        said = first["msg"].removeprefix("Value error, ")
        shown = f", got {brief(first['input'], 40)}" if place else ""
        raise InterventionError(": ".join(filter(None, [where, said])) + f"{shown}.") from None


def _layers(text: Any) -> str | tuple[int, ...]:
    """``after``, ``next``, ``12``, ``12-29``, ``12+14-16``; a comma would be lm-eval's."""
    if text in ("after", "next"):
        return text
    if isinstance(text, (list, tuple)):
        return tuple(text)
    found: list[int] = []
    for part in str(text).split("+"):
        ends = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if not ends or int(ends[2] or ends[1]) < int(ends[1]):
            raise InterventionError(
                f"mask_layers must be after, next or layers from 0 as in 12-29 or 12+14-16, got "
                f"{brief(text, 40)}."
            )
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return tuple(found)


def _located(path: Any, edit: Edit) -> MELayer | None:
    if path is None:
        return None
    if edit.name == "none":
        raise InterventionError("located belongs to an edit; name one, e.g. mask_rate=0.5.")
    return load_located(str(path))
