"""03_super_weights: which single weights make the massive activation, and what is each worth?

    python experiments/03_super_weights.py --model smollm2-135m     # 7 min on two busy CPU cores
    python experiments/03_super_weights.py --model gemma3-270m      # 12 min (licence accepted)

Writes runs/03_super_weights-<model>/{result.json, figure.png}.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import melens
from melens.figures import save_figure
from melens.isolating.super_weight_search import Search, super_weights
from melens.published import with_known
from melens.results.super_weights import SuperWeights
from melens.store import write_atomically


@dataclass(frozen=True)
class Config:
    """One run."""

    model: str = "smollm2-135m"
    n: int = 8
    length: int = 128
    most: int = 10
    seed: int = 0
    out: str = "runs"


def main(cfg: Config) -> SuperWeights:
    """Locate, search, measure, save."""
    model = melens.load(cfg.model, device="cpu")
    texts = melens.prompts("bundled", bos=True, n=cfg.n, length=cfg.length)
    located = melens.locate(model, texts, seed=cfg.seed)
    search = Search(most=cfg.most, seed=cfg.seed)
    result = with_known(super_weights(model, texts, me_layer=located, search=search), cfg.model)
    folder = Path(cfg.out) / f"03_super_weights-{cfg.model}"
    write_atomically(folder / "result.json", result.to_json())
    save_figure(result.plot(), folder / "figure.png")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Super weights and their damage.")
    for field in fields(Config):
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    main(Config(**vars(parser.parse_args())))
