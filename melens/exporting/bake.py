"""bake(): changes written into a model's saved weights, so that whatever loads them has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from melens.errors import InterventionError, ModelError, ResultError, SiteError
from melens.exporting.baked_gguf import baked_before, source_gguf, write_gguf
from melens.exporting.folder import check_out, place, record_of, write_model
from melens.exporting.subject import (
    CLOSE_IN_HALF,
    Subject,
    dtype_of,
    plain_to_save,
    read_edit,
    spread,
    subject_of,
    vocabulary_of,
)
from melens.formatting import brief
from melens.interventions import ffn_ablate_neurons, ffn_zero_weights, norm_scale_dims, transplant
from melens.interventions.core import check_indices
from melens.interventions.experts import expert_ablate_neuron, expert_prune, expert_zero_weights
from melens.models.anatomy import anatomy, check_layer, norm_of
from melens.models.decoder import decoder_of
from melens.models.experts import experts_of
from melens.models.ffn import ffn_of
from melens.models.loading import adopt, load_plain
from melens.models.origin import Origin, fingerprint
from melens.models.view import view_of
from melens.protocols import HookedModel, Loadable, Options, Tokenizer, TransformersModel
from melens.results.baked import Baked, WeightEdit, baked_in, require_apart
from melens.results.edit import Edit

CLOSE = 1e-3
"""Largest difference of the check's logits over the largest of them, float32: a gain is multiplied
elsewhere in the sum than an edit of the running model adds to it."""
CHECKED = 7


@dataclass
class Opened:
    """A model as it is saved, and the same weights under hooks."""

    hf: TransformersModel
    bridge: HookedModel
    donors: dict[str, Opened] = field(default_factory=dict)

    def donor(self, edit: WeightEdit) -> Opened:
        """The model that a transplant takes from."""
        if edit.donor is None:
            return self
        if edit.donor not in self.donors:
            hf, tokenizer, _ = load_plain(edit.donor, device="cpu", dtype="auto")
            self.donors[edit.donor] = opened(hf, tokenizer)
        return self.donors[edit.donor]


def opened(hf: TransformersModel, tokenizer: Tokenizer | None) -> Opened:
    """A transformers model's weights, plain and under hooks; the model stays as it is."""
    plain = cast("TransformersModel", view_of(hf).eval())
    return Opened(plain, adopt(plain, tokenizer=tokenizer))


@dataclass(frozen=True)
class WeightWrite:
    """One place of a parameter, and what is written there."""

    parameter: nn.Parameter
    view: Tensor
    """A part of the parameter, in its memory."""
    factor: float = 0.0
    offset: float = 0.0
    """What the model adds to the stored value before it multiplies by it (1 of Gemma's gains)."""
    source: Tensor | None = None
    """What to write instead of the product."""

    @torch.no_grad()
    def apply(self) -> None:
        """Write; computed in float32, rounded to the parameter's dtype."""
        stored = self.view.float()
        made = (stored + self.offset) * self.factor - self.offset
        self.view.copy_(made if self.source is None else self.source)


