"""load(): a name, a path, a hub id or a model object -> a checked bridge in eval mode."""

from __future__ import annotations

import copy
import difflib
import os
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch

from melens.errors import FetchError, ModelError, ModelNotFoundError, WeightsError
from melens.framing import frame_of
from melens.models.contract import check_contract
from melens.models.decoder import KEPT_BRIDGE
from melens.models.files import check_config, check_folder
from melens.models.gguf import converted_copy
from melens.models.named import NAMED, fetch
from melens.models.origin import Origin, remember

CHECKED: weakref.WeakSet[Any] = weakref.WeakSet()
"""Model objects that passed the contract already."""
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
             id, or a model object: an HF causal LM is bridged in place, a TransformerBridge or
             HookedTransformer is checked and returned. The network is used for a hub id, and for
             a named model that is not here yet.
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
        return adopt(model, device=device, dtype=dtype, tokenizer=tokenizer).eval()
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    hf, tokenizer, origin = _load_hf(
        str(model), tokenizer, device=device, dtype=dtype,
        options={**options, "attn_implementation": "eager"},
    )  # fmt: skip
    bridge = bridge_module(hf, tokenizer, name=str(model)).eval()
    remember(bridge, origin)
    check_contract(bridge)
    CHECKED.add(bridge)
    return bridge


def load_plain(
    model: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any, Origin]:
    """A transformers causal LM that is not bridged, its tokenizer, and where it came from.

    For what a bridge cannot do (be saved) or does slower (decode); arguments, network and errors
    are :func:`load`'s.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    return _load_hf(str(model), None, device=device, dtype=dtype, options=options)


def _load_hf(
    name: str, tokenizer: Any, *, device: str | None, dtype: Any, options: dict[str, Any]
) -> tuple[Any, Any, Origin]:
    revision, trusted = options["revision"], options["trust_remote_code"]
    source, is_local = resolve(name, revision=revision, trust_remote_code=trusted)
    if is_local and revision is not None:
        raise ModelError(f"revision belongs to a hub id; {name} is a local model.")
    device = usable_device(device or best_device())
    options = {**options, "local_files_only": is_local}
    hf = _read_weights(source, dtype=chosen_dtype(dtype, device), options=options)
    options.pop("attn_implementation", None)
    tokenizer = tokenizer or read_tokenizer(source, options)
    shown = name if name in NAMED or not is_local else Path(name).expanduser().resolve().name
    commit = getattr(hf.config, "_commit_hash", None)
    return hf.to(device).eval(), tokenizer, Origin(shown, revision=commit or revision)


def adopt(
    model: Any, *, device: str | None = None, dtype: Any = None, tokenizer: Any = None
) -> Any:
    """:func:`load` for names and paths; a model object is bridged if need be, checked once, and
    left on its device, in its dtype and in its mode. An HF model keeps its bridge: bridging
    replaces its submodules, so that a second one would wrap the first (and saving it no longer
    works; save a model that was never bridged).
    """  # noqa: D205
    if isinstance(model, (str, Path)):
        return load(model, device=device, dtype=dtype, tokenizer=tokenizer)
    if not isinstance(model, torch.nn.Module) or next(model.parameters(), None) is None:
        raise ModelError(f"load() got a {type(model).__name__}; give a name, a path or a model.")
    _refuse_moving(model, device, dtype)
    if hasattr(model, "hook_dict") and hasattr(model, "run_with_hooks"):
        bridge = model
    elif (bridge := vars(model).get(KEPT_BRIDGE)) is None:
        bridge = _bridge_object(model, tokenizer)
        vars(model)[KEPT_BRIDGE] = bridge
    if tokenizer is not None and bridge.tokenizer is None:
        _give_tokenizer(bridge, tokenizer)
    if bridge not in CHECKED:
        require_finite_weights(bridge)
        check_contract(bridge)
        CHECKED.add(bridge)
    return bridge


def resolve(name: str, *, revision: str | None, trust_remote_code: bool) -> tuple[Any, bool]:
    """Where to load from (a folder, or a hub id) and whether that is local."""
    if name in NAMED:
        return _checked(fetch(NAMED[name])), True
    if not name.strip():
        raise ModelNotFoundError("the model's name is empty; see: melens models")
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name} is a file, but no .gguf; give the model's folder instead.")
        return _checked(converted_copy(path)), True
    if path.is_dir():
        return _checked(path, trust_remote_code=trust_remote_code), True
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        raise ModelNotFoundError(f"there is no file or folder {name}.")
    _check_hub(name, revision=revision, trust_remote_code=trust_remote_code)
    return name, False


def _checked(folder: Path, *, trust_remote_code: bool = False) -> Path:
    check_folder(folder, trust_remote_code=trust_remote_code)
    return folder


def _check_hub(name: str, *, revision: str | None, trust_remote_code: bool) -> None:
    """Look at a hub id's config before its weights are fetched."""
    if "/" not in name and difflib.get_close_matches(name, NAMED, n=1):
        raise ModelNotFoundError(NAMED.unknown(name))
    from transformers.configuration_utils import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError) as error:
        first = first_line(error)
        if any(os.environ.get(offline) for offline in ("HF_HUB_OFFLINE", "MELENS_OFFLINE")):
            first = "offline was asked for, and it is not in the hub's cache here"
        if "valid model identifier" in first:
            raise ModelNotFoundError(f"{NAMED.unknown(name)} The hub knows none either.") from None
        raise FetchError(
            f"{name} is no named model and no folder here, and the hub could not be read: {first}"
        ) from None
    check_config(config, name=name, trust_remote_code=trust_remote_code)


