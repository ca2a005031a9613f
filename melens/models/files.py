"""A model folder, checked before anything is loaded from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from melens.errors import ModelError, ModelNotFoundError, WeightsError

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HEADER_LIMIT = 100_000_000


def check_folder(folder: Path, *, trust_remote_code: bool) -> None:
    """Refuse a folder that is not a causal LM in whole safetensors files.

    Raises:  ModelNotFoundError: no config.json. ModelError: remote code, or not causal.
             WeightsError: missing, truncated or pickled weights.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFoundError(
            f"{folder} holds no config.json; give a Hugging Face model folder"
            + (
                " (it is a prefix or an adapter: melens.exporting.load_prefix, or peft, takes it)."
                if (folder / "melens.json").exists()
                else "."
            )
        )
    check_config(read_json(path), name=str(folder), trust_remote_code=trust_remote_code)
    for file in _weight_files(folder):
        check_safetensors(file)


def check_config(config: Any, *, name: str, trust_remote_code: bool) -> None:
    """Refuse what is no causal LM, or runs code of its own that nobody asked for."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not isinstance(config, dict):
        raise ModelError(f"{name}: config.json is not a JSON object.")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if config.get("auto_map") and trust_remote_code:
            return
        if config.get("auto_map"):
            raise ModelError(
                f"{name} runs code of its own (model type {kind!r}); read it, and if you trust it "
                "pass trust_remote_code=True (--trust-remote-code)."
            )
        raise ModelError(f"{name}: this version of transformers knows no model type {kind!r}.")
    names = [str(item) for item in config.get("architectures") or []]
    causal = any(item.endswith(("CausalLM", "LMHeadModel")) for item in names) or not names
    if (
        config.get("is_encoder_decoder")
        or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or not causal
    ):
        raise ModelError(
            f"{name} is no causal decoder LM ({names[0] if names else kind}); "
            "melens reads only those."
        )


def check_safetensors(path: Path) -> None:
    """Refuse a missing or truncated safetensors file, by its header and size alone.

    Raises:  WeightsError: naming the file and what is wrong.
    """
    if not path.is_file():
        raise WeightsError(f"{path.name} is missing from {path.parent}; fetch it again.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, HEADER_LIMIT):
            raise WeightsError(f"{path.name} is truncated or no safetensors file ({size} bytes).")
        try:
            header = json.loads(file.read(length))
            ends = [
                item["data_offsets"][1] for key, item in header.items() if key != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise WeightsError(f"{path.name} has a corrupt safetensors header.") from None
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        raise WeightsError(f"{path.name} is truncated: {size} bytes of {whole}; fetch it again.")


def read_json(path: Path) -> Any:
    """A JSON file's content; a broken one is a ModelError."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}.") from None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        data = read_json(index)
        shards = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(shards, dict) or not shards:
            raise WeightsError(f"{INDEX} in {folder} has no weight_map; fetch it again.")
        return [folder / name for name in sorted(set(shards.values()))]
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise WeightsError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when loaded; "
            "convert them to safetensors first."
        )
    raise WeightsError(f"{folder} holds no safetensors weights.")
