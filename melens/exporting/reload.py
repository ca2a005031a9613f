"""load(): a model with its exported edit, which is kept open on it."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from melens import models
from melens.capture import EachPass, enter_kept, exit_kept
from melens.errors import BusyError, InterventionError, ResultError
from melens.evaluating.edits import applied
from melens.exporting.baked_gguf import GGUF_FILE
from melens.exporting.subject import accept, check_probe, read_edit, transformers_of
from melens.formatting import brief
from melens.interventions.context import is_edited
from melens.interventions.core import EditedTokens, warn_of
from melens.placement import DeviceMap
from melens.protocols import AnyModel, HookedModel, Loadable, Tokenizer
from melens.results import MELayer
from melens.results.edit import Edit, EditFile


class _ClosedError(Exception):
    """Leaves an edit's context without the check that it was of use."""


class OpenEdit:
    """An edit in force until it is closed; one that no forward pass used is no error here.

    The model is no thread's own meanwhile: whoever runs it has it for the length of the pass.
    """

    def __init__(self, model: AnyModel, edit: Edit, me_layer: MELayer | None) -> None:
        self.edit, self.me_layer = edit, me_layer
        self._model, self._context = model, applied(model, edit, me_layer)
        self.record, self._count = enter_kept(model, self._context)
        """A mask's MaskRecord, other edits' EditedTokens; None where nothing is edited."""
        self._passes = EachPass(model)
        _OPEN.add(self)
        atexit.unregister(_leave_all)  # once, however many are opened
        atexit.register(_leave_all)

    @property
    def active(self) -> bool:
        """Whether it is still in force."""
        return self._context is not None

    def close(self) -> None:
        """Take the edit off; the model is as it was. A second call does nothing.

        Warns as an edit does at the end of its ``with``.
        """
        if self._context is None:
            return
        self._leave()
        edited = getattr(self.record, "edited", self.record)
        if isinstance(edited, EditedTokens):
            warn_of(edited, self.edit.label, stacklevel=3)

    def _leave(self) -> None:
        if self._context is not None:
            exit_kept(self._model, self._context, self._count, _ClosedError())
            self._passes.close()
            self._context = None

    def __repr__(self) -> str:
        return f"<OpenEdit {self.edit.label}{' (closed)' if self._context is None else ''}>"


_OPEN: weakref.WeakSet[OpenEdit] = weakref.WeakSet()


def _leave_all() -> None:
    """At the end of the process, while the modules that an edit's end needs are still there."""
    for edit in list(_OPEN):
        with suppress(BusyError):
            edit._leave()


def open_edit(folder: str | Path, model: AnyModel) -> OpenEdit:
    """An exported edit in force on a plain transformers model, until ``model.melens_edit.close()``.

    For programs that take a transformers model: pipelines, ``generate_batch``, servers of your own.
    It acts in whatever thread runs the model. WeMask and drop-key; other edits need a bridge.

    Args:    folder: what ``melens.export`` wrote with format ``hf``.
             model: the same weights, as ``AutoModelForCausalLM.from_pretrained(folder)`` reads
             them; another dtype will do.
    Raises:  ResultError: no such export, or other weights. InterventionError: an edit that needs
             a bridge, or another one that is open.
    """
    if not isinstance(model, torch.nn.Module):
        raise InterventionError(
            f"open_edit takes a transformers model, got {brief(model, 40)}; load it first."
        )
    record, hf = _edit_in(folder), transformers_of(model)
    if record is None or record.edit.name == "none":
        raise ResultError(
            f"{folder} has no edit beside its weights (format hf); make one with melens.export."
        )
    if is_edited(model):
        raise InterventionError("an edit is open on this model already; close that one first.")
    check_probe(hf, record.probe, name=str(folder))
    opened = OpenEdit(model, record.edit, record.me_layer)
    vars(model)[KEPT_EDIT] = opened  # kept with the model: an edit that nobody holds would end
    return opened


def check_edit(model: AnyModel, edit: Edit, me_layer: MELayer | None) -> None:
    """Refuse an edit that the model cannot have, without running it.

    Raises:  InterventionError, SiteError: naming the setting.
    """
    OpenEdit(model, edit, me_layer).close()


KEPT_EDIT = "melens_edit"
"""Where a bridge keeps the edit that is open on it."""


def load(  # noqa: PLR0913 (what is loaded, and where it goes, are two things)
    model: Loadable,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    tokenizer: Tokenizer | None = None,
    trust_remote_code: bool = False,
    device_map: DeviceMap = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> HookedModel:
    """A TransformerBridge in eval mode with its tokenizer, its hooks checked.

    A folder that ``melens.export`` wrote is loaded with its edit in force, on every forward pass
    and in ``generate``: ``bridge.melens_edit`` says which, ``bridge.melens_edit.close()`` takes it
    off. Measurements that are given a name or a folder use the model without the edit.

    Args:    model: a named model (``melens models``), a folder, a ``.gguf`` file, a Hugging Face
             id, or a model object: an HF causal LM stays as it is, a TransformerBridge or
             HookedTransformer is checked and returned. The network is used for a hub id, and for
             a named model that is not here yet.
             device: ``cpu``, ``cuda``, ``mps``, ...; None = CUDA, else MPS, else CPU. An object
             is never moved: naming another device for it is refused.
             dtype: torch dtype or its name, ``auto`` = the checkpoint's own; None = float32 on
             the CPU, the checkpoint's own elsewhere.
             revision: branch, tag or commit of a hub id.
             tokenizer: needed only for an HF model object whose folder holds none.
             device_map: for a model that does not fit on one device: ``"auto"``, or a dict of
             module names and devices, ``disk`` among them; as transformers has it. docs/scale.md.
             max_memory: with device_map: device -> bytes or a size, ``{"cpu": "4GB", 0: "20GB"}``.
             offload_folder: with device_map: where weights for ``disk`` are written.
    Raises:  ModelNotFoundError, WeightsError, LicenceError, FetchError: it cannot be had.
             ModelError: no causal LM, remote code. ContractError: its hooks do not add up.
             ResultError: a melens.json that is broken, or of other weights.
    """
    record = _edit_in(model)
    bridge = models.load(
        model,
        device=device,
        dtype=dtype,
        revision=revision,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=offload_folder,
    )
    if record is not None:
        accept(bridge, record, name=f"the edit in {model}")
        vars(bridge)[KEPT_EDIT] = OpenEdit(bridge, record.edit, record.me_layer)
    return bridge


def _edit_in(model: Loadable) -> EditFile | None:
    """The edit that a model's folder says to apply; refuses what is not a model folder."""
    if not isinstance(model, (str, Path)):
        return None
    record = read_edit(model)
    if record is not None and record.format != "hf":
        how = {
            "prefix": "load it with melens.exporting.load_prefix",
            "peft": "load it with PEFT",
            "gguf": f"give its file, {Path(model) / GGUF_FILE}",
        }[record.format]
        raise ResultError(f"{model} is a {record.format} export, no model; {how}.")
    return record
