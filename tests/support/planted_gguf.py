"""Whole tiny GGUF files, written as llama.cpp's converter would, and their parts."""

from __future__ import annotations

import numpy as np

SPECIAL = ["<pad>", "<s>", "</s>"]
LETTERS = [chr(i) for i in range(ord("!"), ord("!") + 60)]
ARCH = {
    "llama": "llama",
    "qwen2": "qwen2",
    "gemma3": "gemma3",
    "gpt2": "gpt2",
    "phi3": "phi3",
    "qwen3-moe": "qwen3moe",
}


def fields_of(config, arch):
    """Field by name, without ``general.`` and the vocabulary's."""
    get = config.to_dict().get
    n_heads = get("num_attention_heads") or get("n_head")
    fields = {
        "block_count": get("num_hidden_layers") or get("n_layer"),
        "context_length": get("max_position_embeddings") or get("n_positions"),
        "embedding_length": get("hidden_size") or get("n_embd"),
        "feed_forward_length": get("intermediate_size") or 4 * (get("n_embd") or 0),
        "attention.head_count": n_heads,
        "attention.head_count_kv": get("num_key_value_heads") or n_heads,
    }
    if arch == "gpt2":
        fields["attention.layer_norm_epsilon"] = float(get("layer_norm_epsilon"))
    else:
        fields["attention.layer_norm_rms_epsilon"] = float(get("rms_norm_eps") or get("norm_eps"))
        fields["rope.freq_base"] = 10000.0
    if get("head_dim"):
        fields["attention.key_length"] = fields["attention.value_length"] = get("head_dim")
    if arch == "llama":
        fields["rope.dimension_count"] = fields["embedding_length"] // n_heads
        fields["vocab_size"] = get("vocab_size")
    if arch == "gemma3":
        fields["attention.sliding_window"] = get("sliding_window")
    if arch == "qwen3moe":
        fields["expert_count"] = get("num_experts") or get("num_local_experts")
        fields["expert_used_count"] = get("num_experts_per_tok")
    return fields


def tensors_of(hf, arch):
    """Name -> float32 array, by the gguf package's own table of names."""
    import gguf

    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(number, hf.config.num_hidden_layers)
    heads = hf.config.num_attention_heads
    groups = getattr(hf.config, "num_key_value_heads", heads)
    made = {}
    for name, value in hf.state_dict().items():
        if name == "lm_head.weight" and hf.config.tie_word_embeddings:
            continue
        data = value.detach().float().numpy()
        if "experts.gate_up_proj" in name:
            layer, half = name.split(".")[2], data.shape[1] // 2
            made[f"blk.{layer}.ffn_gate_exps.weight"] = data[:, :half]
            made[f"blk.{layer}.ffn_up_exps.weight"] = data[:, half:]
            continue
        stem, dot, end = name.rpartition(".")
        if end not in ("weight", "bias"):
            stem, dot, end = name, ".", "weight"
        found = table.get_name(stem)
        assert found, name
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            n = heads if "q_proj" in name else groups
            data = data.reshape(n, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        if arch == "gpt2" and end == "weight" and (".c_" in name):
            data = data.T
        if arch == "gemma3" and "norm" in name:
            data = data + 1
        made[found + dot + end] = data
    return made


def write(path, arch, fields, tensors, *, kinds=None, vocabulary=True, extra=None):
    """A GGUF file.

    Args:    kinds: format by tensor name; F32 where left out.
             extra: further fields by their whole name.
    """
    import gguf

    kind_of = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**{f"{arch}.{k}": v for k, v in fields.items()}, **(extra or {})}.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif key.startswith("split.") and key != "split.tensors.count":
            writer.add_uint16(key, value)
        else:
            writer.add_uint32(key, value)
    if vocabulary:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([*SPECIAL, *LETTERS, "AB"])
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(LETTERS) + 1))
        writer.add_token_merges(["A B"])
        for name, number in (("bos", 1), ("eos", 2), ("padding", 0)):
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, data in tensors.items():
        kind = kind_of[(kinds or {}).get(name, "F32")]
        packed = gguf.quants.quantize(np.ascontiguousarray(data, dtype=np.float32), kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_split(folder, arch, fields, tensors, *, parts=3, first_empty=False):
    """The parts of a split GGUF: fields in the first, tensors in turn."""
    names, made = list(tensors), []
    groups = [names[n::parts] for n in range(parts)]
    if first_empty:
        groups = [[], *(names[n :: parts - 1] for n in range(parts - 1))]
    for n in range(parts):
        extra = {"split.no": n, "split.count": parts, "split.tensors.count": len(names)}
        made.append(
            write(
                folder / f"m-{n + 1:05}-of-{parts:05}.gguf",
                arch,
                fields if n == 0 else {},
                {name: tensors[name] for name in groups[n]},
                vocabulary=n == 0,
                extra=extra,
            )
        )
    return made
