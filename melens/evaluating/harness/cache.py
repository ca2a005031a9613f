"""What tells one model under an edit from another, and lm-eval's cache kept apart by it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from melens.evaluating.conditions import located_facts
from melens.models.origin import SAMPLES_PER_TENSOR
from melens.results import MELayer
from melens.results.edit import Edit

WRAPPED = "_original_component."
"""What bridging puts between the names of a module and its own parameters."""


@torch.no_grad()
def weights_key(model: Any) -> str:
    """Short hash of a transformers model's weights.

    Bridging the model later does not change it, but where the bridge splits fused queries, keys and
    values (GPT-2, NeoX, Phi-3): there a bridged model counts as another one.

    Args:    model: a transformers model; its bridge's ``original_model``.
    """
    digest = hashlib.sha256()
    values = {name.replace(WRAPPED, ""): value for name, value in model.named_parameters()}
    for name, value in sorted(values.items()):
        flat = value.detach().flatten()
        step = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(flat[::step].cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def key_of(**facts: Any) -> str:
    """Short hash of facts in JSON."""
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_key(model: Any, tokenizer: Any, edit: Edit, me_layer: MELayer | None) -> str:
    """Short hash of weights, dtype, chat template and edit."""
    return key_of(
        weights=weights_key(model), dtype=str(next(model.parameters()).dtype),
        chat_template=getattr(tokenizer, "chat_template", None),
        edit=edit.model_dump(mode="json"),
        located=None if edit.name == "none" else located_facts(me_layer),
    )  # fmt: skip


def keep_apart(database: Any, key: str) -> None:
    """Give one model under one edit a table of its own in lm-eval's cache file.

    lm-eval keys a cached answer by the request alone, so that a masked model would be given the
    answers of the base. Every read and write of the file is done in the table it names.
    """
    from sqlitedict import SqliteDict

    table = f"melens-{key}"
    SqliteDict(database.filename, tablename=table).close()  # makes the table
    database.tablename = table
