"""The constant key/value prefix: an edit of the first token, computed once; also as an adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from melens.batches import Batch
from melens.chat import chat_start, has_template
from melens.errors import InterventionError, PromptError, ResultError
from melens.evaluating.edits import applied
from melens.exporting.subject import (
    MELENS_JSON,
    check_probe,
    dtype_of,
    read_edit,
    spread,
    transformers_of,
    vocabulary_of,
)
from melens.framing import doubled_first, frame_of, plain_ids
from melens.interventions.massive import massive_tokens, with_firsts
from melens.models.decoder import decoder_of
from melens.placement import device_of, input_device
from melens.progress import say_once
from melens.protocols import AnyModel, KeyValueCache, Tokenizer, TransformersModel
from melens.results import MELayer
from melens.results.edit import ChosenPrefix, Edit, PrefixFacts
from melens.settings import require_whole
from melens.token_ids import require_no_hole

PREFIX_FILE = "prefix.safetensors"
ATTENDING = ("full_attention", "sliding_attention")
FIRST_ONLY = ("none", "wemask", "zero", "mean", "norm-flatten")
CLOSE = 1e-4
"""Largest difference of the check's logits over the largest of them, float32: the same sums in
another order."""
CHECKED = 7
SAY_WHICH = "say which token your inputs start with: first_token= (--first-token)"


@dataclass
class Prefix:
    """Keys and values of one first token, or of several, layer by layer."""

    token_id: int
    keys: list[Float[Tensor, "_ _ _"]]
    """``[kv_heads, token, head_dim]``."""
    values: list[Float[Tensor, "_ _ _"]]
    later: tuple[int, ...] = ()
    """Token ids after the first."""

    @property
    def ids(self) -> tuple[int, ...]:
        """All its tokens."""
        return (self.token_id, *self.later)

    def cache(
        self, hf: TransformersModel, batch: int, *, static: int | None = None
    ) -> KeyValueCache:
        """A fresh transformers cache that holds it, of the model's dtype and device."""
        from transformers import DynamicCache, StaticCache

        dtype, blocks = next(hf.parameters()).dtype, decoder_of(hf).blocks
        made: Any = DynamicCache(config=hf.config)
        if static is not None:
            made = StaticCache(config=hf.config, max_cache_len=static)
        for layer, pair in enumerate(zip(self.keys, self.values, strict=True)):
            there = device_of(blocks[layer], input_device(hf))
            key, value = (x.to(there, dtype)[None].repeat(batch, 1, 1, 1) for x in pair)
            made.update(key, value, layer)
        return made


@torch.no_grad()
def constant_prefix(model: AnyModel, edit: Edit, me_layer: MELayer | None, token_id: int) -> Prefix:
    """Keys and values of a first token under an edit.

    Args:    model: a bridge or a plain transformers model.
    Raises:  InterventionError: the edit touches other tokens too or not this one, or the model
             keeps more of a token than keys and values.
    """
    hf = transformers_of(model)
    _check_constant(hf, edit, me_layer, token_id)
    me_layer = me_layer and with_firsts(hf, me_layer, [token_id])
    with applied(model, edit, me_layer):
        return _kept(hf, (token_id,))


@torch.no_grad()
def token_prefix(model: AnyModel, ids: Sequence[int]) -> Prefix:
    """Keys and values of tokens as the model makes them, at positions 0, 1, ...

    Raises:  InterventionError: the model keeps more of a token than keys and values.
    """
    hf = transformers_of(model)
    _check_kinds(hf)
    return _kept(hf, ids)


