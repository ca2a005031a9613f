"""A transformers model object -> a bridge around it, or one ModelError that says which and why."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn

from melens.collector import rarely_collected
from melens.errors import ContractError, ModelError
from melens.framing import frame_of
from melens.models.checkpoint import not_finite
from melens.models.contract import (
    OwnAnswer,
    check_contract,
    failing,
    force_eager,
    own_answer,
    probe_ids,
)
from melens.models.view import view_of
from melens.placement import missing_weights, named_weights
from melens.protocols import AnyModel, HookedModel, Tokenizer, TransformersModel

PARALLEL = ("DataParallel", "DistributedDataParallel")


def unwrapped(model: AnyModel) -> AnyModel:
    """The transformers model inside what torch.compile, data parallelism or PEFT made of it.

    All share its modules, so nothing is copied and nothing is lost: an adapter's layers stand
    inside the model.

    Raises:  ModelError: an adapter that is not made of layers (a prompt or a prefix), or a model
             that was compiled in place.
    """
    while True:
        kind = type(model).__name__
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module) or (
            kind in PARALLEL and isinstance(inner := getattr(model, "module", None), nn.Module)
        ):  # torch.compile
            model = inner
        elif isinstance(model, nn.Module) and (base := getattr(model, "get_base_model", None)):
            adapter = getattr(model, "active_peft_config", None)
            if adapter is not None and adapter.is_prompt_learning:
                raise ModelError(
                    f"this {kind} puts virtual tokens before every text ({adapter.peft_type}), "
                    "which melens cannot count; give its base model (model.get_base_model())."
                )
            model = base()
        elif getattr(model, "_compiled_call_impl", None) is not None:
            raise ModelError(
                f"this {kind} was compiled in place (model.compile()), so no hook would be seen; "
                "load it again and give it uncompiled."
            )
        else:
            return model


def require_here(model: nn.Module) -> None:
    """Refuse parameters that hold no values in memory.

    Raises:  ModelError: naming the first, and what to do.
    """
    away = missing_weights(model)
    if away:
        raise ModelError(
            f"{len(away)} tensors of this {type(model).__name__} are not in memory, first "
            f"{away[0]} (on the meta device: never loaded); for a model that does not fit give "
            "its folder to melens.load(folder, device_map='auto') or `melens locate --stream`."
        )


def require_finite_weights(model: nn.Module) -> None:
    """Refuse NaN or Inf in any parameter.

    Raises:  WeightsError: naming the first such tensor and how many of its values are bad.
    """
    for name, value in named_weights(model):
        if not value.is_floating_point() or not value.numel():  # quantised, or empty
            continue
        small = value.element_size() == 1  # of 8-bit floats no extremes are to be had
        # one pass over the values, and no copy of them; NaN is an extreme
        found = value if small else torch.stack(torch.aminmax(value.detach()))
        if not torch.isfinite(found).all():
            raise not_finite(name, value)


Way = Callable[..., HookedModel]
"""Puts a bridge around a transformers model, which it changes in place."""


@rarely_collected()
def checked_bridge(
    hf: TransformersModel, tokenizer: Tokenizer | None, *, name: str
) -> tuple[HookedModel, Way]:
    """A bridge that holds the contract, around a view of the model: the model itself stays as it
    is. TransformerLens' own adapter comes first; where it has none, or one that does not fit this
    model, the bridge is made from what was measured.

    Returns: the bridge, and the way in which it was bridged.
    Raises:  ModelError, ContractError: neither fits; with TransformerLens' reason and the other.
    """  # noqa: D205
    own = own_answer(hf)
    said: list[Exception] = []
    for way in WAYS:
        try:
            return _held(way, hf, tokenizer, name, own), way
        except (ModelError, ContractError) as error:
            said.append(error)
    raise none_fits(said, own.hooks_said()) from None


def none_fits(said: Sequence[Exception], way_out: str = "") -> Exception:
    """One error of why no bridge fits: TransformerLens' reason first, then the last one."""
    first, last = (str(error).rstrip(".") for error in (said[0], said[-1]))
    more = f"; nor by measuring its parts ({last})" if first != last else ""
    out = "" if way_out in first else way_out
    return type(said[0])(f"{first}{more}.{out}")


