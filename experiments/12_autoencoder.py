"""12_autoencoder: what massive tokens in the buffer cost a sparse autoencoder, in sparsify.

    make .interop/sparsify/.test      # its environment, 10 s
    PYTHONPATH=. .interop/sparsify/bin/python experiments/12_autoencoder.py     # 2 minutes

SmolLM2-135M after block 15: the bundled texts in chunks of 64 tokens, at most 12 a text; every
fourth text is held out. One SparseCoder (expansion 4, k = 16, Adam, 1e-3, batches of 256) with all
tokens of the others, one with their ordinary tokens, three seeds each. Printed: the share of the
variance of the held-out ordinary tokens that each leaves unexplained (1 = no better than the mean).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

import melens
from melens.exporting import sidecar, write_sidecar
from melens.exporting.massive_mask import MassiveMask

LAYER, LENGTH, CHUNKS, EVERY = 15, 64, 12, 4


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Residuals [token, d_model], which are massive, and whether their text is held out."""
    model, texts = melens.load("smollm2-135m"), melens.prompts(n=8, length=LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "massive.json"
        write_sidecar(sidecar(model, melens.locate(model, texts), texts), path)
        massive = MassiveMask(path)
    site, parts = f"blocks.{LAYER}.hook_resid_post", []
    for number, file in enumerate(sorted((Path(melens.__file__).parent / "texts").glob("*.txt"))):
        ids = torch.tensor(model.tokenizer(file.read_text("utf-8")).input_ids)
        for chunk in ids[: len(ids) // LENGTH * LENGTH].view(-1, 1, LENGTH)[:CHUNKS]:
            x = model.run_with_cache(chunk, names_filter=site)[1][site].detach()
            held_out = torch.full((LENGTH,), number % EVERY == EVERY - 1)
            parts.append((x[0], massive.mask(x, chunk, LAYER)[0], held_out))
    x, marks, held_out = map(torch.cat, zip(*parts, strict=True))
    return x, marks, held_out


def left_out(train: Tensor, test: Tensor, seed: int, steps: int) -> float:
    """Train on ``train``, and say what is left of the variance of ``test``."""
    torch.manual_seed(seed)
    coder = SparseCoder(train.shape[1], SparseCoderConfig(expansion_factor=4, k=16))
    coder.b_dec.data = train.mean(0)  # as sparsify's trainer begins
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-3)
    for _ in range(steps):
        coder.set_decoder_norm_to_unit_norm()
        coder(train[torch.randint(len(train), (256,))]).fvu.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float(coder(test).fvu)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args(arguments).steps
    x, marks, held_out = tokens()
    sys.stdout.write(
        f"{len(x)} tokens, {int(marks.sum())} of them massive, {int(held_out.sum())} held out\n"
    )
    for name, kept in (("with massive tokens", ~held_out), ("without", ~held_out & ~marks)):
        each = [left_out(x[kept], x[held_out & ~marks], seed, steps) for seed in range(3)]
        sys.stdout.write(f"{name}: {', '.join(f'{one:.2f}' for one in each)} left out\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
