"""Tiny random models of every causal decoder LM that transformers knows.

A name is an architecture's class, or the class and a variant: ``FalconForCausalLM/40b``.
`VARIANTS` and `OVERRIDES` hold what a family needs beside the common sizes; the rest follows from
the config class. FFN weights have one dimension of `INNER`, which no other size equals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import transformers
from family_planting import Planted
from family_planting import plant as plant_neuron
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, HIDDEN, INNER, LAYERS, EXPERTS, LENGTH = 64, 32, 48, 3, 4, 64
HEADS, KV_HEADS, HEAD = 4, 2, 8
EOS = 2
SPREAD = 0.1  # std of matrices, and of gains around their neutral value

_ATTRIBUTES: Mapping[int | str, str] = {
    "vocab": "vocab_size vocab_size_per_layer_input",
    "hidden": "hidden_size d_model n_embd embedding_dim word_embed_proj_dim lru_width"
    " attention_hidden_size hidden_size_per_layer_input",
    "layers": "num_hidden_layers n_layer n_layers num_layers num_blocks",
    "inner": "intermediate_size ffn_dim n_inner dff dim_ff ffn_hidden_size"
    " moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"
    " shared_experts_intermediate_size moe_shared_expert_intermediate_size"
    " expert_ffn_hidden_size dense_intermediate_size intermediate_size_mlp"
    " prefix_dense_intermediate_size feed_forward_size",
    "heads": "num_attention_heads n_head n_heads num_heads attention_heads index_n_heads"
    " swa_num_attention_heads linear_num_key_heads linear_num_value_heads linear_num_heads",
    "kv": "num_key_value_heads num_kv_heads swa_num_key_value_heads",
    "head": "head_dim swa_head_dim d_head dim_head v_head_dim qk_rope_head_dim qk_nope_head_dim"
    " linear_key_head_dim linear_value_head_dim linear_head_dim kv_channels attention_head_dim"
    " attention_head_size mamba_d_head mamba_head_dim mamba_headdim rotary_dim"
    " query_pre_attn_scalar",
    "length": "max_position_embeddings n_positions n_ctx context_length max_seq_len"
    " model_max_length original_max_position_embeddings",
    "experts": "num_experts num_local_experts n_routed_experts moe_num_experts",
    16: "kv_lora_rank q_lora_rank o_lora_rank index_head_dim sliding_window"
    " attention_window_size local_attention sliding_window_size window_size",
    8: "mamba_d_state state_size ssm_state_size mamba_n_heads mamba_num_heads chunk_size"
    " mamba_chunk_size laurel_rank index_topk adapter_rank router_hidden_size",
    4: "mamba_dt_rank time_step_rank block_size",
    2: "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts",
    1: "num_shared_experts n_shared_experts moe_num_shared_experts n_group topk_group"
    " num_expert_group first_k_dense_replace num_dense_layers mamba_n_groups mamba_ngroups"
    " moe_layer_start_index bos_token_id",
    0: "pad_token_id num_nextn_predict_layers",
    "eos": "eos_token_id",
}
_NAMED = {
    "vocab": VOCAB,
    "hidden": HIDDEN,
    "layers": LAYERS,
    "inner": INNER,
    "heads": HEADS,
    "kv": KV_HEADS,
    "head": HEAD,
    "length": LENGTH,
    "experts": EXPERTS,
    "eos": EOS,
}


def _words(text: str) -> list[str]:
    return text.split()


SIZES = {
    attribute: _NAMED[size] if isinstance(size, str) else size
    for size, attributes in _ATTRIBUTES.items()
    for attribute in attributes.split()
}
"""The common sizes; a config gets those that it has a field for."""

_S, _F, _L = "sliding_attention", "full_attention", "linear_attention"
_WINDOWS = {"num_hidden_layers": 4, "layer_types": [_S, _F, _S, _F]}
_LINEAR = {"num_hidden_layers": 4, "layer_types": [_L, _F, _L, _F]}
_ZAMBA = {"num_hidden_layers": 4, "layers_block_type": [_L, "hybrid", _L, "hybrid"]}
_LATENT = {"num_key_value_heads": HEADS}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        _words(
            "AfmoeForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM Exaone4ForCausalLM"
            " ExaoneMoeForCausalLM Gemma3ForCausalLM Kolibri1ForCausalLM MellumForCausalLM"
            " MinistralForCausalLM Olmo3ForCausalLM Gemma4ForCausalLM Gemma4UnifiedForCausalLM"
            " GptOssForCausalLM"
        ),
        _WINDOWS,
    ),
    **dict.fromkeys(
        _words(
            "OlmoHybridForCausalLM Qwen3NextForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM"
            " GraniteMoeHybridForCausalLM MiniMaxForCausalLM"
        ),
        _LINEAR,
    ),
    **dict.fromkeys(
        _words(
            "AXK1ForCausalLM AXK2ForCausalLM DeepseekV2ForCausalLM DeepseekV32ForCausalLM"
            " DeepseekV3ForCausalLM Glm4MoeLiteForCausalLM GlmMoeDsaForCausalLM HYV4ForCausalLM"
            " MiniCPM3ForCausalLM YoutuForCausalLM"
        ),
        _LATENT,
    ),
    "BailingHybridForCausalLM": {**_LINEAR, **_LATENT},
    "KimiLinearForCausalLM": {**_LINEAR, **_LATENT},
    "BambaForCausalLM": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "JambaForCausalLM": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "CohereCompassForCausalLM": {**_WINDOWS, "rope_parameters": {_S: _ROPE, _F: _ROPE}},
    "DbrxForCausalLM": {
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
    "DeepseekV4ForCausalLM": {
        "num_hidden_layers": 4,
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "o_groups": 2,
    },
    "Dots3NoteForCausalLM": {
        **_LATENT,
        "layer_types": ["indexed_attention", _S, "indexed_attention"],
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 2 * HEAD,
        "swa_qk_nope_head_dim": HEAD,
        "swa_v_head_dim": HEAD,
    },
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64},
    "Gemma3nForCausalLM": {**_WINDOWS, "num_kv_shared_layers": 2},
    "GPTNeoForCausalLM": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "HrmTextForCausalLM": {"num_layers_per_stack": 2},
    "Lfm2ForCausalLM": {
        "num_hidden_layers": 4,
        "full_attn_idxs": [1, 3],
        "block_auto_adjust_ff_dim": False,
    },
    "Lfm2MoeForCausalLM": {"num_hidden_layers": 4, "layer_types": ["conv", _F, "conv", _F]},
    "LongcatFlashForCausalLM": {**_LATENT, "zero_expert_num": 2},
    "Mamba2ForCausalLM": {"num_heads": 8, "n_groups": 1},
    "NemotronHForCausalLM": {"num_hidden_layers": 4, "n_groups": 1},
    "RecurrentGemmaForCausalLM": {"intermediate_size": 2 * INNER},
    "xLSTMForCausalLM": {"ffn_proj_factor": 1.5, "ffn_round_up_to_multiple_of": 16},
    "ZambaForCausalLM": {
        **_ZAMBA,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD,
    },
    "Zamba2ForCausalLM": _ZAMBA,
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}
"""Beside the common sizes: both kinds of layers for a hybrid, and what a class insists on."""

VARIANTS: dict[str, dict[str, Any]] = {
    "BloomForCausalLM/post": {"apply_residual_connection_post_layernorm": True},
    "CohereForCausalLM/qk": {"use_qk_norm": True},
    "DeepseekV2ForCausalLM/lite": {"q_lora_rank": None},
    "DogeForCausalLM/moe": {"is_moe": True},
    "FalconForCausalLM/40b": {"new_decoder_architecture": True},
    "FalconForCausalLM/11b": {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    "FalconForCausalLM/rw": {
        "alibi": True,
        "num_kv_heads": HEADS,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "Gemma4ForCausalLM/moe": {"enable_moe_block": True, "moe_intermediate_size": INNER},
    "Gemma4ForCausalLM/shared": {"num_kv_shared_layers": 2},
    "GPTNeoXForCausalLM/nobias": {"attention_bias": False},
    "GPTNeoXForCausalLM/serial": {"use_parallel_residual": False},
    "GraniteForCausalLM/scaled": {
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
    "Llama4ForCausalLM/dense": {"interleave_moe_layer_step": 2, "num_hidden_layers": 4},
    "LlamaForCausalLM/internlm3": {},
    "LlamaForCausalLM/iquestcoder": {},
    "OPTForCausalLM/350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "PhiForCausalLM/qk": {"qk_layernorm": True},
    "Qwen2MoeForCausalLM/mixed": {"mlp_only_layers": [0]},
    "StableLmForCausalLM/parallel": {"use_parallel_residual": True, "qk_layernorm": True},
}
"""Layouts of one class that differ in their modules or in their order."""
CONFIGS = {
    "LlamaForCausalLM/internlm3": "InternLM3Config",
    "LlamaForCausalLM/iquestcoder": "IQuestCoderConfig",
}
"""Variants whose config is not the class's own."""