def _held(
    way: Way,
    hf: TransformersModel,
    tokenizer: Tokenizer | None,
    name: str,
    own: OwnAnswer,
) -> HookedModel:
    bridge = bridged(way, cast("TransformersModel", view_of(hf, hooked=True)), tokenizer, name=name)
    check_contract(bridge, own)
    return bridge


def bridged(
    way: Way, hf: TransformersModel, tokenizer: Tokenizer | None, *, name: str
) -> HookedModel:
    """A bridge of a kind, in eager attention where attention is to be read."""
    if way is not unobserved_module:
        force_eager(hf)
    return way(hf, tokenizer, name=name)


def unobserved_module(
    hf: TransformersModel, tokenizer: Tokenizer | None, *, name: str
) -> HookedModel:
    """:func:`measured_module` with attention that computes as the model's own does, unread."""
    return measured_module(hf, tokenizer, name=name, observe=False)


def measured_module(
    hf: TransformersModel, tokenizer: Tokenizer | None, *, name: str, observe: bool = True
) -> HookedModel:
    """A bridge from what was measured (`models/measured`); unchecked.

    Raises:  ModelError: what its blocks do could not be told.
    """
    from melens.models.measured import measured_bridge

    kind = type(hf).__name__
    with warnings.catch_warnings(), failing(f"the parts of {kind} cannot be measured"):
        warnings.simplefilter("ignore")
        built = measured_bridge(hf, probe_ids(hf.config), name=name, observe=observe)
        bridge = cast("HookedModel", built)
    if tokenizer is not None:
        give_tokenizer(bridge, tokenizer)
    return bridge


def bridge_module(hf: TransformersModel, tokenizer: Tokenizer | None, *, name: str) -> HookedModel:
    """A TransformerBridge around a transformers model, which it changes in place; unchecked.

    Raises:  ModelError: TransformerLens has no adapter for it, or none that fits its config.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    kind = type(hf).__name__
    config = copy.deepcopy(hf.config)
    config.architectures = [kind]
    with (
        warnings.catch_warnings(),
        failing(f"TransformerLens cannot bridge this {kind}"),
    ):
        warnings.simplefilter("ignore")
        # blocks, ln_final and unembed are set as attributes when it is built
        built = build_bridge_from_module(hf, kind, hf_config=config, model_name=name)
        bridge = cast("HookedModel", built)
    if tokenizer is not None:
        give_tokenizer(bridge, tokenizer)
    return bridge


def give_tokenizer(bridge: HookedModel, tokenizer: Tokenizer) -> None:
    """The tokenizer as it is: TransformerLens' own set-up would switch BOS on."""
    bridge.tokenizer = tokenizer
    start = tokenizer.bos_token_id
    prefix = frame_of(tokenizer).prefix
    bridge.cfg.tokenizer_prepends_bos = start is not None and prefix[:1] == (start,)


def require_tokenizer(
    tokenizer: Tokenizer | str | Path | None,
) -> Tokenizer | str | Path | None:
    """What was passed as ``tokenizer=``: None, a transformers tokenizer, or a folder's path, which
    :func:`melens.models.loading.read_tokenizer` then reads.

    Raises:  ModelError: anything else, a raw ``tokenizers.Tokenizer`` among it.
    """  # noqa: D205
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        return tokenizer
    if callable(tokenizer) and hasattr(tokenizer, "bos_token_id"):
        return tokenizer
    kind = f"{type(tokenizer).__module__.split('.')[0]}.{type(tokenizer).__name__}"
    hint = "give a transformers tokenizer, or the path of its folder."
    if hasattr(tokenizer, "encode_batch"):
        hint = (
            "it does not say which tokens are special: wrap it, "
            "transformers.PreTrainedTokenizerFast(tokenizer_object=..., bos_token=..., "
            "eos_token=...)."
        )
    raise ModelError(f"tokenizer= got a {kind}; {hint}")


WAYS: tuple[Way, ...] = (bridge_module, measured_module, unobserved_module)
"""In the order in which they are tried."""
