"""Every edit that can be evaluated, by name: the mask, its rivals, and none."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch

from melens.batches import prompts
from melens.errors import InterventionError, NoTokenError
from melens.interventions import drop_key, ffn_cap, norm_flatten, residual_set, wemask
from melens.interventions.tokens import Tokens
from melens.isolating import mean_coordinates
from melens.models.origin import fingerprint
from melens.registry import Registry
from melens.results import MELayer
from melens.results.edit import Edit

Maker = Callable[[Any, Edit, MELayer, Tokens], AbstractContextManager[Any]]
EDITS: Registry[Maker] = Registry("edit")
CAP = 2.0
_KEPT_MEANS: weakref.WeakKeyDictionary[Any, dict[Any, dict[int, float]]] = (
    weakref.WeakKeyDictionary()
)


def applied(
    model: Any, edit: Edit, me_layer: MELayer | None, *, tokens: Tokens = None
) -> AbstractContextManager[Any]:
    """The edit, ready to be entered; a mask's ``with`` gives its MaskRecord, others EditedTokens.

    Args:    model: a bridge; for none, wemask and drop-key a plain transformers model as well.
             me_layer: whose massive tokens are edited; None = the first token, where the edit
             names its layers itself.
             tokens: those that are edited instead, e.g. marked by an earlier pass.
    Raises:  InterventionError, SiteError: settings that this model cannot follow.
    """  # fmt: skip
    if me_layer is None and edit.name in ("zero", "mean", "norm-flatten", "ffn-cap"):
        raise InterventionError(f"{edit.name} acts at the ME Layer; pass what melens.locate gives.")
    wanted = me_layer if tokens is None else tokens
    return EDITS[edit.name](model, edit, me_layer, wanted)  # type: ignore[arg-type]


@contextmanager
def where_held(edit: AbstractContextManager[Any]) -> Iterator[Any]:
    """Enter an edit; that no pass held its token is no error, since other texts may."""
    with suppress(NoTokenError), edit as record:
        yield record


def _none(
    model: Any, edit: Edit, me_layer: MELayer | None, tokens: Tokens
) -> AbstractContextManager[Any]:
    return nullcontext()


def _wemask(
    model: Any, edit: Edit, me_layer: MELayer | None, tokens: Tokens
) -> AbstractContextManager[Any]:
    return wemask(
        model, me_layer, layers=edit.layers, rate=edit.rate, strength=edit.strength,
        select=edit.select, seed=edit.seed, tokens=tokens,
    )  # fmt: skip


def _layer(edit: Edit, me_layer: MELayer) -> Any:
    return edit.layers[0] if isinstance(edit.layers, tuple) else me_layer


def _dims(model: Any, edit: Edit, me_layer: MELayer) -> list[int]:
    """The massive dimensions, or as many others."""
    if not me_layer.massive:
        raise InterventionError(f"{me_layer.run.model} has no massive token, so no coordinate.")
    massive = [me_layer.massive[0].dim]  # the tokens that are edited are massive in this one
    if edit.select != "random":
        return massive
    rng = torch.Generator().manual_seed(edit.seed)
    others = [d for d in torch.randperm(model.cfg.d_model, generator=rng).tolist()
              if d not in massive]  # fmt: skip
    return sorted(others[: len(massive)])


def _zero(model: Any, edit: Edit, me_layer: MELayer, tokens: Tokens) -> AbstractContextManager[Any]:
    return residual_set(
        model, _layer(edit, me_layer), tokens=tokens, dims=_dims(model, edit, me_layer),
        strength=edit.strength,
    )  # fmt: skip


def _mean(model: Any, edit: Edit, me_layer: MELayer, tokens: Tokens) -> AbstractContextManager[Any]:
    at = edit.layers[0] if isinstance(edit.layers, tuple) else None
    dims = _dims(model, edit, me_layer)
    means = _means(model, me_layer, at, dims)
    return residual_set(
        model, _layer(edit, me_layer), tokens=tokens, dims=list(means),
        values=list(means.values()), strength=edit.strength,
    )  # fmt: skip


def _means(model: Any, me_layer: MELayer, at: int | None, dims: list[int]) -> dict[int, float]:
    """Measured once for a model's weights: an edit is entered anew for every batch."""
    located = me_layer.run.settings
    key = (fingerprint(model), me_layer.me_layer, located.get("ids"), at, tuple(dims))
    kept = _KEPT_MEANS.setdefault(model, {})
    if key not in kept:
        # BOS and chat as they were when the massive tokens were located, so that they are there.
        texts = prompts(bos=_flag(located.get("bos")), chat=bool(located.get("chat")))
        kept[key] = mean_coordinates(model, me_layer, texts, layer=at, dims=dims)
    return kept[key]


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _norm_flatten(
    model: Any, edit: Edit, me_layer: MELayer, tokens: Tokens
) -> AbstractContextManager[Any]:
    return norm_flatten(model, _layer(edit, me_layer), tokens=tokens, alpha=1 - edit.strength)


def _ffn_cap(
    model: Any, edit: Edit, me_layer: MELayer, tokens: Tokens
) -> AbstractContextManager[Any]:
    return ffn_cap(model, _layer(edit, me_layer), tokens=tokens, factor=CAP, strength=edit.strength)


def _drop_key(
    model: Any, edit: Edit, me_layer: MELayer | None, tokens: Tokens
) -> AbstractContextManager[Any]:
    return drop_key(
        model, me_layer, layers=edit.layers, strength=edit.strength, start=edit.start,
        tokens=tokens,
    )  # fmt: skip


for _name, _maker in {
    "none": _none, "wemask": _wemask, "zero": _zero, "mean": _mean,
    "norm-flatten": _norm_flatten, "ffn-cap": _ffn_cap, "drop-key": _drop_key,
}.items():  # fmt: skip
    EDITS.add(_name, _maker)
