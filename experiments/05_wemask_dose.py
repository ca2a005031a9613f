"""05_wemask_dose: what does the mask do to the loss, by rule, layers, rate and strength?

    python experiments/05_wemask_dose.py --model smollm2-135m
    python experiments/05_wemask_dose.py --model gemma3-270m            # licence accepted
    python experiments/05_wemask_dose.py --data wikitext2/test.txt --n 64

Every rule and choice of layers is held against no edit over all rates, and beside the controls:
the same mask in layers before the massive activation, and random dimensions. Sinks are measured
without the mask and inside it. Started again, it goes on where it stopped. Not timed in full: one
rule and strength over 16 x 128 tokens took SmolLM2 a minute on one CPU core, Gemma five.

Writes runs/05_wemask_dose-<model>/: locate.json, sinks.json, overview.png, and a folder each for
<rule>-<layers>-<strength> with evaluate.json, items.jsonl, sinks.json and figures.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import melens
from melens.batches import Prompts, prompts
from melens.evaluating import Compare, Items, Run
from melens.evaluating.run import evaluate
from melens.figures import save_figure
from melens.figures.evaluation import draw_dose_grid
from melens.figures.sinks import draw_sink_change
from melens.interventions import wemask
from melens.results import Edit, Evaluation, MELayer, Result, Sinks, load_result
from melens.store import write_atomically


@dataclass(frozen=True)
class Config:
    """One run; lists are apart by commas."""

    model: str = "smollm2-135m"
    data: str = ""
    n: int = 32
    length: int = 128
    selects: str = "gamma,activation,product"
    layers: str = "after,next"
    strengths: str = "1,0.5"
    rates: str = "0.05,0.1,0.25,0.5,0.75,0.9"
    seeds: str = "0,1,2"
    seed: int = 0
    out: str = "runs"


def main(cfg: Config) -> list[Evaluation]:
    """Locate, evaluate cell by cell, measure sinks, save, draw."""
    folder = Path(cfg.out) / f"05_wemask_dose-{cfg.model.rstrip('/').rsplit('/', 1)[-1]}"
    model = melens.load(cfg.model, device="cpu")
    texts = prompts("bundled", bos=True, length=cfg.length)
    found = kept(folder / "locate.json", MELayer, lambda: melens.locate(model, texts))
    before = kept(folder / "sinks.json", Sinks, lambda: melens.sinks(model, found, texts))
    made = []
    for strength in map(float, cfg.strengths.split(",")):
        for layers in cfg.layers.split(","):
            for select in cfg.selects.split(","):
                edit = Edit.model_validate(
                    {"select": select, "layers": layers, "strength": strength, "rate": 0.5}
                )
                cell = folder / f"{select}-{layers}-{strength:g}"
                made.append(dose(model, found, edit, cfg, cell))
                after = kept(
                    cell / "sinks.json", Sinks, lambda e=edit: inside(model, found, e, texts)
                )
                save_figure(draw_sink_change(before, after, edit=edit.label), cell / "sinks.png")
    save_figure(draw_dose_grid(made), folder / "overview.png")
    return made


def dose(model: Any, found: MELayer, edit: Edit, cfg: Config, cell: Path) -> Evaluation:
    """Loss over all rates, controls beside it."""
    items = Items(Path(cfg.data) if cfg.data else None, n=cfg.n, length=cfg.length, bos=True)
    compare = Compare(
        rates=tuple(map(float, cfg.rates.split(","))), seeds=tuple(map(int, cfg.seeds.split(",")))
    )
    run = Run(cfg.seed, keep=cell / "items.jsonl")
    result = evaluate(
        model, "perplexity", edit, me_layer=found, items=items, compare=compare, run=run
    )
    write_atomically(cell / "evaluate.json", result.to_json())
    for style in ("dose", "paired"):
        save_figure(result.plot(style), cell / f"{style}.png")
    return result


def inside(model: Any, found: MELayer, edit: Edit, texts: Prompts) -> Sinks:
    """Sinks inside the mask, on the texts that were measured without it."""
    with wemask(
        model,
        found,
        layers=edit.layers,
        rate=edit.rate,
        strength=edit.strength,
        select=edit.select,
    ):
        return melens.sinks(model, found, texts)


def kept(path: Path, kind: type[Result], make: Any) -> Any:
    """What an earlier run saved, else made and saved now."""
    if path.exists() and isinstance(found := load_result(path), kind):
        return found
    made = make()
    write_atomically(path, made.to_json())
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The mask's dose and the loss.")
    for field in fields(Config):
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    main(Config(**vars(parser.parse_args())))