def _kept(hf: TransformersModel, tokens: Sequence[int]) -> Prefix:
    ids = torch.tensor([list(tokens)], device=input_device(hf))
    cache = getattr(hf(ids, use_cache=True), "past_key_values", None)
    if (layers := getattr(cache, "layers", None)) is None:
        raise InterventionError(
            f"{type(hf).__name__} keeps no keys and values of a token, so a prefix cannot hold it; "
            "use format='hf' (--format hf)."
        )
    if any(getattr(layer, "keys", None) is None for layer in layers):
        raise InterventionError(
            "some layers of this model share the keys of others, which a prefix cannot hold; "
            "use format='hf' (--format hf)."
        )
    pairs = [(layer.keys[0].detach().cpu(), layer.values[0].detach().cpu()) for layer in layers]
    keys, values = [key.clone() for key, _ in pairs], [value.clone() for _, value in pairs]
    return Prefix(tokens[0], keys, values, tuple(tokens[1:]))


def _check_constant(
    hf: TransformersModel, edit: Edit, me_layer: MELayer | None, token_id: int
) -> None:
    if edit.name not in FIRST_ONLY:
        why = {
            "drop-key": "hides the token from others but not from itself",
            "ffn-cap": "needs other tokens to compare with",
        }[edit.name]
        raise InterventionError(
            f"{edit.name} {why}, so it is no constant prefix; use format='hf' (--format hf), or "
            "another edit."
        )
    _check_kinds(hf)
    if me_layer is None or edit.name == "none":
        return
    later = [t for t in me_layer.massive if t.position > 0 and t.dim == me_layer.massive[0].dim]
    if later:
        raise InterventionError(
            f"token {later[0].token!r} is massive after the first position too, and a prefix holds "
            "the first token alone; use format='hf' (--format hf)."
        )
    one = Batch.of(torch.tensor([[token_id]]))
    ((marks, _),) = massive_tokens(hf, me_layer, [one])
    if not marks.any():
        raise InterventionError(
            f"token id {token_id} is not massive as the first token of {me_layer.run.model}, so "
            "the edit would not touch it; name another first token."
        )


def _check_kinds(hf: TransformersModel) -> None:
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds, _ = get_layer_types_and_kwargs(hf.config.get_text_config(decoder=True))
    if other := sorted(set(kinds) - set(ATTENDING)):
        raise InterventionError(
            f"{type(hf).__name__} has layers of {', '.join(other)}, whose state is not keys and "
            "values, so a prefix cannot hold it; use format='hf' (--format hf)."
        )


@torch.no_grad()
def difference(model: AnyModel, edit: Edit, me_layer: MELayer | None, prefix: Prefix) -> float:
    """Largest difference of logits between edit and prefix on a few tokens.

    Raises:  InterventionError: more than float32 explains; this model needs more than a prefix.
    """
    hf = transformers_of(model)
    if edit.name != "none":
        me_layer = me_layer and with_firsts(hf, me_layer, [prefix.token_id])
    with applied(model, edit, me_layer):
        wanted = hf(_few(hf, prefix), use_cache=False).logits[:, len(prefix.ids) :].float()
    off, scale = _off(hf, prefix, wanted), float(wanted.abs().max())
    if dtype_of(hf) == "float32" and not off <= CLOSE * max(scale, 1.0):
        raise InterventionError(
            f"with the prefix the logits of {type(hf).__name__} differ by {off:.2g} from the "
            "edit's, so it is no exact export here; use format='hf' (--format hf)."
        )
    return off


@torch.no_grad()
def change(hf: TransformersModel, prefix: Prefix) -> float:
    """Largest difference of logits between a prefix and the token itself, on a few tokens."""
    return _off(
        hf, prefix, hf(_few(hf, prefix), use_cache=False).logits[:, len(prefix.ids) :].float()
    )


def _few(hf: TransformersModel, prefix: Prefix) -> Tensor:
    rest = spread(vocabulary_of(hf), CHECKED)
    return torch.tensor([[*prefix.ids, *rest]], device=input_device(hf))


def _off(hf: TransformersModel, prefix: Prefix, wanted: Tensor) -> float:
    found = hf(
        _few(hf, prefix)[:, len(prefix.ids) :], past_key_values=prefix.cache(hf, 1)
    ).logits.float()
    return float((found - wanted).abs().max())