_LEFT_OUT = {
    "half of an encoder-decoder": "BartForCausalLM BigBirdPegasusForCausalLM BlenderbotForCausalLM"
    " BlenderbotSmallForCausalLM MarianForCausalLM MBartForCausalLM MvpForCausalLM"
    " PegasusForCausalLM PLBartForCausalLM ProphetNetForCausalLM TrOCRForCausalLM"
    " WhisperForCausalLM",
    "an encoder": "BertGenerationDecoder BertLMHeadModel BigBirdForCausalLM CamembertForCausalLM"
    " Data2VecTextForCausalLM ElectraForCausalLM ErnieForCausalLM MegatronBertForCausalLM"
    " RemBertForCausalLM RobertaForCausalLM RobertaPreLayerNormForCausalLM RoCBertForCausalLM"
    " RoFormerForCausalLM XLMRobertaForCausalLM XLMRobertaXLForCausalLM XLMWithLMHeadModel"
    " XmodForCausalLM",
    "predicts in any order": "XLNetLMHeadModel",
    "pictures or audio": "FuyuForCausalLM GitForCausalLM GotOcr2ForConditionalGeneration"
    " Gemma3ForConditionalGeneration Gemma3nForConditionalGeneration"
    " Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration MoshiForCausalLM"
    " MossTranscribeDiarizeForConditionalGeneration MusicgenForCausalLM"
    " MusicgenMelodyForCausalLM Phi4MultimodalForCausalLM",
    "a draft model, which reads another model's states": "Gemma4AssistantForCausalLM"
    " Gemma4UnifiedAssistantForCausalLM",
    "bytes in patches: an encoder and a decoder around the blocks": "BltForCausalLM",
    "hashed attention over fixed lengths, two residual streams": "ReformerModelWithLMHead",
}
LEFT_OUT = {name: reason for reason, names in _LEFT_OUT.items() for name in names.split()}
"""What the mapping lists beside plain decoders, and why it is left out."""


