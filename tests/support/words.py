"""Tokenizers of 64 entries for tiny models: of words, and of letters that can write numbers."""

from __future__ import annotations

from pathlib import Path
from string import ascii_letters, digits

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>")


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 to w63 behind pad, BOS and EOS; it puts no BOS before a text."""
    names = [*SPECIAL, *(f"w{i}" for i in range(3, 64))]
    return _made(names, pre_tokenizers.Whitespace(), unknown="w3")


def save(model: PreTrainedModel, folder: Path) -> Path:
    """A model's folder, with a tokenizer that knows a word for each of its ids."""
    model.save_pretrained(folder)
    names = [*SPECIAL, *(f"w{i}" for i in range(3, model.config.vocab_size))]
    _made(names, pre_tokenizers.Whitespace(), unknown="w3").save_pretrained(folder)
    return folder


def letters() -> PreTrainedTokenizerFast:
    """Digits, a blank, a full stop and letters, one a token, behind pad, BOS and EOS."""
    names = [*SPECIAL, *digits, " ", ".", *ascii_letters][:64]
    return _made(names, pre_tokenizers.Split(Regex("."), "isolated"), unknown=".")


def _made(names: list[str], split: object, *, unknown: str) -> PreTrainedTokenizerFast:
    vocabulary = {name: i for i, name in enumerate(names)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    made.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        unk_token=unknown,
    )
