"""What locating costs: a ratio to a bare forward pass on the same tokens, and added memory.

    python benchmarks/locate.py                 # SmolLM2-135M, 4 x 512 tokens
    python benchmarks/locate.py --busy 1        # while another process keeps one core busy

All times are taken in one run, alternating. Memory is what a fresh process adds, at its peak, to
the loaded and warmed-up model (Linux: the high-water mark is reset before the task).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from common import peak_megabytes, print_added_megabytes, seconds

NAMES = {
    "forward": "bare forward (bridge, logits)",
    "body": "bare forward without logits",
    "locate": "locate",
    "cache": "run_with_cache of everything",
}
TASKS = tuple(NAMES)
BUSY = "while True: pass"


def prepare(model: str, n: int, length: int) -> dict[str, Callable[[], object]]:
    """The tasks, on one loaded model and the same tokens."""
    import torch

    import melens
    from melens.batches import Batch
    from melens.locating import locate
    from melens.models import load

    bridge: Any = load(model, device="cpu")
    rows = melens.prompts(n=n, length=length).token_rows(bridge.tokenizer)
    row = [token for piece in rows for token in piece][: n * length]
    row = (row * (n * length // len(row) + 1))[: n * length]
    ids = torch.tensor(row).reshape(n, length)

    def forward() -> None:
        with torch.no_grad():
            bridge(ids)

    def cache() -> None:
        with torch.no_grad():
            bridge.run_with_cache(ids)

    def body() -> None:
        with torch.no_grad():
            bridge.original_model.model(ids, use_cache=False)

    def warm() -> None:
        locate(bridge, [Batch.of(ids[:1, :16])])

    return {
        "warm": warm,
        "forward": forward,
        "body": body,
        "locate": lambda: locate(bridge, [Batch.of(ids)]),
        "cache": cache,
    }


def measure_alone(arguments: argparse.Namespace) -> None:
    tasks = prepare(arguments.model, arguments.n, arguments.length)
    tasks["warm"]()
    print_added_megabytes(tasks[arguments.alone])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--busy", type=int, default=0, help="competing processes beside it")
    parser.add_argument("--alone", choices=TASKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        measure_alone(arguments)
        return
    tasks = prepare(arguments.model, arguments.n, arguments.length)
    tasks["forward"]()
    beside = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(arguments.busy)]
    try:
        times = timed(tasks, arguments.repeats)
    finally:
        for one in beside:
            one.kill()
    base = statistics.median(times["forward"])
    print(
        f"{arguments.model}, {arguments.n} x {arguments.length} tokens, CPU, {arguments.busy} busy"
    )
    for task in TASKS:
        taken = statistics.median(times[task])
        added = peak_megabytes(__file__, task, arguments, arguments.n)
        print(f"{NAMES[task]:30} {taken:6.2f} s  {taken / base:5.2f} x  +{added:5.0f} MB")


def timed(tasks: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each task, alternating."""
    times: dict[str, list[float]] = {task: [] for task in TASKS}
    for _ in range(repeats):
        for task in ("forward", "body", "locate"):
            times[task].append(seconds(tasks[task]))
    times["cache"].append(seconds(tasks["cache"]))
    return times


if __name__ == "__main__":
    main()
