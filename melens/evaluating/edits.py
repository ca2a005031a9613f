"""Every edit that can be evaluated, and which of them an evaluation compares."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass

from melens.batches import Batch, prompts
from melens.errors import InterventionError, NoTokenError
from melens.inputs import Inputs
from melens.intervals import random_order
from melens.interventions import drop_key, ffn_cap, norm_flatten, residual_set, wemask
from melens.interventions.context import is_edited
from melens.interventions.core import EditedTokens
from melens.interventions.massive import MassiveRule, massive_tokens
from melens.interventions.target import Tokens
from melens.interventions.wemask import MaskRecord, layers_of
from melens.isolating import mean_coordinates
from melens.measuring.located import check_same_model
from melens.models.decoder import decoder_of
from melens.protocols import AnyModel, HookedModel, ModelLike, Prepared
from melens.registry import Registry
from melens.results import MELayer
from melens.results.edit import LAYERED, RATED, Edit
from melens.results.evaluation import Role
from melens.results.reading import HoldsMELayer, located_in
from melens.settings import Compare, setting_of

EditRecord = MaskRecord | EditedTokens | None
"""What an edit's ``with`` gives: a mask's own record, what others count; None of no edit."""
Maker = Callable[[HookedModel, Edit, MELayer, Tokens], AbstractContextManager[EditRecord]]
EDITS: Registry[Maker] = Registry("edit")
CAP = 2.0
MEASURED = ("mean",)
"""Edits that are measured before they are entered: ready Inputs spare them preparing a model."""
_KEPT_MEANS: weakref.WeakKeyDictionary[HookedModel, dict[tuple[object, ...], dict[int, float]]] = (
    weakref.WeakKeyDictionary()
)


def applied(
    model: AnyModel | Prepared,
    edit: Edit,
    me_layer: MELayer | None,
    *,
    tokens: Tokens = None,
) -> AbstractContextManager[EditRecord]:
    """The edit, ready to be entered; a mask's ``with`` gives its MaskRecord, others EditedTokens.

    Args:    model: a bridge or ready Inputs; for none, wemask and drop-key a plain transformers
             model as well.
             me_layer: whose massive tokens are edited; None = the first token, where the edit
             names its layers itself.
             tokens: those that are edited instead, e.g. marked by an earlier pass.
    Raises:  InterventionError, SiteError: settings that this model cannot follow.
    """
    if me_layer is None and edit.name in ("zero", "mean", "norm-flatten", "ffn-cap"):
        raise InterventionError(f"{edit.name} acts at the ME Layer; pass what melens.locate gives.")
    wanted = me_layer if tokens is None else tokens
    if isinstance(model, Inputs) and edit.name not in MEASURED:
        model = model.model
    return EDITS[edit.name](model, edit, me_layer, wanted)  # type: ignore[arg-type]


@contextmanager
def where_held(edit: AbstractContextManager[EditRecord]) -> Iterator[EditRecord]:
    """Enter an edit; that no pass held its token is no error, since other texts may."""
    with suppress(NoTokenError), edit as record:
        yield record


def _none(
    model: HookedModel, edit: Edit, me_layer: MELayer | None, tokens: Tokens
) -> AbstractContextManager[None]:
    return nullcontext()


def _wemask(
    model: HookedModel, edit: Edit, me_layer: MELayer | None, tokens: Tokens
) -> AbstractContextManager[MaskRecord]:
    return wemask(
        model,
        me_layer,
        layers=edit.layers,
        rate=edit.rate,
        strength=edit.strength,
        select=edit.select,
        seed=edit.seed,
        tokens=tokens,
    )


def _layer(edit: Edit, me_layer: MELayer) -> int | MELayer:
    return edit.layers[0] if isinstance(edit.layers, tuple) else me_layer


def _dims(model: HookedModel, edit: Edit, me_layer: MELayer) -> list[int]:
    """The massive dimensions, or as many others."""
    if not me_layer.massive:
        raise InterventionError(f"{me_layer.run.model} has no massive token, so no coordinate.")
    massive = [me_layer.massive[0].dim]  # the tokens that are edited are massive in this one
    if edit.select != "random":
        return massive
    order = random_order(model.cfg.d_model, seed=edit.seed).tolist()
    others = [dim for dim in order if dim not in massive]
    return sorted(others[: len(massive)])


def _zero(
    model: HookedModel, edit: Edit, me_layer: MELayer, tokens: Tokens
) -> AbstractContextManager[EditedTokens]:
    return residual_set(
        model,
        _layer(edit, me_layer),
        tokens=tokens,
        dims=_dims(model, edit, me_layer),
        strength=edit.strength,
    )


def _mean(
    model: HookedModel, edit: Edit, me_layer: MELayer, tokens: Tokens
) -> AbstractContextManager[EditedTokens]:
    at = edit.layers[0] if isinstance(edit.layers, tuple) else None
    ready = Inputs.of(model)
    dims = _dims(ready.model, edit, me_layer)
    means = _means(ready, me_layer, at, dims)
    return residual_set(
        ready.model,
        _layer(edit, me_layer),
        tokens=tokens,
        dims=list(means),
        values=list(means.values()),
        strength=edit.strength,
    )


def _means(ready: Inputs, me_layer: MELayer, at: int | None, dims: list[int]) -> dict[int, float]:
    """Measured once for a model's weights: an edit is entered again for every batch."""
    located = me_layer.run
    key = (ready.weights, me_layer.me_layer, located.settings.get("ids"), at, tuple(dims))
    kept = _KEPT_MEANS.setdefault(ready.model, {})
    if key not in kept:
        # BOS and chat as they were when the massive tokens were located, so that they are there.
        texts = prompts(bos=located.flag("bos"), chat=bool(located.settings.get("chat")))
        kept[key] = mean_coordinates(ready, me_layer, texts, layer=at, dims=dims)
    return kept[key]


