"""A checkpoint compared with its config before anything is built."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from melens.errors import MelensError, ModelError, WeightsError
from melens.models.complaints import MANY, what_to_do, with_setting
from melens.protocols import JsonObject, PretrainedConfig, TransformersModel

COUNTS = re.compile(r"layer|expert|block|label|depth")
"""Settings that a config or a model's constructor may loop over."""
WIDTHS = re.compile(r"size|dim|vocab|width|capacity")
"""Those of them that are sides of a tensor: no loop, and compared with the shapes later."""
FEWEST = 512
"""Such a count is never refused: it costs nothing, whatever the files hold."""
LONGEST = 1 << 20
"""As above, of a number inside a list."""
ROOM = 1 << 30
"""Bytes of tables (masks, rotary angles) that a model may compute without having stored any."""
OLD = re.compile(r"\.attn(\.attention)?\.(masked_bias|bias|causal_mask)$|rotary_emb\.inv_freq$")
"""Masks and angles that older versions of transformers saved, and that today's compute."""
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "head_dim",
    "num_key_value_heads",
    "n_embd",
    "n_layer",
    "n_layers",
    "n_head",
    "n_heads",
    "num_layers",
    "num_heads",
    "d_model",
    "n_positions",
    "max_position_embeddings",
)
UNLIMITED = re.compile(r"limit|max|range")
"""Settings that may be infinite."""

Shapes = Mapping[str, tuple[int, ...]]


def require_sound_numbers(config: JsonObject, *, name: str) -> None:
    """Refuse sizes that are no whole number above 0, and numbers that are none.

    Raises:  ModelError: naming the setting.
    """
    for key, value in config.items():
        if key in SIZES and not _is_size(value):
            wanted = "a whole number, 1 or more"
        elif key.endswith(("_eps", "_epsilon")) and not _is_positive(value):
            wanted = "a number, 0 or more"
        else:
            continue
        raise ModelError(f"{name}: config.json says {key} = {value!r:.60}; it must be {wanted}.")
    for key, value, _ in _numbers(config):
        endless = isinstance(value, float) and not math.isfinite(value)
        if endless and (math.isnan(value) or not UNLIMITED.search(key)):
            raise ModelError(f"{name}: config.json says {key} = {value}; give a number.")


def require_bounded(config: JsonObject, shapes: Shapes, *, name: str) -> None:
    """Refuse counts that the files cannot hold, before a constructor loops over them.

    Raises:  ModelError: naming the setting, its value and the bound.
    """
    stacked = [shape[0] for shape in shapes.values() if len(shape) > 2]  # experts in one tensor
    most = max([FEWEST, len(shapes), *stacked])
    for key, value, listed in _numbers(config):
        bound = LONGEST if listed else most
        counted = COUNTS.search(key) and not WIDTHS.search(key)
        if math.isinf(value) and UNLIMITED.search(key):  # a limit that is none (Mamba's time steps)
            continue
        if (listed or counted) and abs(value) > bound:
            raise ModelError(
                f"{name}: config.json says {key} = {value:.6g}; the files hold {len(shapes)} "
                f"tensors, so at most {bound} make sense."
            )


def require_loadable(config: JsonObject, shapes: Shapes, *, name: str) -> None:
    """Refuse a checkpoint that its config's model does not use as it is.

    A quantised one is left to its own loader, as is one that brings its own code.

    Raises:  ModelError: a config that does not make a model. WeightsError: tensors that are
             missing, not used, or of another shape.
    """
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if config.get("quantization_config") or kind not in CONFIG_MAPPING:
        return
    made, info = _dry_load(config, shapes, name)
    require_all_there(info, getattr(made, "num_hidden_layers", None), name=name)
    for key, found, wanted in sorted(info["mismatched_keys"]):
        raise WeightsError(
            f"{key} in {name} has shape {list(found)}; the config asks for {list(wanted)}."
        )


