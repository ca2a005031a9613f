"""Multimodal checkpoints: the language model inside, alone, with the whole model's numbers."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from words import tokenizer

from melens.batches import Batch
from melens.errors import ModelError
from melens.locating import locate
from melens.models import load
from melens.models.multimodal import WHOLE, language_config, own_name
from melens.streaming.streamed import load_streamed

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SEEN = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 14, "intermediate_size": 48}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
PLACES = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62}
CONFIGS = {
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=TEXT,
        vision_config={**SEEN, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    ),
    "mistral3": lambda: transformers.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral"},
        vision_config={**SEEN, "model_type": "pixtral"},
        image_token_index=60,
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": SECTIONS},
        vision_config={**QWEN, "out_hidden_size": 32},
        **PLACES,
    ),
    "qwen3_vl": lambda: transformers.Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": SECTIONS},
        vision_config={**QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **PLACES,
    ),
}
GONE = "layers.1.self_attn.o_proj.weight"
IDS = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=list(CONFIGS))
def saved(request, tmp_path_factory):
    """A whole model's folder, and its logits of a text."""
    torch.manual_seed(0)
    whole = transformers.AutoModelForImageTextToText.from_config(CONFIGS[request.param]()).eval()
    folder = tmp_path_factory.mktemp(request.param)
    whole.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    with torch.no_grad():
        return folder, whole(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def test_the_language_model_is_loaded_alone_and_says_so(saved, capsys):
    folder, logits = saved
    bridge = load(folder)
    torch.testing.assert_close(bridge(IDS, use_cache=False), logits, rtol=1e-4, atol=1e-5)
    assert not any("vision" in name for name, _ in bridge.original_model.named_parameters())
    assert "its language model" in capsys.readouterr().err


def test_streamed_it_is_the_same_model(saved):
    folder, _ = saved
    whole, streamed = load(folder), load_streamed(folder)
    assert locate(whole, [Batch.of(IDS)]).profile == locate(streamed, [Batch.of(IDS)]).profile


def test_a_missing_tensor_of_the_language_model_is_missed(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    from melens.errors import WeightsError

    folder, _ = saved
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if name.endswith(GONE))
    del tensors[gone]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=re.escape(GONE)):
        load(tmp_path)


def test_without_a_class_of_its_own_it_is_refused(tmp_path):
    config = {
        "model_type": "glm4v",
        "architectures": ["Glm4vForConditionalGeneration"],
        "text_config": {"model_type": "glm4v_text"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no class for its language model alone"):
        load(tmp_path)


def test_an_older_file_keeps_the_language_models_numbers_outside():
    """As Qwen2.5-VL was published: no inner config, and RoPE of the type "mrope"."""
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    flat = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": 2048,
        "rope_scaling": rope,
        "vision_config": {"hidden_size": 1280},
    }
    found = language_config(flat)
    assert (found["model_type"], found["hidden_size"]) == ("qwen2", 2048)
    assert found["rope_scaling"] == {"type": "default"}
    assert "vision_config" not in found
    assert found[WHOLE] == "Qwen2_5_VLForConditionalGeneration"


def test_names_and_configs():
    assert own_name("language_model.model.layers.0.mlp.up_proj.weight") == (
        "model.layers.0.mlp.up_proj.weight"
    )
    assert own_name("model.language_model.norm.weight") == "model.norm.weight"
    assert own_name("vision_tower.layers.0.weight") is None
    assert own_name("model.visual.blocks.0.attn.qkv.weight") is None
    plain = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert language_config(plain) == plain
    limits = {**plain, "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert language_config(limits)["time_step_limit"] == [0.0, float("inf")]
    inner = language_config(
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {"model_type": "gemma3_text"},
        }
    )
    assert inner["architectures"] == ["Gemma3ForCausalLM"]
    assert inner[WHOLE] == "Gemma3ForConditionalGeneration"
    assert inner["tie_word_embeddings"] is True  # the class's own default
