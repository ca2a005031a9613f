"""What is trained: LoRA anywhere or at the ME Layer, every weight, or the sink's key and value."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from melens.errors import InterventionError
from melens.exporting.prefix import check_like_peft, constant_prefix, row_of
from melens.finetuning.settings import Training
from melens.models.decoder import decoder_of, layer_list
from melens.protocols import TransformersModel
from melens.results import MELayer
from melens.results.edit import Edit

if TYPE_CHECKING:
    from peft import PeftModel

    TrainedModel = TransformersModel | PeftModel

EMBEDDING = "embedding.weight"
"""Of a PEFT prompt encoder: what it learns."""


def trainable(
    hf: TransformersModel, how: Training, me_layer: MELayer | None, *, first_token: int | None
) -> TrainedModel:
    """The model as it is trained: itself, or PEFT around it. Nothing but that is trainable.

    Args:    first_token: of method sink, whose key and value the training starts from.
    Raises:  InterventionError: no ME Layer where one is needed, or a model whose keys and values a
             PEFT prefix cannot hold.
    """
    if how.method == "sink":
        return _sink(hf, how, me_layer, first_token)
    if how.method == "full":
        return _unfrozen(hf, how, me_layer)
    from peft import LoraConfig, get_peft_model

    parts = _linear_names(hf, how, me_layer)
    config = LoraConfig(
        r=how.rank,
        lora_alpha=2 * how.rank,
        target_modules=parts,
        modules_to_save=_norm_names(hf, how, me_layer) or None,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(how.seed)  # the adapters are drawn
    return get_peft_model(hf, config)


def parameters_of(model: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


def _unfrozen(hf: TransformersModel, how: Training, me_layer: MELayer | None) -> TransformersModel:
    names = None
    if how.at == "me-layer":
        names = (*_linear_names(hf, how, me_layer), *_norm_names(hf, how, me_layer))
    for name, value in hf.named_parameters():
        value.requires_grad_(names is None or name.rpartition(".")[0] in names)
    return hf


def _sink(
    hf: TransformersModel, how: Training, me_layer: MELayer | None, first_token: int | None
) -> PeftModel:
    from peft import PrefixTuningConfig, get_peft_model

    if first_token is None:
        raise InterventionError(
            "method='sink' replaces the token that every text starts with, and these texts start "
            "with different ones; train in the chat template, or on a model with BOS."
        )
    started = how.mask if how.trains_masked else Edit(name="none")
    prefix = constant_prefix(hf, started, me_layer, first_token)
    check_like_peft(hf, prefix)
    heads, _, width = prefix.keys[0].shape
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=1,
        num_layers=len(prefix.keys),
        num_attention_heads=heads,
        token_dim=heads * width,
        prefix_projection=False,
    )
    made = get_peft_model(hf, config)
    with torch.no_grad():
        made.get_parameter(f"prompt_encoder.default.{EMBEDDING}").copy_(row_of(prefix))
    return made


def _linear_names(hf: TransformersModel, how: Training, me_layer: MELayer | None) -> list[str]:
    """Linear layers of all blocks, or of the ME Layer's FFN, by their whole names."""
    from transformers.pytorch_utils import Conv1D

    where = layer_list(hf) if how.at == "all" else _at_me_layer(hf, me_layer)[0]
    plain = (nn.Linear.forward, Conv1D.forward)  # a router that is a linear layer gives more
    inside = {id(m) for m in where.modules() if getattr(type(m), "forward", None) in plain}
    if how.method == "lora":
        inside -= _past_adapters(hf)
    found = [name for name, module in hf.named_modules() if id(module) in inside]
    if not found:
        raise InterventionError(f"{type(hf).__name__} has no linear layers that could be trained.")
    return found


def _past_adapters(hf: TransformersModel) -> set[int]:
    """Linear layers whose weights a state-space kernel reads past adapters; PEFT refuses them."""
    named = ((type(module).__name__.lower(), module) for module in hf.modules())
    mixers = [module for name, module in named if any(mark in name for mark in STATE_SPACE)]
    return {id(mixer.out_proj) for mixer in mixers if hasattr(mixer, "out_proj")}


STATE_SPACE = ("mamba", "mixer")
"""In the class names of transformers' state-space mixers (MambaMixer, FalconH1Mixer)."""


def _norm_names(hf: TransformersModel, how: Training, me_layer: MELayer | None) -> list[str]:
    """The norm that the ME Layer's FFN reads through, where only that layer is trained."""
    norm = None if how.at == "all" else _at_me_layer(hf, me_layer)[1]
    return [name for name, module in hf.named_modules() if module is norm]


def _at_me_layer(
    hf: TransformersModel, me_layer: MELayer | None
) -> tuple[nn.Module, nn.Module | None]:
    """The ME Layer's FFN, and its norm where it reads through one."""
    at = None if me_layer is None else me_layer.me_layer
    if at is None or at < 0:
        raise InterventionError(
            "at='me-layer' needs a model with a ME Layer inside its blocks; train at='all'."
        )
    decoder = decoder_of(hf)
    if at not in decoder.ffns:
        raise InterventionError(f"no FFN was found in layer {at} of {decoder.name}.")
    return decoder.ffns[at], decoder.ffn_norms.get(at)
