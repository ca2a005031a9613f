"""A planted model in a folder, and rows to train it on."""

from __future__ import annotations

import json

import pytest
import torch
from planted import plant

pytest.importorskip("trl")


@pytest.fixture(scope="session")
def words():
    """A tokenizer that knows all 128 ids of a planted model and puts BOS first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = {{0: "<pad>", 1: "<s>", 2: "</s>"}.get(i, f"w{i}"): i for i in range(128)}
    made = Tokenizer(models.WordLevel(names, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="w3"
    )


@pytest.fixture(scope="session")
def folder(words, tmp_path_factory):
    """A planted Llama; BOS is massive from layer 2 on."""
    made = tmp_path_factory.mktemp("finetuning") / "planted"
    plant("llama", "single", 3).model.save_pretrained(made)
    words.save_pretrained(made)
    return made


@pytest.fixture(scope="session")
def rows_of(tmp_path_factory):
    """Files of random words, of lengths that differ."""

    def write(name, n, seed):
        rng = torch.Generator().manual_seed(seed)

        def draw(low, high):
            count = int(torch.randint(low, high, (), generator=rng))
            ids = torch.randint(6, 128, (count,), generator=rng).tolist()
            return " ".join(f"w{i}" for i in ids)

        path = tmp_path_factory.mktemp("rows") / f"{name}.jsonl"
        rows = [{"prompt": draw(3, 9), "completion": f" {draw(2, 6)}"} for _ in range(n)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="session")
def rows(rows_of):
    return rows_of("train", 12, 0)
