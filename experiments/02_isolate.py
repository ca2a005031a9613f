"""02_isolate: norm, FFN, or both? Which parameters make the massive activation?

    python experiments/02_isolate.py                       # SmolLM2-135M, about 2 minutes
    python experiments/02_isolate.py --n 2 --length 32     # half a minute
    python experiments/02_isolate.py --model gemma3-270m   # licence accepted; about 6 minutes

Times are of two CPU cores. Writes runs/02_isolate-<model>/: both JSON, a figure a style.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import melens
from melens.figures import FIGURES, save_figure
from melens.results import Isolation
from melens.store import write_atomically


@dataclass(frozen=True)
class Config:
    """One run."""

    model: str = "smollm2-135m"
    n: int = 8
    length: int = 128
    layer: int = -1
    """Layer to edit, from 0; -1 = the ME Layer."""
    ffn_edit: str = "neurons"


def main(cfg: Config) -> Isolation:
    """Locate, isolate, save."""
    model = melens.load(cfg.model)
    texts = melens.prompts(n=cfg.n, length=cfg.length, bos=True)
    located = melens.locate(model, texts)
    result = melens.isolate(
        model, located, texts, layer=None if cfg.layer < 0 else cfg.layer, ffn_edit=cfg.ffn_edit
    )
    folder = Path("runs") / f"02_isolate-{cfg.model}"
    write_atomically(folder / "locate.json", located.to_json())
    write_atomically(folder / "isolate.json", result.to_json())
    for style in FIGURES[Isolation]:
        save_figure(result.plot(style), folder / f"{style}.png")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for field in fields(Config):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default
        )
    main(Config(**vars(parser.parse_args())))
