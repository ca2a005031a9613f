"""A tokenizer of 64 words for tiny models."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 to w63 behind pad, BOS and EOS; it puts no BOS before a text."""
    special = {0: "<pad>", 1: "<s>", 2: "</s>"}
    vocabulary = {special.get(i, f"w{i}"): i for i in range(64)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="w3"
    )
