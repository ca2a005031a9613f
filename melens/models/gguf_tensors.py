"""A GGUF's tensors under the names that transformers gives them, one at a time.

The names, and how llama.cpp's order of heads and experts is undone, are transformers' own. What a
model needs is compared with what the file holds before a value is read: transformers would fill
what is missing with random numbers.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from melens.errors import WeightsError
from melens.models.checkpoint import of_gguf
from melens.models.dry_load import require_all_there
from melens.models.gguf_header import (
    GGUFHeader,
    architecture_of,
    config_of,
    foreign,
    require_blocks,
    require_fields,
)
from melens.protocols import JsonObject, PretrainedConfig, TransformersModel

if TYPE_CHECKING:
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor

SHARED = ("falcon", "bloom")
"""Architectures that unembed by the embedding whether or not the file has an ``output.weight``."""
FREQUENCIES = "rope_freqs.weight"
LLAMA3: JsonObject = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Of every Llama from 3.1 on; base and factor are a file's own."""


@dataclass(frozen=True)
class Conversion:
    """A model to be made of a GGUF: what it needs, and which tensors of the file give it."""

    header: GGUFHeader
    model: TransformersModel
    """Without weights: its parameters are on the meta device."""
    needed: dict[str, tuple[int, ...]]
    """Shape of each parameter, those that share another's memory left out."""
    given: dict[str, str] | None
    """Parameter that each tensor goes into; None = transformers reads the whole file."""

    @property
    def n_bytes(self) -> int:
        """Of the tensors as they will be kept, at most."""
        kinds: dict[str, set[str]] = {}
        for name, parameter in (self.given or {}).items():
            kinds.setdefault(parameter, set()).add(self.header.tensors[name].kind)
        half = [n for n, found in kinds.items() if found <= {"F16"} or found <= {"BF16"}]
        return sum(
            math.prod(shape) * (2 if name in half else 4) for name, shape in self.needed.items()
        )


def plan_conversion(header: GGUFHeader) -> Conversion:
    """The model that a GGUF describes, compared with the tensors that it holds.

    Raises:  WeightsError: fields or tensors that are missing, left over or of another shape,
             naming the first; an architecture that transformers cannot read.
    """
    arch = architecture_of(header)
    require_blocks(header)
    require_fields(header, arch)
    config = config_of(header)
    set_frequencies(header, config)
    with foreign(header):
        model = _empty_model(config)
    needed = {name: tuple(value.shape) for name, value in model.named_parameters()}
    persistent = set(model.state_dict())
    needed |= {n: tuple(b.shape) for n, b in model.named_buffers() if n in persistent}
    if _is_read_whole(arch):
        if len(header.files) > 1:
            raise WeightsError(
                f"{header.name} is split, and transformers reads {arch} from one file only; join "
                "the parts (llama-gguf-split --merge)."
            )
        return Conversion(header, model, needed, None)
    with foreign(header):
        names = _names(model, arch)
    conversion = Conversion(header, model, needed, _given(header, needed, names))
    _require_sizes(conversion)
    return conversion


def _empty_model(config: PretrainedConfig) -> TransformersModel:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: TransformersModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


def _is_read_whole(arch: str) -> bool:
    """Architectures whose tensors transformers only maps while it reads the file."""
    from transformers.integrations.gguf.utils import is_gguf_arch_supported

    return is_gguf_arch_supported(arch)


@dataclass(frozen=True)
class _Named:
    """What transformers' mapping asks a model for, without its modules: it would begin again for
    each of them.
    """  # noqa: D205

    config: PretrainedConfig
    names: tuple[str, ...]

    def state_dict(self) -> dict[str, None]:
        return dict.fromkeys(self.names)

    def named_children(self) -> tuple[()]:
        return ()


