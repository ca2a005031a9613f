"""What melens costs on your device: ratios to a bare forward pass, in at most five minutes.

    python benchmarks/cuda.py --device cuda --dtype bfloat16
    python benchmarks/cuda.py --device cpu --n 2 --length 32 --repeats 1     # a smoke test

Locate, measure (describe, collapse and sinks in one pass), patch one site, and generate under the
mask, each as a multiple of the bare pass, or the bare generation, that was timed just before it;
medians of several rounds. Prints one JSON object, which names the machine. No round is begun
after ``--seconds``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import seconds

BARE = {
    "locate": "forward",
    "measure": "forward",
    "collapse": "forward",
    "collapse on the cpu": "forward",
    "patch": "forward of the pair",
    "generate under wemask": "generate",
}
"""Task -> what it is a multiple of."""


def wait(device: str) -> None:
    """Until the device has done what it was given: calls return before."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def prepare(arguments: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The tasks, on one loaded model and the same tokens."""
    import melens
    from melens.batches import Batch
    from melens.measuring import measure_all
    from melens.models import load, load_plain

    device, dtype = arguments.device, arguments.dtype
    bridge: Any = load(arguments.model, device=device, dtype=dtype)
    hf, _, _ = load_plain(arguments.model, device=device, dtype=dtype)
    bos = bridge.tokenizer.bos_token_id is not None
    texts = melens.prompts(n=arguments.n, length=arguments.length, bos=bos or None)
    batches = texts.pack(bridge.tokenizer, batch_size=arguments.batch_size)
    located = melens.locate(bridge, batches)
    here = [batch.to(torch.device(device)) for batch in batches]
    row = here[0].ids[:1, :8]
    pair = Batch.of(row.cpu()), Batch.of(row.flip(1).cpu())

    def forward(ids: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for one in ids:
                bridge(one)

    def generate() -> None:
        new = arguments.new
        asked: Any = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        hf.generate(row, attention_mask=torch.ones_like(row), pad_token_id=0, **asked)

    def masked() -> None:
        with melens.wemask(hf, located, rate=0.5):
            generate()

    def on_the_cpu(task: Callable[[], object]) -> None:
        import os

        os.environ["MELENS_EIG_DEVICE"] = "cpu"
        try:
            task()
        finally:
            del os.environ["MELENS_EIG_DEVICE"]

    def collapse() -> object:
        return melens.collapse(bridge, located, batches)

    tasks: dict[str, Callable[[], object]] = {
        "forward": lambda: forward([batch.ids for batch in here]),
        "locate": lambda: melens.locate(bridge, batches),
        "measure": lambda: measure_all(bridge, located, batches),
        "collapse": collapse,
        "collapse on the cpu": lambda: on_the_cpu(collapse),
        "forward of the pair": lambda: forward([row, row.flip(1)]),
        "patch": lambda: melens.patch(bridge, *pair, sites=("resid_pre",), metric="kl"),
        "generate": generate,
    }
    return tasks | ({"generate under wemask": masked} if located.massive else {})


def timed(tasks: dict[str, Callable[[], object]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of seconds, and of each round's ratios."""
    taken: dict[str, list[float]] = {task: [] for task in tasks}
    begun = time.perf_counter()
    for name in set(BARE.values()):  # warm
        tasks[name]()
    for number in range(arguments.repeats):
        if number and time.perf_counter() - begun > arguments.seconds:
            break
        for name, task in tasks.items():
            wait(arguments.device)
            spent = seconds(lambda task=task: (task(), wait(arguments.device)))
            taken[name].append(spent)
    ratios = {
        name: statistics.median(a / b for a, b in zip(taken[name], taken[BARE[name]], strict=True))
        for name in tasks
        if name in BARE
    }
    return {
        "rounds": len(taken["forward"]),
        "seconds": {name: round(statistics.median(spent), 4) for name, spent in taken.items()},
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
    }


def machine(device: str) -> dict[str, object]:
    """What the numbers are of."""
    name = platform.processor() or platform.machine()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    return {
        "device": device,
        "name": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, mps or cpu")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16, float16 or auto")
    parser.add_argument("--n", type=int, default=8, help="texts")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120, help="begin no round after this")
    arguments = parser.parse_args()
    tasks = prepare(arguments)
    found = timed(tasks, arguments)
    settings = {name: vars(arguments)[name] for name in ("model", "dtype", "n", "length", "new")}
    print(json.dumps({"machine": machine(arguments.device), **settings, **found}, indent=1))


if __name__ == "__main__":
    main()