def bake(  # noqa: PLR0913 (one call for two formats)
    model: Loadable,
    edits: Sequence[WeightEdit],
    *,
    out: str | Path,
    format: str = "hf",
    tokenizer: Tokenizer | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Save a model whose weights hold the edits, so that every engine that loads it has them.

    They act at every token. The same edits are entered on the running model first, and the changed
    weights must give its logits. The config keeps them under ``melens_baked`` (of a GGUF: the field
    ``melens.baked``), and melens.json too.

    Args:    model: a name, a folder, a bridge or a transformers model, which is left as it was.
             edits: ``melens.results.edit.WeightEdit``; none of one place twice.
             out: a new or empty folder, or an earlier export, which is replaced.
             format: ``hf``: a model folder of safetensors. ``gguf``: ``model.gguf``, of a model
             that is a GGUF file itself; tokenizer, fields and unchanged tensors are copied.
             tokenizer: of a transformers model whose own folder has none.
             revision, trust_remote_code: of a hub id, as in ``melens.load``.
    Raises:  InterventionError, SiteError: an edit that this model cannot have, or weights that do
             not give the edit's logits. ModelError: weights that are shared between layers,
             quantised, or not to be had; for gguf, a model that is no GGUF file. ResultError:
             ``model`` or ``out`` holds another export. OutputError: the disk said no.
    """
    edits = require_apart(edits)
    if format not in ("hf", "gguf"):
        raise InterventionError(
            f"changed weights are written as hf or gguf, not {brief(format, 40)}."
        )
    target = check_out(out)
    if format == "gguf":
        return _bake_gguf(model, edits, target)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    subject = _subject(model, tokenizer, options)
    hf, tokenizer = plain_to_save(subject)
    if getattr(hf, "hf_quantizer", None) is not None:
        raise ModelError("this model is quantised, so its weights cannot be edited; dequantise it.")
    both, before = opened(hf, tokenizer), baked_in(hf.config)
    with _changed(both, edits, subject.origin) as made:
        subject = Subject(both.hf, tokenizer, subject.origin, made.weights, None)
        record = record_of(subject, Edit(name="none"), None, "hf", baked=(*before, made))
        return place(target, lambda folder: write_model(hf, tokenizer, folder, record), record)


def _bake_gguf(model: Loadable, edits: tuple[WeightEdit, ...], target: Path) -> Path:
    with source_gguf(model) as header:
        hf, tokenizer, origin = load_plain(str(model), device="cpu", dtype="float32")
        both, before = opened(hf, tokenizer), baked_before(header)
        with _changed(both, edits, origin) as made:
            subject = Subject(both.hf, tokenizer, origin, made.weights, None)
            record = record_of(subject, Edit(name="none"), None, "gguf", baked=(*before, made))
            values = {name: both.hf.get_parameter(name).detach() for name in made.tensors}
            return place(
                target, lambda folder: write_gguf(header, values, record.baked, folder), record
            )


@contextmanager
def _changed(both: Opened, edits: tuple[WeightEdit, ...], origin: Origin) -> Iterator[Baked]:
    """The weights changed and checked while this is open; what there is to know of it."""
    weights = fingerprint(both.bridge)
    writes = [write for edit in edits for write in writes_of(both, edit)]
    wanted, clean = _logits(both, edits), answer(both.hf)
    with written(both.hf, writes) as tensors:
        yield Baked(
            edits=edits,
            model=origin.name,
            weights=weights,
            dtype=dtype_of(both.hf),
            tensors=tensors,
            logit_change=float((wanted - clean).abs().max()),
            logit_difference=_checked(both.hf, wanted),
        )


def _subject(model: Loadable, tokenizer: Tokenizer | None, options: Options) -> Subject:
    if not isinstance(model, (str, Path)):
        return subject_of(model, None, tokenizer=tokenizer)
    beside = read_edit(model)
    if beside is not None and beside.edit.name != "none":
        raise ResultError(
            f"{model} has the edit {beside.edit.label} in its melens.json, located on weights that "
            "would change; bake the model that it was made of, then export the edit of the result."
        )
    hf, found, origin = load_plain(model, device="cpu", dtype="auto", **options)
    return Subject(hf, tokenizer or found, origin, None, model)


@contextmanager
def written(hf: TransformersModel, writes: Sequence[WeightWrite]) -> Iterator[tuple[str, ...]]:
    """The stored weights changed while this is open; the same bits again at the end.

    Returns: names of the parameters that are changed.
    Raises:  as :func:`bake`, before anything is written.
    """
    known: dict[int, list[str]] = {}
    for name, value in hf.named_parameters(remove_duplicate=False):
        known.setdefault(id(value), []).append(name)
    names = {name for write in writes for name in [_name(known, write.parameter)]}
    kept = {id(w.parameter): (w.parameter, w.parameter.detach().clone()) for w in writes}
    try:
        for write in writes:
            write.apply()
            if not torch.isfinite(write.view).all():
                raise InterventionError(
                    f"factor {write.factor:g} makes a value that {write.view.dtype} cannot hold."
                )
        yield tuple(sorted(names))
    finally:
        with torch.no_grad():
            for parameter, bits in kept.values():
                parameter.copy_(bits)


def _name(known: dict[int, list[str]], parameter: nn.Parameter) -> str:
    names = known.get(id(parameter), [])
    if len(names) > 1:
        raise ModelError(
            f"{' and '.join(names[:2])} are one tensor, so that a change of it acts in both places."
        )
    if not names or not parameter.is_floating_point() or parameter.element_size() < 2:
        raise ModelError(
            "the weights to be changed are no plain parameters of this model (quantised, adapted, "
            "or put together while it loads), so they cannot be baked."
        )
    return names[0]


def writes_of(model: Opened, edit: WeightEdit) -> list[WeightWrite]:
    """What one edit changes.

    Raises:  as :func:`bake`.
    """
    if edit.change == "gain":
        return [_gain(model.bridge, edit)]
    if edit.change == "transplant":
        return _transplanted(model, model.donor(edit), edit)
    parameter, down, bias = _down(model.bridge, edit)
    if edit.change == "expert":
        added = [] if bias is None else [WeightWrite(*bias)]
        return [WeightWrite(parameter, down), *added]
    assert edit.neuron is not None
    check_indices("neuron", [edit.neuron], len(down), what=f"layer {edit.layer}'s neurons")
    if edit.change == "neuron":
        return [WeightWrite(parameter, down[edit.neuron], edit.factor)]
    assert edit.dim is not None
    check_indices("dim", [edit.dim], down.shape[1], what="the residual's dimensions")
    return [WeightWrite(parameter, down[edit.neuron, edit.dim], edit.factor)]


def _down(
    bridge: HookedModel, edit: WeightEdit
) -> tuple[nn.Parameter, Tensor, tuple[nn.Parameter, Tensor] | None]:
    """A down projection's parameter, a view of it ``[neuron, d_model]``, and an expert's bias."""
    if edit.expert is not None:
        experts = experts_of(bridge, edit.layer)
        check_indices("expert", [edit.expert], experts.count, what=f"layer {edit.layer}'s experts")
        bias = experts.bias(edit.expert)
        return (
            experts.module.down_proj,
            experts.down(edit.expert),
            None if bias is None else (experts.module.down_proj_bias, bias),
        )
    ffn = ffn_of(bridge, edit.layer)
    parameter = getattr(ffn.projection, "weight", None)
    views = [] if not isinstance(parameter, nn.Parameter) else [parameter.T, parameter]
    # both orientations are in use (Linear, Conv1D): the one that acts as the matrix that was read
    for view in views:
        if view.shape == ffn.down.shape and torch.equal(view, ffn.down):
            return cast("nn.Parameter", parameter), view.detach(), None
    raise SiteError(
        f"layer {edit.layer}'s down projection is no plain matrix ({type(ffn.projection).__name__})"
        ", so it cannot be baked."
    )


def _gain(bridge: HookedModel, edit: WeightEdit) -> WeightWrite:
    assert edit.norm is not None
    assert edit.dim is not None
    found = norm_of(bridge, edit.layer, edit.norm)
    check_indices("dim", [edit.dim], len(found.gain), what="the residual's dimensions")
    inner = bridge.blocks[edit.layer].get_submodule(edit.norm).original_component
    for parameter in cast("nn.Module", inner).parameters():
        if found.offset is None or parameter.shape != found.gain.shape:
            continue
        if torch.equal(parameter.detach().float() + found.offset, found.gain):
            view = parameter.detach()[edit.dim]
            return WeightWrite(parameter, view, edit.factor, found.offset)
    raise SiteError(f"layer {edit.layer}'s {edit.norm} keeps no gain that could be changed.")


def _transplanted(model: Opened, donor: Opened, edit: WeightEdit) -> list[WeightWrite]:
    """The FFN's parameters, and those of the norm before it, of another layer."""
    assert edit.donor_layer is not None
    ends = (model, edit.layer), (donor, edit.donor_layer)
    for end, layer in ends:
        check_layer(end.bridge, layer)
    pairs: list[tuple[nn.Module, nn.Module]] = []
    for part in edit.parts:
        own, other = (_ffn if part == "ffn" else _ffn_norm for _ in ends)
        pairs.append((own(*ends[0]), other(*ends[1])))
    writes: list[WeightWrite] = []
    for own, other in pairs:
        mine, theirs = dict(own.named_parameters()), dict(other.named_parameters())
        shapes = [{n: p.shape for n, p in found.items()} for found in (mine, theirs)]
        if shapes[0] != shapes[1] or type(own) is not type(other):
            raise InterventionError(
                f"{edit.label}: its {type(other).__name__} has other tensors than layer "
                f"{edit.layer}'s {type(own).__name__}, so it does not fit."
            )
        writes += [WeightWrite(p, p.detach(), source=theirs[n].detach()) for n, p in mine.items()]
    return writes


def _ffn(model: Opened, layer: int) -> nn.Module:
    projection = ffn_of(model.bridge, layer).projection
    found = decoder_of(model.hf).ffns.get(layer)
    inside = [] if found is None else [id(value) for value in found.parameters()]
    norms = {
        id(value)
        for norm in anatomy(model.bridge).blocks[layer].norms
        for value in model.bridge.blocks[layer].get_submodule(norm).parameters()
    }
    if found is None or id(projection.weight) not in inside or norms & set(inside):
        raise SiteError(f"layer {layer}'s FFN is no module of its own, so it cannot be taken over.")
    return found


def _ffn_norm(model: Opened, layer: int) -> nn.Module:
    found = decoder_of(model.hf).ffn_norms.get(layer)
    if found is None or anatomy(model.bridge).blocks[layer].ffn_norm != "ln2":
        raise SiteError(f"layer {layer} has no norm for its FFN alone; take parts ffn alone.")
    return found


@torch.no_grad()
def _logits(model: Opened, edits: Sequence[WeightEdit]) -> Tensor:
    """Logits of a few tokens with the edits entered on the running model, at all tokens."""
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(_entered(model, edit))
        return answer(model.bridge.original_model)


def _entered(model: Opened, edit: WeightEdit) -> AbstractContextManager[object]:
    """One edit as a context manager of ``melens.interventions``."""
    given: Any = edit  # a change has its own settings, none of which is None
    bridge, layer, expert = model.bridge, edit.layer, edit.expert
    pair = (given.dim, given.neuron)
    every: Options = {"tokens": "all", "factor": edit.factor}
    if edit.change == "gain":
        return norm_scale_dims(bridge, layer, dims=[given.dim], norm=given.norm, **every)
    if edit.change == "transplant":
        donor = (model.donor(edit).bridge, given.donor_layer)
        return transplant(bridge, layer, donor=donor, parts=edit.parts, tokens="all")
    if edit.change == "expert":
        return expert_prune(bridge, layer, given.expert)
    if edit.change == "neuron":
        if expert is not None:
            return expert_ablate_neuron(bridge, layer, expert, neuron=given.neuron)
        return ffn_ablate_neurons(bridge, layer, neurons=[given.neuron], **every)
    if expert is not None:
        return expert_zero_weights(bridge, layer, expert, weights=[pair])
    return ffn_zero_weights(bridge, layer, weights=[pair], **every)


@torch.no_grad()
def answer(hf: TransformersModel) -> Tensor:
    """Logits of a few tokens, float32."""
    ids = torch.tensor([spread(vocabulary_of(hf), CHECKED)], device=next(hf.parameters()).device)
    return hf(ids, use_cache=False).logits.float().cpu()


def _checked(hf: TransformersModel, wanted: Tensor) -> float:
    off, scale = float((answer(hf) - wanted).abs().max()), max(float(wanted.abs().max()), 1.0)
    limit = CLOSE if dtype_of(hf) == "float32" else CLOSE_IN_HALF
    if not off <= limit * scale:
        raise InterventionError(
            f"with the changed weights the logits of {type(hf).__name__} differ by {off:.2g} from "
            "those of the edits on the running model, so they cannot be baked here."
        )
    return off
