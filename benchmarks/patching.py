"""What a patching sweep costs, against transformer_lens.patching on the same cells.

    python benchmarks/patching.py --cells 48       # SmolLM2-135M, 32 tokens: about 3 minutes
    python benchmarks/patching.py                  # the whole plain sweep: about 8 minutes

Plain sweeps run every cell as a full forward pass. With ``--cells`` only a random subset of them is
timed, spread evenly over the run, and scaled up; the output says so. The two texts differ in every
token, so no cell can be left out. Beside the ratio stands what the floating-point operations alone
would allow: block matrices per token, attention and unembedding, counted.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch
from common import seconds

SITES = ("resid_pre", "mlp_out")
TOLERANCE = 1e-5
"""Of the largest value: float32, matrix products of other shapes."""
ANSWER, WRONG = 500, 600


def tokens(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random texts that differ in every token."""
    made = torch.Generator().manual_seed(0)
    clean = torch.randint(1000, 40000, (1, length), generator=made)
    return clean, clean + 1


def difference(logits: torch.Tensor) -> torch.Tensor:
    return (logits[:, -1, ANSWER] - logits[:, -1, WRONG]).mean()


def plain_sweep(model: Any, site: str, cache: Any, corrupted: Any, cells: Sequence[tuple]) -> Any:
    """The cells through transformer_lens.patching."""
    import pandas as pd
    from transformer_lens import patching

    setter = patching.layer_pos_patch_setter
    frame = pd.DataFrame(cells, columns=["layer", "pos"])
    return patching.generic_activation_patch(
        model, corrupted, cache, difference, setter, site, index_df=frame
    )


def block_flops(model: Any, queries: float, keys: float) -> float:
    """One block over ``queries`` tokens that see ``keys`` tokens, dense layers only."""
    cfg = model.cfg
    weights = sum(p.numel() for p in model.blocks[0].parameters() if p.ndim == 2)
    return 2 * weights * queries + 4 * cfg.n_heads * cfg.d_head * queries * keys


def flops(model: Any, site: str, length: int) -> tuple[float, float]:
    """All cells: every token of every layer and unembedding, and what a resumed run needs."""
    n, unembed = model.cfg.n_layers, 2 * model.cfg.d_model * model.cfg.d_vocab
    plain = n * length * (n * block_flops(model, length, length) + unembed * length)
    ours = 0.0
    for layer in range(n):
        for position in range(length):
            ours += (n - layer) * block_flops(model, length - position, length) + unembed
    return plain, ours


def matmul_gflops() -> float:
    """The best of some large float32 products on this machine."""
    a = torch.randn(2048, 2048)
    return max(2 * 2048**3 / seconds(lambda: a @ a) / 1e9 for _ in range(8))


def compare(model: Any, site: str, arguments: argparse.Namespace, speed: float) -> None:
    """Time both on one site; ``speed`` is the machine's, in GFLOP/s."""
    length, count = arguments.length, arguments.cells
    from melens.batches import Batch
    from melens.patching import LogitDifference, patch

    clean, corrupted = tokens(length)
    every = [(layer, p) for layer in range(model.cfg.n_layers) for p in range(length)]
    cells = every if count is None else random.Random(0).sample(every, min(count, len(every)))
    made: dict[str, Any] = {}
    half = len(cells) // 2
    with torch.no_grad():
        hook = f"hook_{site}"
        _, cache = model.run_with_cache(clean, names_filter=lambda name: name.endswith(hook))

        def plain(part: str, chosen: Sequence[tuple]) -> None:
            made[part] = plain_sweep(model, site, cache, corrupted, chosen)

        plain("warm", cells[:2])
        before = seconds(lambda: plain("a", cells[:half]))

    def ours() -> None:
        made["ours"] = patch(
            model,
            Batch.of(clean),
            Batch.of(corrupted),
            sites=site,
            metric=LogitDifference(ANSWER, WRONG),
        )

    taken = seconds(ours)
    with torch.no_grad():
        after = seconds(lambda: plain("b", cells[half:]))
    whole = (before + after) * len(every) / len(cells)
    theirs = torch.cat([made["a"], made["b"]]).double()
    mine = torch.tensor([made["ours"].values[site][layer][p] for layer, p in cells]).double()
    miss = (theirs - mine).abs().max().item()
    counted, needed = flops(model, site, length)
    how = "timed whole" if len(cells) == len(every) else f"from {len(cells)} of them, scaled up"
    print(f"\n{site}: {len(every)} cells, {length} tokens")
    print(f"  largest difference {miss:.1e} (values reach {theirs.abs().max():.2f})")
    print(f"  transformer_lens.patching {whole:7.1f} s  ({how})")
    print(f"  melens.patch              {taken:7.1f} s  {whole / taken:5.1f} x faster")
    print(
        f"  operations {counted / 1e12:.2f} against {needed / 1e12:.2f} TFLOP: "
        f"{counted / needed:.1f} x fewer"
    )
    print(f"  speed {counted / whole / 1e9:.0f} against {needed / taken / 1e9:.0f} GFLOP/s")
    limit = needed / (speed * 1e9)
    print(f"  floating-point limit {limit:.1f} s: {whole / limit:.1f} x faster than plain")
    if miss > TOLERANCE * theirs.abs().max().item():
        sys.exit(f"{site}: the numbers differ by more than {TOLERANCE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--cells", type=int, help="Plain cells to time (default: all).")
    parser.add_argument("--sites", nargs="+", default=SITES)
    arguments = parser.parse_args()
    from melens.models import load

    model = load(arguments.model, device="cpu")
    print(f"{arguments.model}, CPU, {torch.get_num_threads()} threads")
    speed = matmul_gflops()
    print(f"a large float32 matrix product: {speed:.0f} GFLOP/s")
    for site in arguments.sites:
        compare(model, site, arguments, speed)


if __name__ == "__main__":
    main()
