"""What a wave of tune's settings costs, resumed at each one's first layer or run in full.

    python benchmarks/tune.py --items 2 --rates 0.5    # SmolLM2-135M: about half a minute
    python benchmarks/tune.py                          # 8 x 128 tokens, 20 settings

Both ways run the same batch under the same settings, unedited once, and in one process; plain and
resumed runs take turns, so that a machine that warms up or slows down favours neither. Resumed runs
give KL and agreement as well, which plain ones do not. Beside the ratio stands what the blocks
alone would allow: all layers of every setting against those from its first masked one on. The
unembedding is in both, of every position.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from common import seconds

TOLERANCE = 1e-4
"""Nats: float32, the same sums by other paths."""


def settings_of(rates: list[float]) -> list[Any]:
    """The wave, the unedited model first."""
    from melens.evaluating.edits import BASE, EditCondition
    from melens.tuning import Space

    space = Space(rates=rates, strengths=(1.0,))
    edits = [*space.candidates(), *space.controls()]
    return [
        EditCondition("base", "base", BASE),
        *(EditCondition(e.label, "edited", e) for e in edits),
    ]


def plain_losses(model: Any, me_layer: Any, wave: list[Any], ids: torch.Tensor) -> torch.Tensor:
    """Mean loss of every setting, each by a full forward pass under its edit."""
    from melens.evaluating.edits import applied
    from melens.metrics.loss import sequence_loss

    mask, made = torch.ones_like(ids, dtype=torch.bool), []
    with torch.no_grad():
        for condition in wave:
            with applied(model, condition.edit, me_layer):
                logits = model(ids, return_type="logits")
            made.append(sequence_loss(logits, ids, mask).mean())
    return torch.stack(made)


def compare(model: Any, arguments: argparse.Namespace) -> None:
    """Time the wave both ways, and hold the numbers against each other."""
    from melens.evaluating.forced import Forced, Runner
    from melens.locating import locate

    me_layer = locate(model)
    wave = settings_of(arguments.rates)
    rng = torch.Generator().manual_seed(0)
    shape = (arguments.items, arguments.length)
    ids = torch.randint(1000, min(40000, model.cfg.d_vocab), shape, generator=rng)
    scored = (False, *[True] * (arguments.length - 1))
    items = [Forced(str(i), tuple(row), scored, {}) for i, row in enumerate(ids.tolist())]
    runner, made = Runner(model, wave, me_layer), {}

    def resumed() -> None:
        outcome = runner.outcome(items, wave)
        made["resumed"] = torch.tensor(
            [sum(f.loss.mean().item() for f in outcome.found[c.name]) / len(items) for c in wave]
        )

    def plain() -> None:
        made["plain"] = plain_losses(model, me_layer, wave, ids)

    resumed()  # checks once that the model can be resumed; later batches do not
    plain_losses(model, me_layer, wave[:2], ids)
    before, taken, after = seconds(plain), seconds(resumed), seconds(plain)
    again = seconds(resumed)
    miss = (made["plain"] - made["resumed"]).abs().max().item()
    n, whole, short = model.cfg.n_layers, (before + after) / 2, (taken + again) / 2
    left = sum(n - start for start in runner.starts[1:]) + n
    print(
        f"ME Layer {me_layer.me_layer} of {n} (from 0); {len(wave) - 1} settings and the "
        f"unedited model, {shape[0]} x {shape[1]} tokens"
    )
    print(f"  largest difference of a mean loss {miss:.1e} nats")
    print(f"  full passes  {before:7.2f} s and {after:7.2f} s")
    print(f"  resumed      {taken:7.2f} s and {again:7.2f} s   {whole / short:.2f} x faster")
    print(
        f"  blocks {len(wave) * n} against {left}: {len(wave) * n / left:.2f} x fewer, "
        "unembedding aside"
    )
    if miss > TOLERANCE:
        sys.exit(f"the losses differ by more than {TOLERANCE} nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--items", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.25, 0.75])
    arguments = parser.parse_args()
    from melens.models import load

    model = load(arguments.model, device="cpu")
    print(f"{arguments.model}, CPU, {torch.get_num_threads()} threads")
    compare(model, arguments)


if __name__ == "__main__":
    main()
