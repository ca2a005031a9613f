"""load(): a name, a path, a hub id or a model object -> a checked bridge in eval mode."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from melens.collector import rarely_collected
from melens.errors import FetchError, ModelError, WeightsError
from melens.models.bridging import (
    checked_bridge,
    give_tokenizer,
    require_finite_weights,
    require_here,
    require_tokenizer,
    unwrapped,
)
from melens.models.complaints import broken_json, first_line, no_tokenizer
from melens.models.contract import check_contract
from melens.models.dry_load import require_all_there
from melens.models.files import check_config, check_folder, require_no_adapter
from melens.models.gguf import (
    converted_copy,
    given_names,
    no_cache,
    read_gguf_tokenizer,
    read_gguf_whole,
)
from melens.models.hub import OFFLINE, asking_the_hub, reach_hub
from melens.models.multimodal import (
    RENAMED,
    WHOLE,
    inner_config,
    language_config,
    own_name,
    quietly,
)
from melens.models.named import NAMED, fetch, kept_copy
from melens.models.object_bridges import keep_bridge, kept_bridge, last_bridge
from melens.models.origin import Origin, name_of, remember
from melens.models.resolve import Asked, asked
from melens.models.weight_files import read_json
from melens.network import is_offline, pass_on
from melens.placement import DeviceMap, placement_options, require_undivided, spread
from melens.progress import only_errors_of, say_once
from melens.protocols import HookedModel, Loadable, Options, Tokenizer, TransformersModel

CHECKED: weakref.WeakSet[HookedModel] = weakref.WeakSet()
"""Model objects that passed the contract already."""
PLACES = ("device_map", "max_memory", "offload_folder")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(  # noqa: PLR0913 (what is loaded, and where it goes, are two things)
    model: Loadable,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    trust_remote_code: bool = False,
    device_map: DeviceMap = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> HookedModel:
    """A TransformerBridge in eval mode with its tokenizer, its hooks checked.

    Args:    model: a named model (``melens models``), a folder, a ``.gguf`` file, a Hugging Face
             id, or a model object: an HF causal LM stays as it is (the bridge shares its weights),
             a TransformerBridge or HookedTransformer is checked and returned. The network is
             used for a hub id, and for a named model that is not here yet; MELENS_OFFLINE=1
             forbids it.
             device: ``cpu``, ``cuda``, ``mps``, ...; None = CUDA, else MPS, else CPU. An object
             is never moved: naming another device for it is refused.
             dtype: torch dtype or its name, ``auto`` = the checkpoint's own; None = float32 on
             the CPU, the checkpoint's own elsewhere.
             revision: branch, tag or commit of a hub id.
             tokenizer: needed only for an HF model object whose folder holds none; a transformers
             tokenizer, or the path of a folder with one.
             device_map, max_memory, offload_folder: as transformers has them, for a model that
             does not fit on one device (docs/scale.md): ``"auto"``, or module -> device.
    Raises:  ModelNotFoundError, WeightsError, LicenceError, FetchError: it cannot be had.
             ModelError: no causal LM, remote code. ContractError: its hooks do not add up.
    """
    if not isinstance(model, (str, Path)):
        for name, given in zip(PLACES, (device_map, max_memory, offload_folder), strict=True):
            if given is not None:
                raise ModelError(f"{name} is for a name or a path; this object is placed already.")
        return adopt(model, device=device, dtype=dtype, tokenizer=tokenizer).eval()
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    options |= placement_options(device_map, max_memory, offload_folder, device=device)
    hf, tokenizer, origin = _load_hf(
        str(model), _given_tokenizer(tokenizer), device=device, dtype=dtype, options=options
    )
    bridge, _ = checked_bridge(hf, tokenizer, name=str(model))
    remember(bridge.eval(), origin)
    CHECKED.add(bridge)
    return bridge


def load_plain(  # noqa: PLR0913 (as load)
    model: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: DeviceMap = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> tuple[TransformersModel, Tokenizer, Origin]:
    """A transformers causal LM that is not bridged, its tokenizer, and where it came from.

    For what a bridge cannot do (be saved) or does slower (decode); arguments, network and errors
    are :func:`load`'s.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    options |= placement_options(device_map, max_memory, offload_folder, device=device)
    return _load_hf(str(model), None, device=device, dtype=dtype, options=options)


