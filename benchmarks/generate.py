"""What a mask costs while generating: tokens a second beside plain transformers generation.

    python benchmarks/generate.py               # SmolLM2-135M, prompt 256, 64 new tokens

All times are taken in one run, interleaved, in another order each round; a ratio is the median
over rounds of that round's plain time over the other's. The prefix's prompt holds the same tokens.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import seconds

NAMES = {
    "plain": "plain transformers",
    "again": "plain, once more (noise)",
    "mask": "with the mask's hook",
    "prefix": "with the exported prefix",
}


def prepare(model: str, prompt: int, new: int, located: Path | None) -> dict[str, Callable]:
    """The tasks, on one plain model: gamma, rate 0.5, all later layers."""
    import torch

    import melens
    from melens.evaluating.edits import applied
    from melens.exporting import export, for_generate, load_prefix
    from melens.exporting.prefix import fixed_first
    from melens.models import load, load_plain
    from melens.results import Edit, load_located

    bridge = load(model, device="cpu")
    first = fixed_first(bridge.tokenizer)
    if located is None:
        from melens.locating import locate

        me_layer = locate(bridge, melens.prompts(bos=first == bridge.tokenizer.bos_token_id))
    else:
        me_layer = load_located(located)
    edit, folder = Edit(), Path(tempfile.mkdtemp()) / "prefix"
    export(bridge, edit, format="prefix", out=folder, me_layer=me_layer)
    rows = melens.prompts(length=prompt).token_rows(bridge.tokenizer)
    ids = [first, *[token for row in rows for token in row if token != first]][:prompt]
    inputs = for_generate(torch.tensor([ids]))
    del bridge
    hf, _, _ = load_plain(model, device="cpu")
    cache = load_prefix(folder, hf)
    layers: list[Any] = cache.layers
    kept = [(layer.keys, layer.values) for layer in layers]

    def generate(**options: object) -> torch.Tensor:
        return hf.generate(
            **inputs,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **options,
        )

    def masked() -> torch.Tensor:
        with applied(hf, edit, me_layer):
            return generate()

    def prefixed() -> torch.Tensor:
        from transformers import DynamicCache

        fresh = DynamicCache(config=hf.config)
        for i, pair in enumerate(kept):
            fresh.update(*pair, i)
        return generate(past_key_values=fresh)

    assert torch.equal(masked(), prefixed()), "hook and prefix must give the same tokens"
    return {"plain": generate, "again": generate, "mask": masked, "prefix": prefixed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--located", type=Path, help="locate.json, to skip locating")
    arguments = parser.parse_args()
    tasks = prepare(arguments.model, arguments.prompt, arguments.new, arguments.located)
    tasks["plain"]()
    times: dict[str, list[float]] = {task: [] for task in tasks}
    order = random.Random(0)
    for _ in range(arguments.repeats):
        for task in order.sample(list(tasks), len(tasks)):
            times[task].append(seconds(tasks[task]))
    print(f"{arguments.model}, prompt {arguments.prompt}, {arguments.new} new tokens, CPU")
    for task, taken in times.items():
        ratios = sorted(a / b for a, b in zip(times["plain"], taken, strict=True))
        rate = arguments.new / statistics.median(taken)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        spread = f"(half of the rounds: {low:.3f} to {high:.3f})"
        print(f"{NAMES[task]:28} {rate:7.1f} tokens/s  {statistics.median(ratios):5.3f} x {spread}")


if __name__ == "__main__":
    main()