def _norm_flatten(
    model: HookedModel, edit: Edit, me_layer: MELayer, tokens: Tokens
) -> AbstractContextManager[EditedTokens]:
    return norm_flatten(model, _layer(edit, me_layer), tokens=tokens, alpha=1 - edit.strength)


def _ffn_cap(
    model: HookedModel, edit: Edit, me_layer: MELayer, tokens: Tokens
) -> AbstractContextManager[EditedTokens]:
    return ffn_cap(model, _layer(edit, me_layer), tokens=tokens, factor=CAP, strength=edit.strength)


def _drop_key(
    model: HookedModel, edit: Edit, me_layer: MELayer | None, tokens: Tokens
) -> AbstractContextManager[EditedTokens]:
    return drop_key(
        model,
        me_layer,
        layers=edit.layers,
        strength=edit.strength,
        start=edit.start,
        tokens=tokens,
    )


for _name, _maker in {
    "none": _none,
    "wemask": _wemask,
    "zero": _zero,
    "mean": _mean,
    "norm-flatten": _norm_flatten,
    "ffn-cap": _ffn_cap,
    "drop-key": _drop_key,
}.items():
    EDITS.add(_name, _maker)


RIVALS = ("zero", "mean", "norm-flatten", "ffn-cap", "drop-key")
BASE = Edit(name="none")
EDITED_BY = "residual/1"
"""How an edit finds its tokens; rows of another way are of another evaluation."""


@dataclass(frozen=True)
class EditCondition:
    """One column of an evaluation."""

    name: str
    role: Role
    edit: Edit


def conditions(
    model: HookedModel, edit: Edit, me_layer: MELayer | None, compare: Compare | None = None
) -> tuple[EditCondition, ...]:
    """Every condition, base first and the edit second; equal ones only once.

    Raises:  InterventionError, SiteError: an edit that changes nothing, or that this model cannot
             follow.
    """
    check_edit(edit)
    compare = setting_of(compare, Compare, "compare")
    made = [EditCondition("base", "base", BASE), EditCondition("edited", "edited", edit)]
    made += _doses(edit, compare)
    made += _other_layers(model, edit, me_layer)
    made += _random_dims(edit, compare)
    for name in compare.rivals:
        settings = {"layers": edit.layers} if name in LAYERED and edit.name in LAYERED else {}
        made.append(EditCondition(name, "rival", Edit.model_validate({"name": name, **settings})))
    kept: dict[Edit, EditCondition] = {}
    for condition in made:
        kept.setdefault(condition.edit, condition)
    taken = names(tuple(kept.values()))
    if twice := sorted({name for name in taken if taken.count(name) > 1}):
        raise InterventionError(f"two conditions are called '{twice[0]}'; make them differ more.")
    return tuple(kept.values())


def check_edit(edit: Edit) -> None:
    """Refuse an edit that there is nothing to compare of.

    Raises:  InterventionError: it changes nothing.
    """
    if not isinstance(edit, Edit):
        raise InterventionError(
            f"edit must be a melens.results.Edit, e.g. Edit(name='wemask', rate=0.5), got "
            f"{edit!r:.60}."
        )
    if edit.name == "none":
        raise InterventionError("an evaluation holds an edit against none; name an edit.")
    if not edit.strength or (edit.name in RATED and not edit.rate):
        raise InterventionError("the edit changes nothing; give it a rate or a strength.")


def check_unedited(model: HookedModel) -> None:
    """Refuse a model that an edit is open on: its base would be edited as well.

    Raises:  InterventionError: naming the edit, where it is an exported one.
    """
    opened = vars(model).get("melens_edit")
    if opened is not None and opened.active:
        raise InterventionError(
            f"{opened.edit.label} is open on this model, so nothing here is without an edit; call "
            "model.melens_edit.close() first, or give the folder instead of the model."
        )
    if is_edited(model):
        raise InterventionError(
            "an edit is open on this model, so nothing here is without one; leave it first."
        )


