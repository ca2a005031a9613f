"""The model an export is of: what can be run, what can be saved, and what tells it apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from melens.errors import ModelError, ResultError
from melens.interventions.target import note_weights, require_located_here, require_room
from melens.models.loading import load, load_plain
from melens.models.object_bridges import kept_bridge
from melens.models.origin import Origin, fingerprint, name_of, origin_of
from melens.placement import input_device, require_whole
from melens.protocols import (
    AnyModel,
    HookedModel,
    Loadable,
    Tokenizer,
    TransformersModel,
    is_hooked,
    transformers_of,
)
from melens.results import MELayer
from melens.results.base import load_result
from melens.results.edit import MELENS_JSON, EditFile, Probe
from melens.store import write_atomically


def write_edit(record: EditFile, folder: Path) -> None:
    """Write a folder's melens.json."""
    write_atomically(folder / MELENS_JSON, record.to_json())


def read_edit(folder: str | Path) -> EditFile | None:
    """What a folder's melens.json says; None where there is none.

    Raises:  ResultError: it is broken, or of another kind or version.
    """
    path = Path(folder).expanduser() / MELENS_JSON
    if not path.is_file():
        return None
    found = load_result(path)
    if not isinstance(found, EditFile):
        raise ResultError(f"{path} holds a result of another kind; export the edit again.")
    return found


PROBE_IDS, PROBE_LOGITS = 6, 16
CLOSE, CLOSE_IN_HALF = 1e-3, 0.1
"""Largest difference of a probe's logits over the largest of them: between float32 runs, where
only the order of sums differs, and where one ran in a 16-bit dtype."""


@dataclass
class Subject:
    """A model to be exported."""

    runnable: AnyModel
    """What an edit is entered on: a bridge, or a plain transformers model."""
    tokenizer: Tokenizer | None
    """None where it is not known."""
    origin: Origin
    weights: str | None
    """A bridge's fingerprint; None for a plain model, which has none to compare with."""
    source: str | Path | None
    """Name or folder that the weights can be read from again; None where that is not known."""

    @property
    def hf(self) -> TransformersModel:
        """The transformers module that is called."""
        return transformers_of(self.runnable)

    @property
    def bridged(self) -> bool:
        """Whether its submodules were replaced, so that it cannot be saved."""
        return self.runnable is not self.hf


def subject_of(
    model: Loadable, me_layer: MELayer | None, *, tokenizer: Tokenizer | None = None
) -> Subject:
    """Load or look at a model, and check that the ME Layer is its.

    Raises:  ModelError and its kinds: it cannot be had, or is a PEFT model with weights of its own.
             ResultError: the ME Layer was located on other weights.
    """
    if isinstance(model, (str, Path)):
        dtype = me_layer.run.dtype if me_layer is not None else None
        found = _of_bridge(load(model, dtype=dtype), source=model)
    elif is_hooked(model):
        found = _of_bridge(model)
    else:
        found = _of_plain(model, tokenizer)
    bridge = kept_bridge(found.runnable)
    if me_layer is not None and bridge is not None:
        require_located_here(bridge, me_layer)
    elif me_layer is not None:  # a plain model that was never bridged has no fingerprint
        text, name = found.hf.config.get_text_config(), found.origin.name
        room = {"n_layers": text.num_hidden_layers, "d_model": text.hidden_size}
        require_room(me_layer, **room, name=name)
    return found


