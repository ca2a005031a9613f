"""What a measurement is fed: a checked model, token batches, and the record of both."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from melens import __version__
from melens.batches import Batch, Prompts, strings_of
from melens.batches import prompts as make_prompts
from melens.capture import fit_ids, pad_id_of
from melens.errors import InterventionError, PromptError
from melens.framing import bos_first, unknown_rows
from melens.interventions.context import is_edited
from melens.interventions.target import note_weights
from melens.models.anatomy import is_folded
from melens.models.bridging import unwrapped
from melens.models.loading import adopt
from melens.models.object_bridges import last_bridge
from melens.models.origin import fingerprint, origin_of
from melens.placement import input_device, placed
from melens.progress import say_once
from melens.protocols import HookedModel, JsonObject, Loadable, ModelLike, is_hooked
from melens.provenance import ModelFacts, RunInfo
from melens.settings import require_whole
from melens.store import digest


@runtime_checkable
class HasArray(Protocol):
    """A tensor, or an array of numpy's."""

    def __array__(self, *args: object, **kwargs: object) -> object: ...


Ids = HasArray | Mapping[str, object] | Sequence[object]
"""Token ids, as ``model.to_tokens`` and tokenizers give them (an attention_mask counts)."""
Source = Prompts | str | Path | Iterable[str] | Iterable[Batch] | Batch | Ids | None
"""What a measurement takes as texts; None = the bundled ones."""
MIN_TOKENS = 4
"""A sequence shorter than this has too few ordinary tokens to compare with."""