def facts_of(
    hf: TransformersModel,
    prefix: Prefix,
    tokenizer: Tokenizer | None,
    logit_difference: float,
    chosen: ChosenPrefix | None = None,
) -> PrefixFacts:
    """What to know of a prefix before using it."""
    shapes = {tuple(key.shape) for key in prefix.keys}
    heads, _, width = next(iter(shapes)) if len(shapes) == 1 else (None, 1, None)
    text = hf.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or []
    window = getattr(text, "sliding_window", None)
    slides = "sliding_attention" in kinds or not kinds
    token = f"<{prefix.token_id}>" if tokenizer is None else tokenizer.decode([prefix.token_id])
    return PrefixFacts(
        token_id=prefix.token_id,
        token=token,
        layers=len(prefix.keys),
        kv_heads=heads,
        head_dim=width,
        dtype=str(prefix.keys[0].dtype).removeprefix("torch."),
        sliding_window=window if slides else None,
        logit_difference=logit_difference,
        chosen=chosen,
    )


def write_prefix(prefix: Prefix, folder: Path) -> None:
    """``layer.i.key`` and ``layer.i.value``, ``[kv_heads, token, head_dim]``, in one file."""
    from safetensors.torch import save_file

    named = {f"layer.{i}.key": key.contiguous() for i, key in enumerate(prefix.keys)}
    named |= {f"layer.{i}.value": value.contiguous() for i, value in enumerate(prefix.values)}
    save_file(named, folder / PREFIX_FILE)


def load_prefix(
    folder: str | Path, model: AnyModel, *, batch: int = 1, static: int | None = None
) -> KeyValueCache:
    """The exported first token as a transformers cache, a fresh one a call (a run fills it).

    Hand it to ``model.generate(**for_generate(ids, mask), past_key_values=cache)``, or to
    ``model(**for_call(ids, mask), past_key_values=cache)``; neither needs melens' hooks. With a
    second model that drafts (``assistant_model=``), ``generate`` too takes ``for_call``'s inputs:
    transformers feeds it all of them, and ``for_generate``'s first token would count twice.

    Args:    model: the transformers model (or its bridge) that it was exported from, any dtype.
             batch: rows. static: tokens that a static cache has room for, the prefix included;
             None = a cache that grows.
    Raises:  ResultError: no such export, a damaged one, or one of other weights.
    """
    folder = Path(folder)
    record, hf = read_edit(folder), transformers_of(model)
    if record is None or record.format != "prefix" or record.prefix is None:
        raise ResultError(
            f"{folder} holds no prefix ({MELENS_JSON} says "
            f"{record.format if record else 'nothing'}); make one with melens.export(..., "
            "format='prefix')."
        )
    if batch < 1:
        raise ResultError(f"batch must be at least 1, got {batch}.")
    require_whole("static", static, or_none=True)
    if static is not None and static <= (held := len(_ids_of(record.prefix))):
        raise ResultError(
            f"static must be room for the prefix ({held}), the prompt and the new tokens, got "
            f"{static}."
        )
    check_probe(hf, record.probe, name=str(folder))
    if record.prefix.chosen is not None:
        say_once(
            f"{folder} holds tokens that are put before every text: give "
            "prefix=read_edit(folder).prefix to for_generate and for_call, or prompts lose tokens."
        )
    return _read_prefix(folder, record.prefix).cache(hf, batch, static=static)


def _ids_of(facts: PrefixFacts) -> tuple[int, ...]:
    return facts.chosen.token_ids if facts.chosen else (facts.token_id,)


def _read_prefix(folder: Path, facts: PrefixFacts) -> Prefix:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / PREFIX_FILE
    try:
        named = load_file(path)
        keys = [named[f"layer.{i}.key"] for i in range(facts.layers)]
        values = [named[f"layer.{i}.value"] for i in range(facts.layers)]
    except (OSError, SafetensorError, KeyError) as error:
        raise ResultError(f"cannot read {path}: {str(error)[:120]}; export it again.") from None
    return Prefix(facts.token_id, keys, values, _ids_of(facts)[1:])