def require_all_there(
    info: Mapping[str, Iterable[str]], n_layers: object, *, name: object, quantised: bool = False
) -> None:
    """Refuse a checkpoint that transformers would fill up with random values, or use in part.

    Args:    info: transformers' loading info. n_layers: the config's number, as far as it has one.
             quantised: a quantised loader leaves over scales and biases that it has no use for.
    Raises:  WeightsError: naming the first tensor, or the layers.
    """
    unused = [key for key in info["unexpected_keys"] if not OLD.search(key)]
    if missing := sorted(info["missing_keys"]):
        raise WeightsError(
            f"{name} lacks {len(missing)} tensor(s) of its model, first {missing[0]}; "
            f"{what_to_do(unused)}"
        )
    _require_all_used(unused, n_layers, name=name, quantised=quantised)


def _range(layers: list[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"


def _require_all_used(
    unused: Iterable[str], n_layers: object, *, name: object, quantised: bool
) -> None:
    """Refuse weights that the model does not use: it is not the one that they were trained as.

    What transformers itself ignores (further heads), and old masks, are not among them.

    Args:    n_layers: the config's number, as far as it has one.
    Raises:  WeightsError: naming the layers, or the first tensor.
    """
    found = sorted(unused)
    if not found:
        return
    layers = {int(at[1]) for at in map(LAYER.search, found) if at}
    count = n_layers if isinstance(n_layers, int) else math.inf
    if beyond := sorted(layer for layer in layers if layer >= count):
        raise WeightsError(
            f"{name} holds weights of {_range(beyond)}, and its config.json has "
            f"{count} layers (0 to {count - 1}); set that number right, or remove them."
        )
    if quantised:
        return
    raise WeightsError(
        f"{name} holds {len(found)} tensor(s) that the model of its config.json does not use, "
        f"first {found[0]}; export the language model alone, or give the config that they "
        "belong to."
    )


def _dry_load(config: JsonObject, shapes: Shapes, name: str) -> tuple[PretrainedConfig, JsonObject]:
    """The config as transformers has it, and what it says of a loading without values."""
    try:
        return _attempt(config, shapes, name)
    except MelensError:
        raise
    except Exception as error:  # constructors raise whatever a senseless setting leads them to
        settings = config if len(shapes) <= MANY else {}
        said = with_setting(error, settings, lambda other: _attempt(other, shapes, name))
        raise ModelError(
            f"{name}: its config.json does not make a model ({said[:300]}); mend it, or fetch it "
            "again."
        ) from None


def _attempt(config: JsonObject, shapes: Shapes, name: str) -> tuple[PretrainedConfig, JsonObject]:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(made)]
        with torch.device("meta"):
            built = kind(copy.deepcopy(made))
        _require_small_tables(built, shapes, name)
        _, info = kind.from_pretrained(
            None,
            config=made,
            state_dict={key: torch.empty(s, device="meta") for key, s in shapes.items()},
            device_map="meta",
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    return made, info


def _require_small_tables(model: TransformersModel, shapes: Shapes, name: str) -> None:
    """Refuse lengths that no tensor holds, of which a model computes masks and angles.

    Raises:  ModelError: tables of more than a gigabyte and many times what is stored.
    """
    tables = sum(table.numel() * table.element_size() for table in model.buffers())
    stored = sum(math.prod(shape) for shape in shapes.values())
    if tables > ROOM + 16 * stored:
        raise ModelError(
            f"{name}: its config.json asks for {tables / 1e9:,.0f} GB of computed tables beside "
            f"{stored:,} stored values; look at its lengths and rotary settings."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report of transformers': nothing is loaded, and melens says it."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _numbers(config: JsonObject) -> Iterator[tuple[str, int | float, bool]]:
    """Every number of a config: the setting that it belongs to, its value, whether in a list."""
    waiting: list[tuple[str, object, bool]] = [("", config, False)]
    while waiting:
        key, value, listed = waiting.pop()
        if isinstance(value, dict):
            waiting += [(str(inner), item, listed) for inner, item in value.items()]
        elif isinstance(value, list):
            waiting += [(key, item, True) for item in value]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, value, listed


def _is_size(value: object) -> bool:
    """Lists (a size a layer) are left to the model's own check."""
    return value is None or isinstance(value, list) or (type(value) is int and value >= 1)


def _is_positive(value: object) -> bool:
    return value is None or (
        isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
    )
