"""The language model inside a multimodal checkpoint: its config, and which tensors are its own.

melens reads text alone. Of a ``...ForConditionalGeneration`` checkpoint the language model is
taken, as the class that transformers has for it, and nothing else is put into memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from melens.protocols import JsonObject, PretrainedConfig

WHOLE = "melens_language_model_of"
"""Set in the inner config: the architecture that it was taken out of."""
RENAMED = {r"^language_model\.": "", r"^model\.language_model\.": "model."}
"""Names in multimodal files -> names of the language model alone, as regular expressions."""
SAME_AS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
"""Inner models that have no class of their own -> the model type that computes the same of text:
their three position ids (time, height, width) are one and the same there, as in ordinary RoPE."""
FLAT = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}
"""Whole models whose older files keep the language model's numbers in the outer config."""
FLOAT, DEEPEST = "__float__", 20
OWN = re.compile(r"^(model\.(layers|embed_tokens|norm)\b|lm_head\.)")


def language_config(config: Any) -> Any:
    """The inner language model's config; the config itself where there is no other model in it.

    Numbers that JSON cannot hold are as transformers writes them: ``{"__float__": "Infinity"}``.
    """
    config = _with_floats(config)
    if not isinstance(config, dict):
        return config
    if "text_config" not in config and "vision_config" in config and _kind(config) in FLAT:
        outer = {k: v for k, v in config.items() if k != "vision_config"}
        config = {**config, "text_config": {**outer, "model_type": FLAT[_kind(config)]}}
    if not isinstance(config.get("text_config"), dict):
        return config
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    listed = config.get("architectures")
    whole = str(listed[0]) if isinstance(listed, list) and listed else ""
    text: JsonObject = dict(config["text_config"])
    if (kind := _kind(text)) in SAME_AS:
        text |= {"model_type": SAME_AS[kind]} | _one_position(text)
    own = CAUSAL.get(_kind(text))
    if not whole.endswith("ForConditionalGeneration") or not str(own).endswith("CausalLM"):
        return config
    for key in ("dtype", "torch_dtype", "quantization_config"):
        if key in config:
            text.setdefault(key, config[key])
    text["tie_word_embeddings"] = _is_tied(config)
    return {**text, "architectures": [own], WHOLE: whole}


def _kind(config: JsonObject) -> str:
    return str(config.get("model_type"))


def _one_position(text: JsonObject) -> JsonObject:
    """RoPE's settings without the sections of a position in three parts."""
    names = [
        name for name in ("rope_scaling", "rope_parameters") if isinstance(text.get(name), dict)
    ]
    made: JsonObject = {}
    for name in names:
        kept = {k: v for k, v in text[name].items() if not k.startswith("mrope")}
        for key in ("type", "rope_type"):
            if kept.get(key) == "mrope":
                kept[key] = "default"
        made[name] = kept
    return made


def _with_floats(value: object, depth: int = 0) -> object:
    if depth > DEEPEST:
        return value
    if isinstance(value, list):
        return [_with_floats(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {FLOAT} and value[FLOAT] in ("Infinity", "-Infinity", "NaN"):
        return float(value[FLOAT])
    return {key: _with_floats(item, depth + 1) for key, item in value.items()}


def _is_tied(config: JsonObject) -> bool:
    """Whether embedding and unembedding are one: the whole model's config says so, or its class."""
    from transformers import CONFIG_MAPPING

    if isinstance(said := config.get("tie_word_embeddings"), bool):
        return said
    kind = str(config.get("model_type"))
    known = kind in CONFIG_MAPPING  # a lazy mapping: its get() knows only what was asked for before
    return bool(known and getattr(CONFIG_MAPPING[kind], "tie_word_embeddings", False))


def inner_config(config: JsonObject) -> PretrainedConfig:
    """A language model's config as transformers has it."""
    from transformers import AutoConfig

    facts = {key: value for key, value in config.items() if key not in (WHOLE, "model_type")}
    return AutoConfig.for_model(config["model_type"], **facts)


def note(config: JsonObject, *, name: str) -> str:
    """What a user is told of a model that was taken out of another."""
    inner = config["architectures"][0]
    return f"{name} is a {config[WHOLE]}; its language model, a {inner}, is read, and text alone."


def own_name(name: str) -> str | None:
    """A tensor's name in the language model alone; None for one of another part."""
    for pattern, shorter in RENAMED.items():
        if re.match(pattern, name):
            return re.sub(pattern, shorter, name)
    return name if OWN.match(name) else None


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' own report of what it loaded: melens says what matters of it."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