@rarely_collected()
def _load_hf(
    name: str,
    tokenizer: Tokenizer | None,
    *,
    device: str | None,
    dtype: torch.dtype | str | None,
    options: Options,
) -> tuple[TransformersModel, Tokenizer, Origin]:
    revision, trusted = options["revision"], options["trust_remote_code"]
    where = {name: options.pop(name) for name in PLACES if name in options}
    wanted = asked(name, revision=revision)
    source = source_of(wanted, revision=revision, trust_remote_code=trusted)
    device = usable_device(device or best_device())
    options = {**options, "local_files_only": isinstance(source, Path) or is_offline()}
    tokenizer = tokenizer or read_tokenizer(source, options)
    hf = _read_weights(source, dtype=chosen_dtype(dtype, device), options=options, where=where)
    commit = getattr(hf.config, "_commit_hash", None)
    if commit is None and not wanted.is_local and isinstance(source, Path):
        commit = source.name  # the hub's cache names its folders by commit
    also = given_names(source) if wanted.is_local and isinstance(source, Path) else ()
    origin = Origin(wanted.shown, revision=commit or revision, also=also)
    if where:
        say_once(f"weights of {wanted.shown}: {spread(hf)}.")
    return (hf if where else hf.to(device)).eval(), tokenizer, origin


def adopt(
    model: Loadable,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
) -> HookedModel:
    """:func:`load` for names and paths; a model object is bridged if need be, checked once, and
    left on its device, in its dtype and in its mode. An HF model stays as it is: its bridge runs
    the same weights in modules of its own, with the hooks that the model has by then.
    """  # noqa: D205
    if isinstance(model, (str, Path)):
        return load(model, device=device, dtype=dtype, tokenizer=tokenizer)
    model = unwrapped(model)
    if not isinstance(model, torch.nn.Module) or next(model.parameters(), None) is None:
        raise ModelError(f"load() got a {type(model).__name__}; give a name, a path or a model.")
    tokenizer = _given_tokenizer(tokenizer)
    _refuse_moving(model, device, dtype)
    require_undivided(model)
    require_here(model)
    bridge = kept_bridge(model)
    if bridge is None:
        require_finite_weights(model)
        before = last_bridge(model)
        if tokenizer is None and before is not None:
            tokenizer = before.tokenizer
        bridge = _bridge_object(model, tokenizer)
        CHECKED.add(bridge)
        keep_bridge(model, bridge)
    if tokenizer is not None and bridge.tokenizer is None:
        give_tokenizer(bridge, tokenizer)
    if bridge not in CHECKED:
        require_finite_weights(model)
        check_contract(bridge)
        CHECKED.add(bridge)
    return bridge


def source_of(wanted: Asked, *, revision: str | None, trust_remote_code: bool) -> str | Path:
    """Where to load from: a folder, a ``.gguf`` file of which no copy is kept, or a hub id."""
    pass_on()
    name, path = wanted.name, wanted.path
    if wanted.kind == "named":
        found = fetch(NAMED[name])
        return found if found.is_file() else _checked(found)
    if wanted.kind == "gguf":
        return path if no_cache() else _checked(converted_copy(path))
    if wanted.kind == "folder":
        return _checked(path, trust_remote_code=trust_remote_code)
    if is_offline():
        # its folder and not its name: given a name the libraries may still ask for other things
        return _checked(_offline_copy(name, revision), trust_remote_code=trust_remote_code)
    try:
        reach_hub(name, revision)
    except FetchError:
        folder = kept_copy(name, revision)
        if folder is None:
            raise
        say_once(f"the hub is out of reach; {name} is of its cache here, commit {folder.name:.8}.")
        return _checked(folder, trust_remote_code=trust_remote_code)
    _check_hub(name, revision=revision, trust_remote_code=trust_remote_code)
    return name


def _offline_copy(name: str, revision: str | None) -> Path:
    folder = kept_copy(name, revision)
    if folder is None:
        raise FetchError(
            f"{name} is no named model and no folder here, and {OFFLINE}; the hub's cache here "
            "does not hold it whole."
        )
    return folder


def _checked(folder: Path, *, trust_remote_code: bool = False) -> Path:
    check_folder(folder, trust_remote_code=trust_remote_code)
    return folder


def _check_hub(name: str, *, revision: str | None, trust_remote_code: bool) -> None:
    """Look at a hub id's config before its weights are fetched."""
    from transformers.configuration_utils import PretrainedConfig

    with asking_the_hub(name):
        config, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    check_config(config, name=name, trust_remote_code=trust_remote_code)