@dataclass(frozen=True)
class Inputs:
    """A model whose hooks were checked, and the token batches to run it over."""

    model: HookedModel
    batches: list[Batch]
    settings: JsonObject
    """What the run is fed, so that it can be made again; part of every RunInfo."""
    weights: str
    """Fingerprint of the model's weights."""

    @property
    def rows(self) -> list[list[int]]:
        """Token ids of every sequence, padding dropped."""
        return rows_of(self.batches)

    @property
    def total(self) -> int:
        """Number of sequences."""
        return sum(map(len, self.batches))

    @property
    def decode(self) -> Callable[[int], str]:
        """Token id -> its text; the number in brackets where there is no tokenizer."""
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            return lambda token: f"<{token}>"
        return lambda token: tokenizer.decode([token])

    def run_info(self, *, seed: int, **settings: str | int | bool | None) -> RunInfo:
        """The record of a run over these inputs; ``settings`` are the measurement's own."""
        origin, parameter = origin_of(self.model), next(self.model.parameters())
        facts = ModelFacts(
            name=origin.name,
            revision=origin.revision,
            weights=self.weights,
            dtype=str(parameter.dtype).removeprefix("torch."),
            device=placed(self.model),
        )
        return RunInfo.collect(facts, seed=seed, settings={**self.settings, **settings})

    def facts(self) -> JsonObject:
        """What every number depends on beside texts and settings: the key of what is kept."""
        parameter = next(self.model.parameters())
        return {
            "melens": __version__,
            "weights": self.weights,
            "dtype": str(parameter.dtype),
            "device": input_device(self.model).type,
            "transformers": version("transformers"),
        }

    @classmethod
    def of(cls, model: Any) -> Inputs:
        """A model without texts yet, adopted and fingerprinted; what is ready is given back.

        Raises:  ModelError and its kinds: it cannot be loaded or its hooks do not add up.
        """
        if isinstance(model, cls):
            return model
        _require_reach(model)
        before = last_bridge(model)
        hooked = adopt(model)
        if before is not None and before is not hooked and is_edited(before):
            raise InterventionError(
                f"an edit is open on the bridge of this {type(model).__name__}, which has changed "
                "since: its new bridge does not have the edit; leave it first."
            )
        weights = fingerprint(hooked)
        note_weights(hooked, weights)
        return cls(hooked, [], {}, weights)

    def over(self, prompts: Source, *, batch_size: int = 4, least: int = MIN_TOKENS) -> Inputs:
        """The same model over other texts; it is not looked at again.

        Args:    least: tokens that every sequence must have.
        Raises:  PromptError: as :func:`prepare`.
        """
        batches = _batches(self.model, prompts, batch_size, least)
        settings = _settings(self.model, prompts, rows_of(batches))
        chosen = settings["bos"] is not None or settings["chat"]  # a template has its own way
        if not chosen and settings.get("bos_first") is False:
            _say_without_bos(self.model, prompts)
        return Inputs(self.model, batches, settings, self.weights)

    def ticker(self, progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
        """Turns rows done in a batch into (rows done so far, rows in all)."""
        done = 0

        def tick(rows: int) -> None:
            nonlocal done
            done += rows
            if progress is not None:
                progress(done, self.total)

        return tick


def _require_reach(model: Loadable) -> None:
    """Refuse an object that is edited itself: what is measured runs its bridge."""
    if isinstance(model, (str, Path)) or is_hooked(model):
        return
    if any(is_edited(one) for one in (model, unwrapped(model))):
        raise InterventionError(
            f"an edit is open on this {type(model).__name__} itself, and melens measures through "
            "its bridge, which that edit does not reach; open the edit on the bridge: "
            "bridge = melens.load(model)."
        )


def rows_of(batches: Sequence[Batch]) -> list[list[int]]:
    """Token ids of every sequence, padding dropped."""
    return [
        row[mask].tolist()
        for batch in batches
        for row, mask in zip(batch.ids, batch.mask, strict=True)
    ]


def _say_without_bos(model: HookedModel, source: object) -> None:
    """Say once that TransformerLens would begin these texts otherwise; ids stay as they are."""
    texts = source is None or isinstance(source, (str, Path, Prompts))
    if not texts and isinstance(source, Sequence):
        texts = all(isinstance(text, str) for text in source)
    start = getattr(model.tokenizer, "bos_token", None)
    if texts and start is not None and getattr(model.cfg, "default_prepend_bos", False):
        say_once(
            f"texts begin without BOS, as this tokenizer begins them; TransformerLens's "
            f"model.to_tokens(text) puts {start!r} first, where positions and values differ. "
            "Choose with --bos or --no-bos, in Python melens.prompts(..., bos=True)."
        )


def prepare(
    model: ModelLike, prompts: Source = None, *, batch_size: int = 4, least: int = MIN_TOKENS
) -> Inputs:
    """Adopt a model and turn texts into batches for it; refuses before any forward pass.

    Args:    model: anything ``melens.load`` takes; or ready Inputs, whose model is not checked or
             fingerprinted again, and whose batches stay as they are where no texts are given.
             least: tokens that every sequence must have.

    Raises:  PromptError: no row of at least 4 tokens, or no tokenizer to make rows with.
             ModelError and its kinds: the model cannot be loaded or its hooks do not add up.
    """
    ready = Inputs.of(model)
    if ready.batches and prompts is None:
        return ready
    return ready.over(prompts, batch_size=batch_size, least=least)


def _batches(model: HookedModel, source: object, batch_size: int, least: int) -> list[Batch]:
    require_whole("batch_size", batch_size, error=PromptError)
    limit = getattr(model.cfg, "n_ctx", None)
    batches = _ready(source := _listed(source), pad_id_of(model), batch_size)
    if batches is None:
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise PromptError(
                "this model has no tokenizer; load it with melens.load(model, tokenizer=...), or "
                "pass token ids or batches (melens.batches.Batch.of)."
            )
        if not isinstance(source, Prompts):
            source = "bundled" if source is None else source
            one = isinstance(source, (str, Path))
            source = make_prompts(source if one else strings_of(source))
        batches = source.pack(tokenizer, batch_size=batch_size, max_length=limit)
    _check_lengths(batches, source, limit=limit, least=least)
    return [fit_ids(model, batch) for batch in batches]


def _listed(source: object) -> object:
    """What is gone through only once, as a list; an open file is refused, its lines are no texts.

    A column of a table gives its own list.
    """
    if isinstance(source, io.IOBase):
        raise PromptError("an open file is not a text; pass pathlib.Path(its name), or its text.")
    if isinstance(source, Iterator):
        return list(source)
    listed = getattr(source, "tolist", None)
    kind = getattr(getattr(source, "dtype", None), "kind", "i")
    return source if listed is None or kind not in "OTU" else listed()


def _ready(source: object, pad_id: int | None, size: int) -> list[Batch] | None:
    """Batches and token ids, which need no tokenizer; None for texts."""
    if isinstance(source, Batch):
        return [source]
    if isinstance(source, (list, tuple)) and any(isinstance(item, Batch) for item in source):
        if not all(isinstance(item, Batch) for item in source):
            raise PromptError("token batches are mixed with something else; give batches alone.")
        return list(source)
    read = Batch.read(source, pad_id=pad_id)
    return None if read is None else read.split(size)


def _check_lengths(
    batches: Sequence[Batch], source: object, *, limit: int | None, least: int
) -> None:
    lengths = torch.cat([batch.mask.sum(-1).cpu() for batch in batches])
    if lengths.min() < least:
        row = int(lengths.argmin())
        where = source.place(row) if isinstance(source, Prompts) else f"sequence {row}"
        raise PromptError(
            f"{where} has {int(lengths.min())} token(s); melens needs at "
            f"least {least}, to have ordinary tokens to compare with."
        )
    if limit and lengths.max() > limit:
        raise PromptError(
            f"a sequence has {int(lengths.max())} tokens; the model's context is {limit}."
        )


def _settings(model: HookedModel, source: object, ids: Sequence[Sequence[int]]) -> JsonObject:
    tokenizer = getattr(model, "tokenizer", None)
    made = source if isinstance(source, Prompts) else Prompts(())
    unknown = sum(unknown_rows(ids, tokenizer))
    return {
        "sequences": len(ids),
        "tokens": sum(map(len, ids)),
        "ids": digest([repr(sorted(map(list, ids)))]),
        **({} if tokenizer is None else {"bos_first": bos_first(tokenizer, ids)}),
        "length": max(map(len, ids)),
        "bos": made.bos,
        "chat": made.chat,
        "folded_norms": is_folded(model),
        **({"unknown_texts": unknown} if unknown else {}),
    }
