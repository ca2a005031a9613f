"""What measuring costs: describe + collapse + sinks against a bare forward pass, same tokens.

    python benchmarks/measure.py                # SmolLM2-135M, 8 x 128 tokens (the default texts)

Times are medians of alternating runs in one process; the ME Layer is located beforehand. Memory is
what a fresh process adds at its peak to the loaded and warmed-up model, for 8 and for more
sequences: it must not grow with them (Linux: the high-water mark is reset before the task).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

from common import peak_megabytes, print_added_megabytes, seconds

TASKS = ("forward", "describe", "collapse", "sinks", "together")


def prepare(model: str, n: int, length: int) -> dict[str, Callable[[], object]]:
    """The tasks, on one loaded model and the same tokens in batches of at most 8 rows."""
    import torch

    import melens
    from melens.batches import Batch
    from melens.locating import locate
    from melens.measuring import collapse, describe, measure_all, sinks
    from melens.models import load

    bridge = load(model, device="cpu")
    rows = melens.prompts(n=n, length=length).token_rows(bridge.tokenizer)
    row = [token for piece in rows for token in piece]
    row = (row * (n * length // len(row) + 1))[: n * length]
    ids = torch.tensor(row).reshape(n, length)
    batches = [Batch.of(part) for part in ids.split(8)]
    located = locate(bridge, batches)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                bridge(batch.ids)

    return {
        "forward": forward,
        "describe": lambda: describe(bridge, located, batches),
        "collapse": lambda: collapse(bridge, located, batches),
        "sinks": lambda: sinks(bridge, located, batches),
        "together": lambda: measure_all(bridge, located, batches),
    }


def measure_alone(arguments: argparse.Namespace) -> None:
    tasks = prepare(arguments.model, arguments.n, arguments.length)
    print_added_megabytes(tasks[arguments.alone])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="Times only.")
    parser.add_argument("--alone", choices=TASKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        measure_alone(arguments)
        return
    tasks = prepare(arguments.model, arguments.n, arguments.length)
    tasks["together"]()
    times: dict[str, list[float]] = {task: [] for task in TASKS}
    for _ in range(arguments.repeats):
        for task in TASKS:
            times[task].append(seconds(tasks[task]))
    base = statistics.median(times["forward"])
    print(f"{arguments.model}, {arguments.n} x {arguments.length} tokens, CPU, eager attention")
    for task in TASKS:
        taken = statistics.median(times[task])
        print(f"{task:10} {taken:6.2f} s  {taken / base:5.2f} x")
    if arguments.no_memory:
        return
    for n in (arguments.n, 4 * arguments.n):
        added = peak_megabytes(__file__, "together", arguments, n)
        print(f"together, {n} sequences: +{added:.0f} MB at its peak")


if __name__ == "__main__":
    main()