def _read_weights(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None,
    options: Options,
    where: Options | None = None,
) -> TransformersModel:
    from transformers import AutoModelForCausalLM

    reader: Any = AutoModelForCausalLM
    folder = source
    if isinstance(source, Path) and source.is_file():  # a .gguf of which no copy is to be kept
        if where:
            raise ModelError("device_map reads a .gguf's converted copy; drop --no-cache.")
        (reader, weights), folder = read_gguf_whole(source), None
        options = {**options, **weights}
    if folder is not None and (inner := _inner(folder, options)) is not None:
        reader, more = inner
        options = {**options, **more}
    options = {**options, **(where or {})}
    quiet = quietly() if "key_mapping" in options or where else nullcontext()
    try:
        with quiet, only_errors_of("accelerate.big_modeling"):
            loaded = reader.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
    except MemoryError:
        raise
    except Exception as error:  # constructors raise whatever a senseless config leads them to
        if isinstance(source, Path) and (bad := broken_json(source, ("generation_config.json",))):
            raise ModelError(f"{source / bad[0]}: {bad[1]}; mend it, or remove it.") from None
        kind = WeightsError if isinstance(source, Path) else FetchError
        raise kind(f"cannot load {source}: {first_line(error)}") from None
    hf, info = loaded
    if "key_mapping" in options:  # what is left over is of other parts, as far as it is named so
        left = [key for key in info["unexpected_keys"] if own_name(key) is not None]
        info = {**info, "unexpected_keys": left}
    require_no_adapter(bool(getattr(hf, "_hf_peft_config_loaded", False)), name=str(source))
    require_all_there(
        info,
        getattr(hf.config, "num_hidden_layers", None),
        name=source,
        quantised=getattr(hf, "hf_quantizer", None) is not None,
    )
    require_finite_weights(hf)
    return hf


def _inner(source: str | Path, options: Options) -> tuple[type[TransformersModel], Options] | None:
    """How to read the language model of a multimodal checkpoint; None for any other."""
    import transformers

    if isinstance(source, Path):
        raw = read_json(source / "config.json")
    else:
        said = {**options, "trust_remote_code": False}
        raw = transformers.PretrainedConfig.get_config_dict(source, **said)[0]
    config = language_config(raw)
    if WHOLE not in config:
        return None
    reader = getattr(transformers, config["architectures"][0])
    return reader, {"config": inner_config(config), "key_mapping": RENAMED}


def read_tokenizer(source: str | Path, options: Options) -> Tokenizer:
    """The tokenizer of a folder or hub id.

    Raises:  ModelError: there is none that can be read.
    """
    from transformers import AutoTokenizer

    if isinstance(source, Path) and source.is_file():
        made = read_gguf_tokenizer(source)
        if made is None:
            raise ModelError(
                f"{source} has no tokenizer that can be read: it holds no vocabulary; give a file "
                "that has one."
            )
        return made

    def read(place: str | Path) -> Tokenizer:
        made = AutoTokenizer.from_pretrained(place, **options)
        if not isinstance(made.model_max_length, (int, float)):  # is looked at only when used
            raise TypeError(f"model_max_length is {made.model_max_length!r:.40}, no number")
        return made

    try:
        return read(source)
    except MemoryError:
        raise
    except Exception as error:  # damaged files lead it to anything
        if isinstance(source, Path):
            again = None if options.get("trust_remote_code") else read  # its code runs once
            raise no_tokenizer(source, error, again) from None
        raise ModelError(
            f"{source} has no tokenizer that can be read ({first_line(error)}); look at its files "
            "on the hub."
        ) from None


def _refuse_moving(
    model: torch.nn.Module, device: str | None, dtype: torch.dtype | str | None
) -> None:
    first = next(model.parameters())
    if device is not None and device.split(":")[0] != first.device.type:
        raise ModelError(f"the model is on {first.device}; move it yourself, or drop device.")
    if dtype not in (None, "auto") and chosen_dtype(dtype, "cpu") != first.dtype:
        raise ModelError(f"the model is in {first.dtype}; cast it yourself, or drop dtype.")


def _given_tokenizer(tokenizer: Tokenizer | str | Path | None) -> Tokenizer | None:
    given = require_tokenizer(tokenizer)
    if not isinstance(given, (str, Path)):
        return given
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise ModelError(
            f"tokenizer={str(given)!r:.80} is not a folder here; give one, or an object."
        )
    return read_tokenizer(folder, {"local_files_only": True, "trust_remote_code": False})


def _bridge_object(model: Any, tokenizer: Tokenizer | None) -> HookedModel:
    """Bridge a plain HF model of the caller's."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise ModelError(f"{type(model).__name__} is neither an HF causal LM nor a hooked model.")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if type(model).__name__ not in CAUSAL.values():  # the language model of Mllama, Emu3
        data = {**config.to_dict(), "architectures": [type(model).__name__]}
        check_config(data, name=type(model).__name__, trust_remote_code=True)
    path = str(getattr(config, "_name_or_path", "") or "")
    if tokenizer is None and path and Path(path).is_dir():
        tokenizer = read_tokenizer(
            Path(path), {"local_files_only": True, "trust_remote_code": False}
        )
    name = name_of(path) or type(model).__name__
    bridge, _ = checked_bridge(model, tokenizer, name=name)
    remember(bridge, Origin(name))
    return bridge


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


def chosen_dtype(dtype: torch.dtype | str | None, device: str) -> torch.dtype | str:
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
