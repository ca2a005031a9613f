"""What the mask and the looks cost in training: a step with and without, and memory.

    python benchmarks/finetune.py               # SmolLM2-135M, LoRA, 4 x 128 tokens

A step is forward, backward and the optimiser's, on one fixed batch. All times are taken in one run,
in pairs, in another order each round; a ratio is the median over rounds. A look's share is its
seconds over those of the steps between two looks (20, the default). Memory is the peak of fresh
processes. Run it on an idle machine: a step is all matrix products, a look is many small ones.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from common import print_added_megabytes, seconds

KINDS = ("plain", "again", "mask")


def prepare(arguments: argparse.Namespace) -> tuple[dict[str, Callable[[], object]], Any, Any]:
    """A step of each kind on one model; the model and its tokenizer."""
    import torch

    import melens
    from melens.finetuning import Training
    from melens.finetuning.adapters import trainable
    from melens.finetuning.run import masked
    from melens.models.loading import adopt, load_plain
    from melens.models.view import view_of
    from melens.results import Edit

    hf, tokenizer, _ = load_plain(arguments.model, device="cpu")
    texts = melens.prompts(n=arguments.n, length=arguments.length)
    rows = [list(ids) for ids in texts.token_rows(tokenizer)]
    located = melens.locate(adopt(view_of(hf), tokenizer=tokenizer), rows[:4])
    how = Training(mask=Edit(name="wemask", rate=0.5))
    model = trainable(hf, how, None, first_token=None).train()
    ids = torch.tensor([row[: arguments.length] for row in rows])
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    def of(kind: str) -> Callable[[], object]:
        def run() -> None:
            with masked(model, how, located) if kind == "mask" else nullcontext():
                step()

        return run

    return {kind: of(kind) for kind in KINDS}, model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--alone", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    steps, model, tokenizer = prepare(arguments)
    if arguments.alone:
        print_added_megabytes(steps[arguments.alone])
        return
    steps["plain"]()
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    order = random.Random(0)
    for _ in range(arguments.repeats):
        for kind in order.sample(KINDS, len(KINDS)):
            times[kind].append(seconds(steps[kind]))
    print(f"{arguments.model}, LoRA, {arguments.n} x {arguments.length} tokens, CPU")
    for kind in KINDS:
        ratios = [a / b for a, b in zip(times[kind], times["plain"], strict=True)]
        took = statistics.median(times[kind])
        print(f"a step, {kind:5} {took:6.2f} s  {statistics.median(ratios):5.3f} x plain")
    _looks(model, tokenizer, statistics.median(times["plain"]))
    if not arguments.no_memory:
        peaks = {kind: _peak(kind, arguments) for kind in ("plain", "mask")}
        ratio = peaks["mask"] / peaks["plain"]
        print(f"peak memory of a step: {peaks['plain']:,.0f} MB, with the mask {ratio:.3f} x")


def _looks(model: Any, tokenizer: Any, step: float) -> None:
    from melens.finetuning import EmergenceCallback
    from melens.finetuning.callback import EVERY, SHARE

    callback = EmergenceCallback(tokenizer)
    callback.look(model, 0)
    took = callback.look(model, 1).seconds
    print(
        f"a look {took:.2f} s, {took / (EVERY * step):.1%} of {EVERY} steps; where that is over "
        f"{SHARE:.0%}, looks wait"
    )


def _peak(kind: str, arguments: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--alone", kind, "--model", arguments.model]
    command += ["--n", str(arguments.n), "--length", str(arguments.length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