@torch.no_grad()
def answer(hf: TransformersModel, ids: tuple[int, ...], at: tuple[int, ...]) -> list[float]:
    """Logits at the last of ``ids``, at the vocabulary entries ``at``."""
    device = input_device(hf)
    row = hf(torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
    return row[list(at)].double().tolist()


def probe_of(hf: TransformersModel) -> Probe:
    """A few logits of the model as it is."""
    size = vocabulary_of(hf)
    ids, at = spread(size, PROBE_IDS), spread(size, PROBE_LOGITS)
    return Probe(ids=ids, at=at, logits=tuple(answer(hf, ids, at)), dtype=dtype_of(hf))


def check_probe(hf: TransformersModel, probe: Probe, *, name: str) -> None:
    """Refuse a model that answers otherwise than the one that was exported.

    Raises:  ResultError: other weights.
    """
    fits = max(*probe.ids, *probe.at) < vocabulary_of(hf)
    found = answer(hf, probe.ids, probe.at) if fits else [float("inf")] * len(probe.at)
    scale = max(map(abs, probe.logits)) or 1.0
    close = CLOSE if dtype_of(hf) == probe.dtype == "float32" else CLOSE_IN_HALF
    off = max(abs(a - b) for a, b in zip(found, probe.logits, strict=True)) / scale
    if not off <= close:
        raise ResultError(
            f"{name} was exported from other weights than these (their logits differ by {off:.1g} "
            "of the largest); export it again."
        )


def accept(bridge: HookedModel, record: EditFile, *, name: str) -> None:
    """Take a model that answers as the exported one did for the one that was located.

    Raises:  ResultError: other weights.
    """
    check_probe(bridge.original_model, record.probe, name=name)
    if record.me_layer is not None:  # the probe allows for another dtype
        note_weights(bridge, record.me_layer.run.weights)


def vocabulary_of(hf: Any) -> int:
    """Number of token ids that the model can be given."""
    return int(hf.get_input_embeddings().weight.shape[0])


def dtype_of(hf: TransformersModel) -> str:
    """What it computes in, e.g. ``float32``."""
    return str(next(hf.parameters()).dtype).removeprefix("torch.")


def spread(size: int, count: int) -> tuple[int, ...]:
    """Up to ``count`` numbers evenly over ``0 .. size - 1``, neither end among them."""
    return tuple(sorted({(2 * i + 1) * size // (2 * count) for i in range(count)}))


def _of_bridge(bridge: HookedModel, *, source: str | Path | None = None) -> Subject:
    if not hasattr(bridge, "original_model"):
        raise ModelError(
            "a HookedTransformer cannot be exported; give the name or folder of its weights."
        )
    origin = origin_of(bridge)
    source = source or _folder(bridge.original_model)
    if source is None and origin.revision is not None:  # a hub id, which has a commit
        source = origin.name
    return Subject(bridge, bridge.tokenizer, origin, fingerprint(bridge), source)


def _of_plain(model: AnyModel, tokenizer: Tokenizer | None) -> Subject:
    if hasattr(model, "peft_config"):
        raise ModelError("this is a PEFT model; give model.merge_and_unload() to export it.")
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise ModelError(f"export() got a {type(model).__name__}; give a name, a path or a model.")
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    folder = _folder(model)
    origin = Origin(name_of(name))
    return Subject(model, tokenizer or _tokenizer_in(folder), origin, None, folder)


def _tokenizer_in(folder: Path | None) -> Tokenizer | None:
    if folder is None or not any(folder.glob("tokenizer*")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _folder(hf: torch.nn.Module) -> Path | None:
    """The folder that a transformers model says it was read from, if it is there."""
    path = str(getattr(hf.config, "_name_or_path", "") or "")
    return Path(path) if path and (Path(path) / "config.json").is_file() else None


def plain_to_save(subject: Subject) -> tuple[TransformersModel, Tokenizer]:
    """A transformers model whose submodules nobody replaced, and its tokenizer.

    Raises:  ModelError: the folder of a bridge's weights or of a tokenizer is not known.
             ResultError: a bridge's weights are no longer those of its folder.
    """
    if not subject.bridged:
        if subject.tokenizer is None:
            raise ModelError(
                "the folder of this model's tokenizer is not known; save model and tokenizer with "
                "save_pretrained() and give that folder."
            )
        require_whole(subject.hf, "an export of weights")
        return subject.hf, subject.tokenizer
    if subject.source is None:
        raise ModelError(
            "a bridged model cannot be saved, and the folder of its weights is not known; give "
            "the model's name or folder, or the transformers model itself."
        )
    hub = str(subject.source) == subject.origin.name and subject.origin.revision is not None
    hf, tokenizer, _ = load_plain(
        subject.source,
        device="cpu",
        dtype="auto",
        revision=subject.origin.revision if hub else None,
    )
    check_probe(hf, probe_of(subject.hf), name="the model at hand")
    return hf, tokenizer
