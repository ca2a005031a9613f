"""06_evaluate: does the mask help on mathematics, instructions and refusals?

    python experiments/06_evaluate.py --data DATA --model smollm2-135m
    python experiments/06_evaluate.py --data DATA --model gemma3-270m    # licence accepted
    python experiments/06_evaluate.py --data DATA --tasks gsm8k-likelihood,xstest --generated 50

DATA holds gsm8k/test.jsonl, math500/test.jsonl, ifeval/input_data.jsonl and
xstest/xstest_prompts.csv. The first ``--given`` items of the tasks whose answer is given, and the
first ``--generated`` of those whose answer is generated (lm-eval; pip install 'melens[eval]'), so
what is reported is of a stated subset. Started again, it goes on where it stopped. Not timed in
full: SmolLM2 took 2.5 minutes for 32 GSM8K solutions and 5 for 16 IFEval answers on one CPU core.

Writes runs/06_evaluate-<model>/: locate.json, and a folder a task with evaluate.json, items.jsonl
and figures.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import melens
from melens.batches import prompts
from melens.evaluating import Compare, Items, Run
from melens.evaluating.harness.data import GENERATION_TASKS
from melens.evaluating.run import evaluate
from melens.evaluating.sources import check_source
from melens.figures import save_figure
from melens.results import Edit, Evaluation, MELayer, load_result
from melens.store import write_atomically


@dataclass(frozen=True)
class Config:
    """One run; lists are apart by commas."""

    data: str = "data"
    model: str = "smollm2-135m"
    tasks: str = "gsm8k-likelihood,math500-likelihood,xstest,ifeval,gsm8k,math500"
    given: int = 100
    generated: int = 20
    max_new_tokens: int = 256
    batch_size: int = 4
    select: str = "gamma"
    layers: str = "after"
    rate: float = 0.5
    rates: str = "0.25,0.75"
    seeds: str = "0"
    seed: int = 0
    out: str = "runs"


def main(cfg: Config) -> list[Evaluation]:
    """Refuse what cannot run, locate, evaluate task by task, save, draw."""
    tasks = cfg.tasks.split(",")
    sources = {task: source_of(task, cfg) for task in tasks}
    for task, source in sources.items():
        check_source(task, source)
    folder = Path(cfg.out) / f"06_evaluate-{cfg.model.rstrip('/').rsplit('/', 1)[-1]}"
    model = melens.load(cfg.model, device="cpu")
    path = folder / "locate.json"
    found = load_result(path) if path.exists() else None
    if not isinstance(found, MELayer):
        found = melens.locate(model, prompts("bundled", bos=True))
        write_atomically(path, found.to_json())
    edit = Edit.model_validate({"select": cfg.select, "layers": cfg.layers, "rate": cfg.rate})
    compare = Compare(
        rates=tuple(map(float, cfg.rates.split(","))), seeds=tuple(map(int, cfg.seeds.split(",")))
    )
    made = []
    for task, source in sources.items():
        run = Run(
            cfg.seed,
            batch_size=cfg.batch_size,
            keep=folder / task / "items.jsonl",
            max_new_tokens=cfg.max_new_tokens if task in GENERATION_TASKS else None,
        )
        result = evaluate(model, task, edit, me_layer=found, items=source, compare=compare, run=run)
        write_atomically(folder / task / "evaluate.json", result.to_json())
        for style in ("dose", "paired"):
            save_figure(result.plot(style), folder / task / f"{style}.png")
        made.append(result)
    return made


def source_of(task: str, cfg: Config) -> Items:
    """Where a task's items come from, and how many."""
    return Items(Path(cfg.data), n=cfg.generated if task in GENERATION_TASKS else cfg.given)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tasks with the mask and without it.")
    for field in fields(Config):
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    main(Config(**vars(parser.parse_args())))
