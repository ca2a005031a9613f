"""Faults that a check must find, planted into tiny models whose massive activation is planted.

The texts are the model's own continuations: whatever an edit takes away then costs loss, as it
does in a trained model.
"""

from __future__ import annotations

import torch
from planted import BOS_ID, HIDDEN, ORDINARY, VOCAB, Planted
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from melens.batches import Batch

CHAT = "{{ bos_token }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
CHAT_WITHOUT_BOS = "w9 {% for m in messages %}{{ m['content'] }}{% endfor %}"


def tokenizer_for(chat: str | None = CHAT) -> PreTrainedTokenizerFast:
    """One word a token; it never puts BOS by itself."""
    special = {0: "<pad>", 1: "<s>", 2: "</s>"}
    words = {special.get(i, f"w{i}"): i for i in range(VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="w3"
    )
    found.chat_template = chat
    return found


@torch.no_grad()
def scale_massive(planted: Planted, factor: float) -> None:
    """The massive coordinate, ``factor`` times as large; nothing else."""
    for layer in planted.truth.layers:
        down = planted.model.model.layers[layer].mlp.down_proj.weight
        neuron = int(down[planted.truth.dim].abs().argmax())
        down[planted.truth.dim, neuron] *= factor


@torch.no_grad()
def add_sink(planted: Planted, size: float) -> None:
    """From the layer after the ME Layer on, every query attends to the massive token.

    The massive token's key has one entry of about ``size`` in every head, in the direction that
    RoPE turns least; every query points there, by a coordinate that all tokens share.
    """
    dim, start = planted.truth.dim, planted.truth.me_layer + 1
    shared = _shared_coordinate(planted)
    sign = _sign(planted)
    for block in planted.model.model.layers[start:]:
        gain, attention = block.input_layernorm.weight, block.self_attn
        width = attention.head_dim
        for matrix, at, value in (
            (attention.k_proj.weight, dim, sign * size / (HIDDEN**0.5 * gain[dim])),
            (attention.q_proj.weight, shared, width**0.5 / (ORDINARY * gain[shared])),
        ):
            for last in range(width - 1, len(matrix), width):
                matrix[last] = matrix[last - width // 2] = 0.0
                matrix[last, at] = value


def _shared_coordinate(planted: Planted) -> int:
    """An embedding coordinate that is the same for every token."""
    table = planted.model.get_input_embeddings().weight
    return int(((table == ORDINARY).all(0)).nonzero()[0])


def _sign(planted: Planted) -> float:
    """Of what the planted neuron writes."""
    row = planted.model.model.layers[planted.truth.layers[-1]].mlp.down_proj.weight
    return float(row[planted.truth.dim].sum().sign())


@torch.no_grad()
def sharpen(model: PreTrainedModel, factor: float) -> None:
    """Logits times ``factor``: a model that is sure of what it says."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * factor)


@torch.no_grad()
def own_texts(model: PreTrainedModel, n: int = 5, length: int = 24, seed: int = 0) -> Batch:
    """Continuations of BOS that the model draws by itself."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.full((n, 1), BOS_ID)
    for _ in range(length - 1):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        logits[:, :3] = -torch.inf
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=rng)
        ids = torch.cat([ids, drawn], dim=1)
    return Batch.of(ids)