def _fields(config_class: type[PretrainedConfig]) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def shrunk(config_class: type[PretrainedConfig], **overrides: Any) -> PretrainedConfig:
    """A config of the common sizes, as far as the class has them, and the overrides."""
    names = _fields(config_class)
    sizes = {name: size for name, size in SIZES.items() if name in names}
    return config_class(**{**sizes, **overrides})


def family(name: str) -> type[PreTrainedModel]:
    """The class of an architecture or of a variant."""
    return getattr(transformers, name.partition("/")[0])


def config(name: str) -> PretrainedConfig:
    """The tiny config of a name in `TINY`."""
    overrides = {**OVERRIDES.get(name.partition("/")[0], {}), **VARIANTS.get(name, {})}
    own = getattr(transformers, CONFIGS[name]) if name in CONFIGS else family(name).config_class
    return shrunk(own, **overrides)


TINY: dict[str, Callable[[], PretrainedConfig]] = {
    name: partial(config, name)
    for name in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *VARIANTS} - {*LEFT_OUT})
}
"""Architecture or variant -> its tiny config."""


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in eval mode; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family(name)._from_config(
            TINY[name](), attn_implementation="eager", dtype=torch.float32
        )
        randomise(model)
    return model.float().eval()


WIDE = 4 * HIDDEN
WIDTHS = dict.fromkeys(
    _words("BloomForCausalLM GPTNeoXJapaneseForCausalLM MptForCausalLM OpenAIGPTLMHeadModel"), WIDE
)
"""FFN width of the classes that allow no other than four times the hidden size."""
_NO_PLANT = {
    "no FFN": "FalconMambaForCausalLM Mamba2ForCausalLM MambaForCausalLM",
    "several residual streams": "DeepseekV4ForCausalLM Gemma3nForCausalLM HYV4ForCausalLM"
    " Qwen4ExpForCausalLM",
    "the block ends in a norm, which bounds its output": "OPTForCausalLM/350m OpenAIGPTLMHeadModel",
    "the FFN feeds the mixer after it, and not the residual stream": "ZambaForCausalLM"
    " Zamba2ForCausalLM",
    "a convolution after the FFN spreads it over the next tokens": "InklingForCausalLM"
    " Inkling2ForCausalLM",
    "the blocks run several times a pass": "HrmTextForCausalLM",
    "prompt tokens of its own stand first": "CpmAntForCausalLM",
}
NO_PLANT = {name: reason for reason, names in _NO_PLANT.items() for name in names.split()}
"""Families in which one FFN neuron cannot make one token massive, and why."""


def plant(model: PreTrainedModel, layer: int, dimension: int, *, size: float = 3000.0) -> Planted:
    """:func:`family_planting.plant` at the family's own FFN width."""
    width = WIDTHS.get(type(model).__name__, INNER)
    return plant_neuron(model, layer, dimension, size=size, inner=width)


KEPT = ("A_log", "dt_bias", "rope", "inv_freq", "lambda", "time_decay", "recurrent_param")
"""Parameters of a recurrence that random values would make explode."""


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Matrices become noise; gains and biases are moved around their initial value."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in KEPT):
            continue
        noise = torch.randn_like(parameter) * SPREAD
        parameter.copy_(noise + parameter if _is_gain(parameter) else noise)


def _is_gain(parameter: Tensor) -> bool:
    """Whether a parameter is a vector, or a matrix of ones (a norm per head)."""
    return parameter.squeeze().ndim < 2 or bool((parameter == 1).all())
