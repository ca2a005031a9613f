"""What stands in --model_args, checked before any weights are read; and what keeps caches apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from melens.errors import InterventionError, UnknownNameError
from melens.evaluating.edits import located_facts
from melens.formatting import brief
from melens.models.origin import digest_of, sample
from melens.protocols import JsonObject, Tokenizer, TransformersModel
from melens.registry import unknown_name
from melens.results import MELayer, load_located
from melens.results.edit import Edit
from melens.store import hash_facts

if TYPE_CHECKING:
    from sqlitedict import SqliteDict

MASK = ("mask_select", "mask_rate", "mask_strength", "mask_layers", "mask_seed")
LOADING = ("device", "dtype", "revision", "trust_remote_code")
PASSED_ON = (
    "batch_size",
    "max_batch_size",
    "max_length",
    "truncation",
    "logits_cache",
    "softmax_dtype",
    "add_bos_token",
    "prefix_token_id",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
)
"""Arguments of lm-eval's HFLM that mean something for a model that is loaded already."""
PLAIN = ("none", "wemask", "drop-key")
"""Edits that a transformers model takes without a bridge."""


@dataclass(frozen=True)
class ModelArguments:
    """A model under an edit, as asked for."""

    edit: Edit
    me_layer: MELayer | None
    locate: bool
    """The ME Layer is needed and was not given."""
    loading: JsonObject = field(default_factory=dict)
    passed_on: JsonObject = field(default_factory=dict)


def read_settings(given: Mapping[str, object]) -> ModelArguments:
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
    return ModelArguments(
        edit,
        me_layer,
        locate=edit.name != "none" and me_layer is None and not named,
        loading={name: given[name] for name in LOADING if given.get(name) is not None},
        passed_on={name: given[name] for name in PASSED_ON if name in given},
    )


def _check_names(given: Mapping[str, object]) -> None:
    known = ("edit", *MASK, "located", *LOADING, *PASSED_ON)
    for name in given:
        if name not in known:
            said = unknown_name("model argument", name, ["pretrained", *known])
            raise UnknownNameError(said)


def _edit(name: str, masks: JsonObject) -> Edit:
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


def _layers(text: object) -> str | tuple[int, ...]:
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


def _located(path: object, edit: Edit) -> MELayer | None:
    if path is None:
        return None
    if edit.name == "none":
        raise InterventionError("located belongs to an edit; name one, e.g. mask_rate=0.5.")
    return load_located(str(path))


WRAPPED = "_original_component."
"""What bridging puts between the names of a module and its own parameters."""


@torch.no_grad()
def weights_key(model: TransformersModel) -> str:
    """Short hash of a transformers model's weights.

    Bridging the model later does not change it, but where the bridge splits fused queries, keys and
    values (GPT-2, NeoX, Phi-3): there a bridged model counts as another one.

    Args:    model: a transformers model; its bridge's ``original_model``.
    """
    values = model.named_parameters()
    return digest_of((name.replace(WRAPPED, ""), sample(value)) for name, value in values)


def model_key(
    model: TransformersModel, tokenizer: Tokenizer, edit: Edit, me_layer: MELayer | None
) -> str:
    """Short hash of weights, dtype, chat template and edit."""
    return hash_facts(
        {
            "weights": weights_key(model),
            "dtype": str(next(model.parameters()).dtype),
            "chat_template": getattr(tokenizer, "chat_template", None),
            "edit": edit.model_dump(mode="json"),
            "located": None if edit.name == "none" else located_facts(me_layer),
        }
    )


def keep_apart(database: SqliteDict, key: str) -> None:
    """Give one model under one edit a table of its own in lm-eval's cache file.

    lm-eval keys a cached answer by the request alone, so that a masked model would be given the
    answers of the base. Every read and write of the file is done in the table it names.
    """
    from sqlitedict import SqliteDict

    table = f"melens-{key}"
    SqliteDict(database.filename, tablename=table).close()  # makes the table
    database.tablename = table
