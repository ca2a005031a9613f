"""Finished stages on disk: what a kill leaves, and what the same command takes up again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from melens import __version__
from melens.errors import ResultError
from melens.protocols import (
    AnyModel,
    HookedModel,
    JsonObject,
    Tokenizer,
    bridged_config,
    transformers_of,
)
from melens.provenance import versions
from melens.results.base import Result, load_result
from melens.results.quantise import Quantisation
from melens.store import (
    PAGE,
    RESULT,
    digest,
    hash_facts,
    hash_tensors,
    json_object,
    read_limited,
    remove_file,
    write_atomically,
)

if TYPE_CHECKING:
    from torch import Tensor

    from melens.checking.bench import Bench

SCHEMA = "melens/check-stage/2"
FOLDER = "stages"
MOST_SECONDS = 1e9


@dataclass(frozen=True)
class Keeper:
    """Reads and writes finished stages under one folder; without a folder it does nothing."""

    folder: Path | None
    key: str
    """Of everything that a stage's numbers depend on."""
    schemes: tuple[str, ...] = ()
    """Number formats that the stage quantise has to hold."""

    @classmethod
    def of(cls, folder: Path | None, bench: Bench) -> Keeper:
        """The keeper of one model on one set of texts, in this version of melens."""
        from melens.checking.bench import CAUSE_TOKENS, VIEW_TOKENS
        from melens.interventions.context import require_no_edit

        if folder is None:
            return cls(None, "", bench.schemes)
        require_no_edit(bench.model)
        parameter = next(bench.model.parameters())
        facts = {
            "melens": __version__,
            "versions": versions(),
            "weights": full_hash(bench.model),
            "dtype": str(parameter.dtype),
            "device": parameter.device.type,
            "rows": bench.inputs.rows,
            "settings": bench.inputs.settings,
            "tokens": [CAUSE_TOKENS, VIEW_TOKENS],
            "model": bench.inputs.run_info(seed=0).model,
            "config": config_of(bench.model),
            "tokenizer": tokenizer_hash(getattr(bench.model, "tokenizer", None)),
        }
        return cls(folder, hash_facts(facts), bench.schemes)

    def read(self, stage: str) -> tuple[Result, float] | None:
        """A finished stage and its seconds; None where there is none, it is damaged, or of
        something else: then it is measured again.
        """  # noqa: D205
        path = self._path(stage)
        if path is None:
            return None
        head = read_head(path.with_suffix(".key"))
        seconds = head.get("seconds")
        if not isinstance(seconds, (int, float)) or not 0 <= seconds < MOST_SECONDS:
            return None
        try:
            data = read_limited(path, RESULT)
            if head != self._about(stage, data, seconds):
                return None
            found = load_result(path)
            if isinstance(found, Quantisation) and not found.covers(self.schemes):
                return None
            return found, float(seconds)
        except (OSError, ResultError):
            return None

    def write(self, stage: str, result: Result, seconds: float) -> None:
        """Keep a finished stage; the key comes last, so that half of it counts as nothing.

        Raises:  OutputError: the folder cannot be written.
        """
        path = self._path(stage)
        if path is None:
            return
        remove_file(path.with_suffix(".key"))
        text = result.to_json()
        write_atomically(path, text)
        head = self._about(stage, text.encode(), seconds)
        write_atomically(path.with_suffix(".key"), json.dumps(head, sort_keys=True) + "\n")

    def _about(self, stage: str, data: bytes, seconds: float) -> JsonObject:
        """What a stage's key file says: of what it is, and which bytes it belongs to."""
        return {
            "schema": SCHEMA,
            "key": self.key,
            "stage": stage,
            "seconds": seconds,
            "sha256": digest([data], length=64),
        }

    def _path(self, stage: str) -> Path | None:
        return None if self.folder is None else self.folder / FOLDER / f"{stage}.json"


def full_hash(model: AnyModel) -> str:
    """sha256 over every byte of every weight: one changed entry is another model.

    The fingerprint of a RunInfo samples; a damaged entry between its samples would go unseen.
    """
    from torch import nn

    from melens.placement import filled_state, is_offloaded

    inner = transformers_of(model)
    assert isinstance(inner, nn.Module)
    if is_offloaded(inner):
        with filled_state(inner, _hash_of) as filled:
            state = sorted(model.state_dict().items())
            return digest((f"{n} {filled.get(id(x)) or _hash_of(x)}" for n, x in state), length=64)
    weights = sorted(model.state_dict().items())
    labelled = ((f"{name}{tuple(value.shape)}{value.dtype}", value) for name, value in weights)
    return hash_tensors(labelled, length=64)


def _hash_of(value: Tensor) -> str:
    return hash_tensors([(f"{tuple(value.shape)}{value.dtype}", value)], length=64)


def config_of(model: HookedModel) -> JsonObject:
    """The model's config: an epsilon or a RoPE base is no weight and changes every number."""
    config = bridged_config(model)
    found = dict(vars(model.cfg)) if config is None else dict(config.to_dict())
    found.pop("_name_or_path", None)  # the same model by another path
    return {**found, "attention": getattr(config, "_attn_implementation", None)}


def tokenizer_hash(tokenizer: Tokenizer | None) -> str | None:
    """Of vocabulary, merges, special tokens and chat template: stages tokenise by themselves."""
    if tokenizer is None:
        return None
    inner = getattr(tokenizer, "backend_tokenizer", None)
    held = inner.to_str() if inner is not None else sorted(tokenizer.get_vocab().items())
    special = getattr(tokenizer, "special_tokens_map", None)
    flags = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]
    return digest([repr([held, special, flags, getattr(tokenizer, "chat_template", None)])])


def read_head(path: Path) -> JsonObject:
    """What a key file says; nothing where there is none, or a damaged one."""
    try:
        return json_object(read_limited(path, PAGE).decode()) or {}
    except (OSError, UnicodeDecodeError):
        return {}