def _names(model: TransformersModel, arch: str) -> dict[str, str]:
    """Parameter of the model by name in a GGUF."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    processor = _processor(model.config, arch)
    full, prefix = tuple(model.state_dict()), f"{model.base_model_prefix}."
    found = get_gguf_hf_weights_map(_Named(model.config, full), processor)
    inner = tuple(name.removeprefix(prefix) for name in full if name.startswith(prefix))
    bare = get_gguf_hf_weights_map(_Named(model.config, inner), processor, qual_name=prefix)
    return {**bare, **found}


def _processor(config: PretrainedConfig, arch: str) -> TensorProcessor:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(arch, TensorProcessor)(config=config.to_dict())


def _given(
    header: GGUFHeader, needed: dict[str, tuple[int, ...]], names: dict[str, str]
) -> dict[str, str]:
    """Parameter that each tensor gives.

    Raises:  WeightsError: a parameter that no tensor gives, or a tensor that gives none.
    """
    given, spelled = {}, {}
    for name in header.tensors:
        key = name if name in names else name.removesuffix(".weight")
        if names.get(key) in needed:
            given[name] = names[key]
            spelled[key] = name
    wanted = {key: parameter for key, parameter in names.items() if parameter in needed}
    missing = [key for key in wanted if key not in spelled]
    missing += [name for name in needed if name not in wanted.values()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise WeightsError(
            f"{header.name} lacks tensor(s) that its model needs: {', '.join(missing[:3])}{more}; "
            "fetch it again, or convert it again."
        )
    known = {FREQUENCIES, "output.weight" if architecture_of(header) in SHARED else FREQUENCIES}
    if over := [name for name in header.tensors if name not in given and name not in known]:
        more = f" and {len(over) - 3} more" if len(over) > 3 else ""
        raise WeightsError(
            f"{header.name} holds tensor(s) that transformers would leave out of its model: "
            f"{', '.join(over[:3])}{more}; use the model's safetensors folder."
        )
    return given


def _require_sizes(conversion: Conversion) -> None:
    """Each parameter as large as the tensors that give it, before one is read."""
    sizes = dict.fromkeys(conversion.needed, 0)
    for name, parameter in (conversion.given or {}).items():
        sizes[parameter] += math.prod(conversion.header.tensors[name].shape)
    for name, shape in conversion.needed.items():
        if sizes[name] != math.prod(shape):
            first = next(n for n, given in (conversion.given or {}).items() if given == name)
            raise _misshapen(
                conversion.header, first, conversion.header.tensors[first].shape, shape
            )


def set_frequencies(header: GGUFHeader, config: PretrainedConfig) -> None:
    """Give the config the scaled positions of a Llama 3.1 or later: a GGUF holds them as a table,
    which transformers does not read. They are taken if Llama 3's rule gives the very table.

    Raises:  WeightsError: a table of another kind.
    """  # noqa: D205
    if FREQUENCIES not in header.tensors:
        return
    table = of_gguf(header).whole(FREQUENCIES).flatten()
    if bool((table == 1).all()):
        return
    plain = getattr(config, "rope_parameters", None) or {}
    theta = plain.get("rope_theta")
    if plain.get("rope_type") == "default" and theta and bool(torch.isfinite(table).all()):
        scaled = {**LLAMA3, "rope_theta": theta, "factor": float(table.max())}
        if _is_table_of(scaled, table, config):
            config.rope_parameters = scaled
            return
    raise WeightsError(
        f"{header.name} scales its positions ({FREQUENCIES}) as no Llama 3 does, and transformers "
        "does not read that from a GGUF; use the model's safetensors folder."
    )


def _is_table_of(scaled: JsonObject, table: Tensor, config: PretrainedConfig) -> bool:
    """Whether the table divides the plain frequencies into those of the scaled rule."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    like = copy.deepcopy(config)
    like.rope_parameters = dict(scaled)
    made, _ = ROPE_INIT_FUNCTIONS["llama3"](like, torch.device("cpu"))
    powers = torch.arange(0, 2 * len(made), 2) / (2 * len(made))
    return made.shape == table.shape and torch.allclose(
        scaled["rope_theta"] ** -powers / made, table, rtol=1e-4, atol=0
    )


def _misshapen(
    header: GGUFHeader, name: str, found: tuple[int, ...], wanted: tuple[int, ...]
) -> WeightsError:
    return WeightsError(
        f"{name} in {header.name} has shape {list(found)}; its fields ask for {list(wanted)}. "
        "Convert it again."
    )


def tensors_of(conversion: Conversion) -> Iterator[tuple[str, Tensor]]:
    """Every needed parameter in float32, in the file's order, one in memory at a time.

    Raises:  WeightsError: a format that cannot be read, or another shape than is needed.
    """
    if conversion.given is None:
        yield from _read_whole(conversion)
        return
    header = conversion.header
    files = of_gguf(header)
    processor = _processor(conversion.model.config, architecture_of(header))
    names = dict(conversion.given)
    names |= {name.removesuffix(".weight"): given for name, given in conversion.given.items()}
    made: dict[str, Tensor] = {}
    waiting = {given: list(conversion.given.values()).count(given) for given in names.values()}
    for name, parameter in conversion.given.items():
        waiting[parameter] -= 1
        with foreign(header):
            done = processor.process(
                weights=files.whole(name).numpy(),
                name=name,
                tensor_key_mapping=names,
                parsed_parameters={"tensors": made},
            )
        if done.name is not None:
            made[parameter] = torch.from_numpy(done.weights)
        if waiting[parameter]:
            continue  # gate and up of all experts share a parameter
        value, wanted = made.pop(parameter), conversion.needed[parameter]
        if tuple(value.shape) != wanted:
            raise _misshapen(header, name, tuple(value.shape), wanted)
        yield parameter, value


def _read_whole(conversion: Conversion) -> Iterator[tuple[str, Tensor]]:
    from transformers import AutoModelForCausalLM

    path = conversion.header.path
    with foreign(conversion.header):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
    model, info = loaded
    require_all_there(info, getattr(model.config, "num_hidden_layers", None), name=path.name)
    state = model.state_dict()
    yield from ((name, state[name]) for name in conversion.needed)


def narrowest(tensor: Tensor) -> Tensor:
    """The same values in 16 bits where that changes none of them, or else as they are."""
    probe = tensor.flatten()[:4096]
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(probe.to(dtype).float(), probe):
            half = tensor.to(dtype)
            if torch.equal(half.float(), tensor):
                return half
    return tensor
