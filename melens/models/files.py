"""A model folder, checked before anything is loaded from it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from melens.errors import MelensError, ModelError, ModelNotFoundError
from melens.models.cache import cache_dir
from melens.models.checkpoint import Checkpoint, read_folder
from melens.models.dry_load import require_bounded, require_loadable, require_sound_numbers
from melens.models.multimodal import WHOLE, language_config, note
from melens.models.weight_files import read_json, weight_files
from melens.network import is_set
from melens.progress import say_once
from melens.protocols import JsonObject
from melens.provenance import versions
from melens.store import hash_facts

ADAPTER = "adapter_config.json"
LARGE = 100
"""Tensors; what passed is written down of models that have as many."""


def check_folder(folder: Path, *, trust_remote_code: bool) -> Checkpoint:
    """A folder's tensors; one is refused that is no causal LM in whole safetensors files that fit
    its config.

    Reads the files' headers alone. Says on stderr which weights are taken where there is a choice.

    Raises:  ModelNotFoundError: no config.json. ModelError: remote code, not causal, or a config
             that does not make a model. WeightsError: missing, truncated or pickled weights, or
             others than the config's model uses.
    """  # noqa: D205
    require_regular_entries(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFoundError(_no_config(folder))
    config = language_config(read_json(path))
    before = _passed_before(folder, config, trust_remote_code=trust_remote_code)
    if before is None:
        check_config(config, name=str(folder), trust_remote_code=trust_remote_code)
    require_no_adapter((folder / ADAPTER).is_file(), name=str(folder))
    chosen = weight_files(folder, config)
    found = before or read_folder(chosen, config)
    if before is None:
        check_fit(config, found.shapes, name=str(folder))
        _remember(config, found.shapes, trust_remote_code=trust_remote_code)
    if chosen.note:
        say_once(chosen.note)
    if WHOLE in config:
        say_once(note(config, name=str(folder)))
    return found


def require_regular_entries(folder: Path) -> None:
    """Refuse a folder that holds a pipe, a socket or a device: whoever reads it may wait for ever.

    Raises:  ModelError: naming it.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ModelError(f"{path} is a pipe, a socket or a device, no regular file; remove it.")


def _passed_before(folder: Path, config: object, *, trust_remote_code: bool) -> Checkpoint | None:
    """The tensors, where config and tensor table passed already: checking them takes transformers.

    None where they did not, where there are few, and with ``--no-cache``.
    """
    if is_set("MELENS_NO_CACHE") or not isinstance(config, dict):
        return None
    try:
        found = read_folder(weight_files(folder, config), config)
    except (MelensError, AttributeError, TypeError):  # said in its turn, after the config's faults
        return None
    if len(found.tensors) < LARGE:
        return None
    mark = _mark(config, found.shapes, trust_remote_code=trust_remote_code)
    return found if mark.is_file() else None


def _remember(
    config: object, shapes: dict[str, tuple[int, ...]], *, trust_remote_code: bool
) -> None:
    if len(shapes) < LARGE or is_set("MELENS_NO_CACHE"):  # a small one is checked in no time
        return
    mark = _mark(config, shapes, trust_remote_code=trust_remote_code)
    with suppress(OSError):  # a cache that cannot be written: it is checked again next time
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _mark(config: object, shapes: dict[str, tuple[int, ...]], *, trust_remote_code: bool) -> Path:
    """The empty file that stands for a check that passed, in these versions of the libraries."""
    facts = [versions(), config, sorted(shapes.items()), trust_remote_code]
    return cache_dir() / "checked" / hash_facts(facts)


def check_fit(config: JsonObject, shapes: dict[str, tuple[int, ...]], *, name: str) -> None:
    """Refuse a config that does not fit the tensors, by their names and shapes alone.

    Raises:  ModelError, WeightsError: as :func:`check_folder`.
    """
    require_bounded(config, shapes, name=name)
    require_loadable(config, shapes, name=name)


def require_no_adapter(found: bool, *, name: str) -> None:
    """Refuse a model with a PEFT adapter beside it: transformers would apply it without a word,
    streaming and the scan could not.

    Raises:  ModelError: saying what to do.
    """  # noqa: D205
    if found:
        raise ModelError(
            f"{name} holds an adapter ({ADAPTER}) beside the model; merge it with peft "
            "(merge_and_unload) and save the result, or move it elsewhere to use the model alone."
        )


def check_config(config: object, *, name: str, trust_remote_code: bool) -> None:
    """Refuse what is no causal LM, or runs code of its own that nobody asked for."""
    from transformers import CONFIG_MAPPING

    if not isinstance(config, dict):
        raise ModelError(f"{name}: config.json is not a JSON object.")
    for key in ("auto_map", "quantization_config"):
        if config.get(key) is not None and not isinstance(config[key], dict):
            raise ModelError(
                f"{name}: config.json says {key} = {config[key]!r:.60}; it must be an object."
            )
    kind = config.get("model_type")
    if kind is None and not config.get("auto_map"):
        raise ModelError(f"{name}: config.json has no model_type; fetch it again.")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if config.get("auto_map") and trust_remote_code:
            return
        if config.get("auto_map"):
            raise ModelError(
                f"{name} runs code of its own (model type {kind!r}); read it, and if you trust it "
                "pass trust_remote_code=True (--trust-remote-code)."
            )
        raise ModelError(f"{name}: this version of transformers knows no model type {kind!r}.")
    _require_causal(config, kind, name=name)
    require_sound_numbers(config, name=name)


def _require_causal(config: JsonObject, kind: str, *, name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    listed = config.get("architectures") or []
    if not isinstance(listed, list):
        raise ModelError(f"{name}: config.json says architectures = {listed!r:.60}; give a list.")
    names = [str(item) for item in listed]
    causal = any(item.endswith(("CausalLM", "LMHeadModel")) for item in names) or not names
    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not causal and names[0].endswith("ForConditionalGeneration") and "text_config" in config:
        raise ModelError(
            f"{name} is a {names[0]}, and transformers has no class for its language model alone; "
            "export it as a causal LM."
        )
    if config.get("is_encoder_decoder") or not known or not causal:
        raise ModelError(
            f"{name} is no causal decoder LM ({names[0] if names else kind}); "
            "melens reads only those."
        )


def _no_config(folder: Path) -> str:
    """What a folder without a config is, and what to give instead."""
    ggufs = [file for file in folder.iterdir() if file.suffix.lower() == ".gguf"]
    if ggufs:  # of a multimodal model the part that looks comes last
        first = min(ggufs, key=lambda file: (file.name.startswith("mmproj"), file.name))
        more = f" (one of {len(ggufs)} such files)" * (len(ggufs) > 1)
        return f"{folder} holds no config.json, but a GGUF; give {first} itself{more}."
    if (folder / "melens.json").exists():
        return (
            f"{folder} holds no config.json; give a Hugging Face model folder (it is a prefix or "
            "an adapter: melens.exporting.load_prefix, or peft, takes it)."
        )
    if (folder / ADAPTER).is_file():
        adapter = read_json(folder / ADAPTER)
        base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
        return (
            f"{folder} holds only an adapter, of the model {str(base or '(not named)')[:120]}; "
            "merge it into that model with peft (merge_and_unload), save the result and give that "
            "folder."
        )
    return f"{folder} holds no config.json; give a Hugging Face model folder."