def unedited(model: ModelLike, me_layer: HoldsMELayer | None) -> tuple[Inputs, MELayer | None]:
    """A model made ready, once for a whole call, that no edit is open on; the ME Layer given.

    Raises:  InterventionError: one is. ResultError: ``me_layer`` is of another model.
    """
    ready = Inputs.of(model)
    check_unedited(ready.model)
    found = located_in(me_layer)
    if found is not None:
        check_same_model(ready, found)
    return ready, found


def check_held(model: AnyModel, me_layer: MELayer | None, rows: Sequence[Sequence[int]]) -> None:
    """Refuse items of which none holds a massive token, before they are run under any edit.

    The items are run unedited up to the ME Layer, until one of them holds one.

    Raises:  InterventionError: none of them does.
    """
    if me_layer is None:
        return
    # One at a time: an item may be as long as memory allows, and the first one mostly holds it.
    batches = (Batch.pad([list(row)]) for row in rows)
    if not any(bool(marks.any()) for marks, _ in massive_tokens(model, me_layer, batches)):
        rule = MassiveRule.of(me_layer)
        raise InterventionError(
            f"no token of the {len(rows)} items is massive (|x| over {rule.coordinate:,.0f} in "
            f"dimension {rule.dim} at the output of layer {rule.layer}), so no edit would change "
            "anything; locate on texts that begin as the items do (BOS, chat template)."
        )


def located_facts(me_layer: MELayer | None) -> list[object] | None:
    """What edits take from a ME Layer, and on which texts; not when or how it was located."""
    if me_layer is None:
        return None
    tokens = [[token.position, token.token_id, token.dim] for token in me_layer.massive]
    tried = [[token.token_id, token.massive] for token in me_layer.stability.first_tokens]
    texts = [me_layer.run.settings.get(name) for name in ("ids", "bos", "chat")]
    return [EDITED_BY, me_layer.me_layer, me_layer.peak_layer, tokens, tried, texts]


def _doses(edit: Edit, compare: Compare) -> list[EditCondition]:
    what = edit.dosed_by
    return [
        EditCondition(f"{what} {dose:g}", "dose", edit.changed(**{what: dose}))
        for dose in (compare.rates if what == "rate" else compare.strengths)
        if dose != getattr(edit, what)
    ]


def _other_layers(model: HookedModel, edit: Edit, me_layer: MELayer | None) -> list[EditCondition]:
    """The same edit where the massive activation is not there yet, or at one other layer."""
    if edit.name not in LAYERED:
        return [] if me_layer is None else _elsewhere(edit, me_layer)
    decoder = decoder_of(model)
    taken = layers_of(decoder, me_layer, edit.layers)
    others = tuple(at for at in decoder.inputs if at < taken[0])
    if not others:
        others = tuple(at for at in decoder.inputs if at not in taken)
    # As many as the edit has, where there are so many; from the middle, away from both ends.
    spare = max(0, len(others) - len(taken))
    others = others[spare // 2 :][: len(taken)]
    return [EditCondition("other layers", "control", edit.changed(layers=others))] if others else []


def _elsewhere(edit: Edit, me_layer: MELayer) -> list[EditCondition]:
    """An edit of the ME Layer, made half-way to it and half-way after it instead."""
    at = me_layer.me_layer
    if at is None or at < 0:
        return []
    peak = me_layer.n_layers - 1 if me_layer.peak_layer is None else me_layer.peak_layer
    last = peak + 1
    picked = {at // 2, (at + last) // 2} - {at}
    return [
        EditCondition(f"at layer {layer}", "control", edit.changed(layers=(layer,)))
        for layer in sorted(picked)
        if layer < me_layer.n_layers
    ]


def _random_dims(edit: Edit, compare: Compare) -> list[EditCondition]:
    """As many dimensions, drawn at random; of edits that have dimensions."""
    if edit.name not in (*RATED, "zero", "mean"):
        return []
    return [
        EditCondition(
            f"random dims, seed {seed}", "control", edit.changed(select="random", seed=seed)
        )
        for seed in compare.seeds
        if not (edit.select == "random" and edit.seed == seed)
    ]


def first_layer(model: HookedModel, edit: Edit, me_layer: MELayer | None) -> int:
    """The first block that an edit changes: what a run before it may be kept of.

    Layers count from 0; the unedited model gives the number of its layers.
    """
    decoder = decoder_of(model)
    if edit.name == "none":
        return decoder.n_layers
    if edit.name in LAYERED:
        return layers_of(decoder, me_layer, edit.layers)[0]
    if isinstance(edit.layers, tuple):
        return edit.layers[0]
    if me_layer is None or me_layer.me_layer is None or me_layer.me_layer < 0:
        raise InterventionError(
            f"{edit.name} acts at the ME Layer, and this model has no block of that kind; name "
            "one with layers=(n,) (--mask-layers n)."
        )
    return me_layer.me_layer


def names(found: Sequence[EditCondition]) -> list[str]:
    """Names of the conditions, in order."""
    return [condition.name for condition in found]