def _read_weights(source: Any, *, dtype: Any, options: dict[str, Any]) -> torch.nn.Module:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except (
        OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError,
        StrictDataclassError,
    ) as error:  # fmt: skip
        kind = WeightsError if options["local_files_only"] else FetchError
        raise kind(f"cannot load {source}: {first_line(error)}") from None
    hf, info = loaded
    if missing := sorted(info["missing_keys"]):
        # transformers would fill them with random values and only warn
        raise WeightsError(
            f"{source} lacks {len(missing)} tensor(s) of its model, first {missing[0]}; "
            "fetch it again."
        )
    require_finite_weights(hf)
    return hf


def read_tokenizer(source: Any, options: dict[str, Any]) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:  ModelError: there is none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(
            f"{source} has no tokenizer that can be read ({first_line(error)}); pass tokenizer=..."
        ) from None


def first_line(error: Exception) -> str:
    """A library's complaint on one line, cut short."""
    return " ".join(str(error).split())[:240] or type(error).__name__


def _refuse_moving(model: torch.nn.Module, device: str | None, dtype: Any) -> None:
    first = next(model.parameters())
    if device is not None and device.split(":")[0] != first.device.type:
        raise ModelError(f"the model is on {first.device}; move it yourself, or drop device.")
    if dtype not in (None, "auto") and chosen_dtype(dtype, "cpu") != first.dtype:
        raise ModelError(f"the model is in {first.dtype}; cast it yourself, or drop dtype.")


def _bridge_object(model: torch.nn.Module, tokenizer: Any) -> Any:
    """Bridge a plain HF model of the caller's."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise ModelError(f"{type(model).__name__} is neither an HF causal LM nor a hooked model.")
    data = {**config.to_dict(), "architectures": [type(model).__name__]}
    check_config(data, name=type(model).__name__, trust_remote_code=True)
    path = str(getattr(config, "_name_or_path", "") or "")
    if tokenizer is None and path and Path(path).is_dir():
        tokenizer = read_tokenizer(
            Path(path), {"local_files_only": True, "trust_remote_code": False}
        )
    name = path.rstrip("/").rsplit("/", 1)[-1] or type(model).__name__
    bridge = bridge_module(model, tokenizer, name=name)
    remember(bridge, Origin(name))
    return bridge


def bridge_module(hf: torch.nn.Module, tokenizer: Any, *, name: str) -> Any:
    """A TransformerBridge around a transformers model, which it changes in place; unchecked.

    Raises:  ModelError: TransformerLens has no adapter for it.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    config: Any = copy.deepcopy(hf.config)
    config.architectures = [type(hf).__name__]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            bridge = build_bridge_from_module(
                hf, type(hf).__name__, hf_config=config, model_name=name
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(
                f"TransformerLens has no adapter for {type(hf).__name__} ({first_line(error)})."
            ) from None
    if tokenizer is not None:
        _give_tokenizer(bridge, tokenizer)
    return bridge


def _give_tokenizer(bridge: Any, tokenizer: Any) -> None:
    """The tokenizer as it is: TransformerLens' own set-up would switch BOS on."""
    bridge.tokenizer = tokenizer
    start = tokenizer.bos_token_id
    prefix = frame_of(tokenizer).prefix
    bridge.cfg.tokenizer_prepends_bos = start is not None and prefix[:1] == (start,)


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


def usable_device(device: str) -> str:
    """Refuse a device before any weights are read."""
    try:
        torch.empty(1, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used: {first_line(error)[:90]}") from None
    return device


def best_device() -> str:
    """CUDA, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def chosen_dtype(dtype: torch.dtype | str | None, device: str) -> Any:
    """The torch dtype that was asked for, or ``auto``.

    Raises:  ModelError: a name that is none.
    """
    if dtype is None:
        return torch.float32 if device == "cpu" else "auto"
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; use auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]