def for_generate(
    ids: Tensor, mask: Tensor | None = None, *, prefix: PrefixFacts | None = None
) -> dict[str, Tensor]:
    """Inputs of ``generate`` beside a prefix: whole prompts, the prefix before any padding.

    transformers leaves out as many columns as the cache holds; these must be the prefix's, so that
    a left-padded row gets its padding after them. Positions are those of the prompt with the prefix
    before it. In sliding-window layers such a row is exact up to the window only, where padding
    counts.

    Args:    ids: ``[batch, pos]``, each row with its first token. mask: 0 or False at padding.
             prefix: ``read_edit(folder).prefix``; rows are then checked against it. A prefix that
             was searched needs it: its tokens are put before each row, in the output too.
    Raises:  PromptError: a row without a token after the prefix, one that begins with the prefix's
             first token twice (chat template and tokenizer both put BOS), or with another.
    """
    mask = torch.ones_like(ids) if mask is None else mask.long()
    require_no_hole(mask)
    chosen = prefix.chosen if prefix is not None else None
    stands = chosen is None or chosen.starts_texts
    if not (mask.sum(dim=-1) > stands).all():
        raise PromptError("every row must hold its first token and at least one after it.")
    at = mask.argmax(dim=-1)
    starts = [row[n : n + 2].tolist() for row, n in zip(ids, at, strict=True)]
    _check_starts(starts, prefix)
    rows, columns = torch.arange(len(ids), device=ids.device), torch.arange(ids.shape[1])
    front = ids[rows, at][:, None]
    if chosen is not None:
        front = torch.tensor([chosen.token_ids], device=ids.device).repeat(len(ids), 1)
    if stands:
        rest = columns.to(ids.device) != at[:, None]
        ids, mask = ids[rest].view(len(ids), -1), mask[rest].view(len(ids), -1)
    return {
        "input_ids": torch.cat([front, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(front), mask], dim=1),
    }


def _check_starts(starts: Sequence[Sequence[int]], prefix: PrefixFacts | None) -> None:
    """Refuse a second first token: the prefix holds one, and the model would see the other."""
    if (row := doubled_first(starts)) is not None:
        raise PromptError(
            f"row {row} begins with token {starts[row][0]} twice, and the prefix stands for one; "
            "encode chat texts with add_special_tokens=False, or drop one."
        )
    if prefix is None:
        return
    stands = prefix.chosen is None or prefix.chosen.starts_texts
    same = [start[0] == prefix.token_id for start in starts]
    if stands and not all(same):
        row = same.index(False)
        raise PromptError(
            f"row {row} begins with token {starts[row][0]}, the prefix stands for "
            f"{prefix.token_id}; ids hold the whole prompt, its first token included."
        )
    if not stands and any(same):
        raise PromptError(
            f"row {same.index(True)} begins with token {prefix.token_id}, which the prefix begins "
            "with too; leave it out of ids."
        )


def for_call(
    ids: Tensor, mask: Tensor | None = None, *, prefix: PrefixFacts | None = None
) -> dict[str, Tensor]:
    """Inputs of the model itself beside a prefix: as :func:`for_generate`, without its tokens."""
    made = for_generate(ids, mask, prefix=prefix)
    held = len(_ids_of(prefix)) if prefix is not None else 1
    whole = made["attention_mask"]
    positions = (whole.cumsum(-1) - 1).masked_fill(whole == 0, 0)
    return {
        "input_ids": made["input_ids"][:, held:],
        "attention_mask": whole,
        "position_ids": positions[:, held:],
    }


