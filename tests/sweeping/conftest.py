"""Tiny models in folders, each with a planted massive token."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer):
    """Two families' model folders; BOS becomes massive at layer 3 of each."""
    from planted import plant

    made = {}
    for seed, family in enumerate(("llama", "qwen3")):
        made[family] = tmp_path_factory.mktemp("models") / family
        plant(family, "single", seed).model.save_pretrained(made[family])
        tokenizer.save_pretrained(made[family])
    return made


@pytest.fixture
def config(folders):
    """Three cells, as a TOML file would say them."""
    return {
        "model": str(folders["llama"]),
        "run": [
            {"command": "locate", "seed": [0, 1], "n-seq": 2, "length": 16, "bos": True},
            {"command": "scan", "reach": False},
        ],
    }
