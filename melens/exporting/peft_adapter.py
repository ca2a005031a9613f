"""The constant prefix as a PEFT adapter: prefix tuning with one virtual token.

Any PEFT program loads it without melens. The first token is then left out of the input. Row of the
embedding: layer by layer the key, then the value, each ``[kv_heads, head_dim]``, flattened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from melens.errors import InterventionError
from melens.exporting.prefix import Prefix

CONFIG, WEIGHTS, ROW = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"


def row_of(prefix: Prefix) -> Float[Tensor, "1 row"]:
    """The embedding of the one virtual token.

    Raises:  InterventionError: layers, or keys and values, of different shapes.
    """
    shapes = {tuple(part.shape) for part in (*prefix.keys, *prefix.values)}
    if len(shapes) != 1:
        raise InterventionError(
            "PEFT's prefix needs keys and values of one shape in all layers, these have "
            f"{', '.join(str(list(shape)) for shape in sorted(shapes))}; use format='prefix'."
        )
    pairs = zip(prefix.keys, prefix.values, strict=True)
    return torch.cat([torch.cat([key.flatten(), value.flatten()]) for key, value in pairs])[None]


def check_like_peft(hf: Any, prefix: Prefix) -> None:
    """Refuse a model of which PEFT would build another shape than the prefix has.

    It takes the head size from the config: ``head_dim``, else ours divided by the heads.

    Raises:  InterventionError: naming both.
    """
    text = hf.config.get_text_config(decoder=True)
    heads, _, width = prefix.keys[0].shape
    expected = (
        getattr(text, "num_key_value_heads", None) or heads,
        getattr(text, "head_dim", None) or width,
    )
    if (heads, width) != expected:
        raise InterventionError(
            f"PEFT expects {expected[0]} x {expected[1]} keys of {type(hf).__name__}, the model "
            f"has {heads} x {width}; use format='prefix'."
        )


def write_adapter(prefix: Prefix, folder: Path, *, base: str, revision: str | None) -> None:
    """adapter_config.json and adapter_model.safetensors."""
    from safetensors.torch import save_file

    heads, _, width = prefix.keys[0].shape
    config = {
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": base, "revision": revision, "num_virtual_tokens": 1,
        "num_layers": len(prefix.keys), "num_attention_heads": heads, "token_dim": heads * width,
        "encoder_hidden_size": heads * width, "num_transformer_submodules": 1,
        "prefix_projection": False,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", "utf-8")
    save_file({ROW: row_of(prefix).contiguous()}, folder / WEIGHTS)