def fixed_first(tokenizer: Tokenizer | None, first_token: str | int | None = None) -> int:
    """Id of the token that every input starts with.

    Args:    first_token: an id, or a text of one token; None = what the tokenizer puts first (BOS,
             [CLS]), or what the chat template starts with.
    Raises:  PromptError: none, or two that differ; a chat template that cannot be rendered.
    """
    if first_token is not None:
        return _asked_for(tokenizer, first_token)
    if tokenizer is None:
        raise PromptError("no tokenizer is known, so the first token is not; pass first_token=id.")
    prefix = frame_of(tokenizer).prefix
    own = "BOS" if prefix[:1] == (tokenizer.bos_token_id,) else "a text"
    found = {
        own: prefix[0] if prefix else None,
        "the chat template": _chat_start(tokenizer),
    }
    known = {name: token for name, token in found.items() if token is not None}
    if len(set(known.values())) == 1:
        return next(iter(known.values()))
    said = " and ".join(
        f"{name} starts with {tokenizer.decode([token])!r}" for name, token in known.items()
    )
    raise PromptError(f"{said or 'this tokenizer puts no fixed token first'}; {SAY_WHICH}.")


def _chat_start(tokenizer: Tokenizer) -> int | None:
    try:
        return chat_start(tokenizer) if has_template(tokenizer) else None
    except PromptError as error:
        raise PromptError(f"{error} Or {SAY_WHICH}.") from None


def _asked_for(tokenizer: Tokenizer | None, first_token: str | int) -> int:
    if isinstance(first_token, int) and not isinstance(first_token, bool):
        if first_token < 0 or (tokenizer is not None and first_token >= len(tokenizer)):
            raise PromptError(f"first_token {first_token} is outside the vocabulary.")
        return first_token
    if tokenizer is None or not isinstance(first_token, str):
        raise PromptError("first_token must be an id, or a text of one token with a tokenizer.")
    ids = plain_ids(tokenizer, first_token)
    if len(ids) != 1:
        raise PromptError(f"first_token {first_token[:40]!r} is {len(ids)} tokens; give one.")
    return int(ids[0])


CONFIG, WEIGHTS, ROW = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"


def row_of(prefix: Prefix) -> Float[Tensor, "token row"]:
    """The embeddings of its virtual tokens.

    Raises:  InterventionError: layers, or keys and values, of different shapes.
    """
    shapes = {tuple(part.shape) for part in (*prefix.keys, *prefix.values)}
    if len(shapes) != 1:
        raise InterventionError(
            "PEFT's prefix needs keys and values of one shape in all layers, these have "
            f"{', '.join(str(list(shape)) for shape in sorted(shapes))}; "
            "use format='prefix' (--format prefix)."
        )
    pairs = zip(prefix.keys, prefix.values, strict=True)
    parts = [part.transpose(0, 1).flatten(1) for pair in pairs for part in pair]
    return torch.cat(parts, dim=1)


def check_like_peft(hf: TransformersModel, prefix: Prefix) -> None:
    """Refuse a model of which PEFT would build another shape than the prefix has.

    It takes the head size from the config: ``head_dim``, else ours divided by the heads.

    Raises:  InterventionError: naming both.
    """
    text = hf.config.get_text_config(decoder=True)
    heads, _, width = prefix.keys[0].shape
    try:
        expected = (
            getattr(text, "num_key_value_heads", None) or heads,
            getattr(text, "head_dim", None) or width,
        )
    except RuntimeError:  # transformers, of a config that says them layer by layer (Gemma-4)
        raise InterventionError(
            f"{type(hf).__name__} has heads of its own in every layer, and PEFT expects the same "
            "in all; use format='prefix' (--format prefix)."
        ) from None
    if (heads, width) != expected:
        raise InterventionError(
            f"PEFT expects {expected[0]} x {expected[1]} keys of {type(hf).__name__}, the model "
            f"has {heads} x {width}; use format='prefix' (--format prefix)."
        )


def write_adapter(prefix: Prefix, folder: Path, *, base: str, revision: str | None) -> None:
    """adapter_config.json and adapter_model.safetensors."""
    from safetensors.torch import save_file

    heads, _, width = prefix.keys[0].shape
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base,
        "revision": revision,
        "num_virtual_tokens": len(prefix.ids),
        "num_layers": len(prefix.keys),
        "num_attention_heads": heads,
        "token_dim": heads * width,
        "encoder_hidden_size": heads * width,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", "utf-8")
    save_file({ROW: row_of(prefix).contiguous()}, folder / WEIGHTS)
