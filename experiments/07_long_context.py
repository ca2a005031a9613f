"""07_long_context: does a mask help a model to find things in long texts, or to foresee them?

    python experiments/07_long_context.py --model smollm2-135m
    python experiments/07_long_context.py --model gemma3-270m --bos 1 --text book.txt

Passkey and needles over length x depth, then loss by position; a dose below and above, the same
edit in other layers and on random dimensions beside it. Run again after a kill, it goes on. Not
timed in full: 18 passkey items of up to 1,024 tokens took SmolLM2 11 minutes on one CPU core.

Writes runs/07_long_context-<model>/{passkey,needles}/{result.json, items.jsonl, found.png,
answer-loss.png}, and positions.png for the first of them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import melens
from melens.evaluating.haystack import TASKS, Haystack
from melens.evaluating.long_context import long_context
from melens.figures import save_figure
from melens.results import Edit, LongContext
from melens.settings import Run
from melens.store import write_atomically


@dataclass(frozen=True)
class Config:
    """One run."""

    model: str = "smollm2-135m"
    text: str = ""
    """A UTF-8 file; empty = what comes with melens."""
    lengths: str = "256,512,1024"
    depths: str = "0,0.25,0.5,0.75,1"
    seeds: int = 3
    needles: int = 4
    texts: int = 8
    select: str = "gamma"
    rate: float = 0.5
    bos: int = 1
    """1 puts BOS first, 0 leaves it to the tokenizer."""
    seed: int = 0
    out: str = "runs"


def main(cfg: Config) -> tuple[LongContext, ...]:
    """Locate, run both tasks, save."""
    model = melens.load(cfg.model, device="cpu")
    bos = True if cfg.bos else None
    located = melens.locate(model, melens.prompts("bundled", bos=bos), seed=cfg.seed)
    edit = Edit.model_validate({"select": cfg.select, "rate": cfg.rate})
    made = []
    for task in TASKS:
        folder = Path(cfg.out) / f"07_long_context-{cfg.model}" / task
        haystack = Haystack(
            task=task,
            lengths=tuple(int(n) for n in cfg.lengths.split(",")),
            depths=tuple(float(depth) for depth in cfg.depths.split(",")),
            seeds=cfg.seeds,
            needles=cfg.needles,
            text=Path(cfg.text) if cfg.text else None,
            bos=bos,
            seed=cfg.seed,
            plain=cfg.texts if task == TASKS[0] else 0,
        )
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(seed=cfg.seed, keep=folder / "items.jsonl")
        result = long_context(model, edit, me_layer=located, haystack=haystack, run=run)
        write_atomically(folder / "result.json", result.to_json())
        styles = ["found", "answer-loss", *["positions"] * bool(result.texts)]
        for style in styles:
            save_figure(result.plot(style), folder / f"{style}.png")
        made.append(result)
    return tuple(made)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Long context with an edit and without it.")
    for field in fields(Config):
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    main(Config(**vars(parser.parse_args())))
