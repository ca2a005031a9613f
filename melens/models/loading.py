"""load(): a name, a path, a hub id or a model object -> a checked bridge in eval mode."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Any

import torch

from melens.errors import FetchError, ModelError, ModelNotFoundError, WeightsError
from melens.models.contract import check_contract
from melens.models.files import check_config, check_folder
from melens.models.gguf import converted_copy
from melens.models.named import NAMED, fetch
from melens.models.origin import Origin, remember

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: Any,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """A TransformerBridge in eval mode with its tokenizer, its hooks checked.

    Args:    model: a named model (``melens models``), a folder, a ``.gguf`` file, a Hugging Face
             id (the only case that may use the network), or a model object: an HF causal LM is
             bridged in place, a TransformerBridge or HookedTransformer is checked and returned.
             device: ``cpu``, ``cuda``, ``mps``, ...; None = CUDA, else MPS, else CPU. An object
             is never moved: naming another device for it is refused.
             dtype: torch dtype or its name, ``auto`` = the checkpoint's own; None = float32 on
             the CPU, the checkpoint's own elsewhere.
             revision: branch, tag or commit of a hub id.
             tokenizer: needed only for an HF model object whose folder holds none.
    Raises:  ModelNotFoundError, WeightsError, LicenceError, FetchError: it cannot be had.
             ModelError: no causal LM, remote code. ContractError: its hooks do not add up.
    """  # fmt: skip
    if not isinstance(model, (str, Path)):
        bridge = _adopt(model, device=device, dtype=dtype, tokenizer=tokenizer)
        check_contract(bridge)
        return bridge
    name = str(model)
    source, is_local = _resolve(name, revision=revision, trust_remote_code=trust_remote_code)
    if is_local and revision is not None:
        raise ModelError(f"revision belongs to a hub id; {name} is a local model.")
    device = device or _best_device()
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    hf = _read_weights(source, dtype=_dtype(dtype, device), is_local=is_local, **options)
    tokenizer = tokenizer or _read_tokenizer(source, is_local=is_local, **options)
    bridge = _bridge(_to_device(hf, device), tokenizer, name=name)
    commit = getattr(hf.config, "_commit_hash", None)
    remember(bridge, Origin(name if name in NAMED or not is_local else source.name,
                            revision=commit or revision))  # fmt: skip
    check_contract(bridge)
    return bridge


def _resolve(name: str, *, revision: str | None, trust_remote_code: bool) -> tuple[Any, bool]:
    """Where to load from (a folder, or a hub id) and whether that is local."""
    if name in NAMED:
        return fetch(NAMED[name]), True
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name} is a file, but no .gguf; give the model's folder instead.")
        return converted_copy(path), True
    if path.is_dir():
        check_folder(path, trust_remote_code=trust_remote_code)
        return path, True
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        raise ModelNotFoundError(f"there is no file or folder {name}.")
    _check_hub(name, revision=revision, trust_remote_code=trust_remote_code)
    return name, False


def _check_hub(name: str, *, revision: str | None, trust_remote_code: bool) -> None:
    """Look at a hub id's config before its weights are fetched."""
    if "/" not in name and difflib.get_close_matches(name, NAMED, n=1):
        raise ModelNotFoundError(NAMED.unknown(name))
    from transformers.configuration_utils import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        if "valid model identifier" in first:
            raise ModelNotFoundError(f"{NAMED.unknown(name)} The hub knows none either.") from None
        raise FetchError(
            f"{name} is no named model and no folder here, and the hub could not be read: "
            f"{first[:160]}"
        ) from None
    check_config(config, name=name, trust_remote_code=trust_remote_code)


def _read_weights(
    source: Any, *, dtype: torch.dtype | str, is_local: bool, **options: Any
) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        hf, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, attn_implementation="eager",
            local_files_only=is_local, output_loading_info=True, **options,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        kind = WeightsError if is_local else FetchError
        raise kind(f"cannot load {source}: {first[:200]}") from None
    if missing := sorted(info["missing_keys"]):
        # transformers would fill them with random values and only warn
        raise WeightsError(
            f"{source} lacks {len(missing)} tensor(s) of its model, first {missing[0]}; "
            "fetch it again."
        )
    require_finite_weights(hf)
    return hf


def _read_tokenizer(source: Any, *, is_local: bool, **options: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=is_local, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = (str(error).strip().splitlines() or ["?"])[0]
        raise ModelError(
            f"{source} has no tokenizer that can be read ({first[:120]}); pass tokenizer=..."
        ) from None


def _adopt(model: Any, *, device: str | None, dtype: Any, tokenizer: Any) -> Any:
    """A model object of the caller's: bridged if it is a plain HF model, never moved or cast."""
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"load() got a {type(model).__name__}; give a name, a path or a model.")
    first = next(model.parameters())
    if device is not None and torch.device(device).type != first.device.type:
        raise ModelError(f"the model is on {first.device}; move it yourself, or drop device.")
    if dtype not in (None, "auto") and _dtype(dtype, "cpu") != first.dtype:
        raise ModelError(f"the model is in {first.dtype}; cast it yourself, or drop dtype.")
    if hasattr(model, "hook_dict") and hasattr(model, "run_with_hooks"):
        return model.eval()
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise ModelError(f"{type(model).__name__} is neither an HF causal LM nor a hooked model.")
    data = {**config.to_dict(), "architectures": [type(model).__name__]}
    check_config(data, name=type(model).__name__, trust_remote_code=True)
    require_finite_weights(model)
    path = str(getattr(config, "_name_or_path", "") or "")
    if tokenizer is None and path and Path(path).is_dir():
        tokenizer = _read_tokenizer(Path(path), is_local=True)
    name = path.rstrip("/").rsplit("/", 1)[-1] or type(model).__name__
    bridge = _bridge(model, tokenizer, name=name)
    remember(bridge, Origin(name))
    return bridge


def _bridge(hf: torch.nn.Module, tokenizer: Any, *, name: str) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    config: Any = hf.config
    if not getattr(config, "architectures", None):
        config.architectures = [type(hf).__name__]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            bridge = build_bridge_from_module(
                hf, type(hf).__name__, hf_config=config, model_name=name
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(
                f"TransformerLens has no adapter for {type(hf).__name__} ({str(error)[:120]})."
            ) from None
    if tokenizer is not None:
        # The tokenizer as it is: TransformerLens' own set-up would switch BOS on.
        bridge.tokenizer = tokenizer
        probe = tokenizer("a", verbose=False)["input_ids"]
        bridge.cfg.tokenizer_prepends_bos = bool(probe) and probe[0] == tokenizer.bos_token_id
    return bridge.eval()


def require_finite_weights(model: torch.nn.Module) -> None:
    """Refuse NaN or Inf in any parameter.

    Raises:  WeightsError: naming the first such tensor and how many of its values are bad.
    """
    for name, value in model.named_parameters():
        bad = 0 if torch.isfinite(value).all() else int((~torch.isfinite(value)).sum())
        if bad:
            raise WeightsError(
                f"{name} holds {bad} NaN or Inf of {value.numel()} values; the checkpoint is "
                "damaged, or was saved in a dtype too small for it."
            )


def _to_device(hf: Any, device: str) -> Any:
    try:
        return hf.to(device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"device {device!r} cannot be used: {first[:150]}") from None


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(dtype: torch.dtype | str | None, device: str) -> Any:
    if dtype is None:
        return torch.float32 if device == "cpu" else "auto"
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; use auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]
