"""04_patching: what of the first token makes it massive, and what carries its meaning to the end?

    python experiments/04_patching.py                # SmolLM2-135M, about 2 minutes on two cores
    python experiments/04_patching.py --token 1      # another first token

The first token of a text is swapped (as many tokens as before). Patching then asks twice where the
difference comes from: for the massive coordinate of the first token (it exists only if some site
before the ME Layer carries it), and for a logit difference after the last token.

Writes runs/04_patching-<model>/{massive,answer}.{json,png}.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import torch

import melens
from melens.batches import Batch
from melens.figures.patch_grid import draw_change
from melens.patching import LogitDifference, MassiveCoordinate, patch
from melens.results.patch import PatchGrid
from melens.store import write_atomically


@dataclass(frozen=True)
class Config:
    """One run."""

    model: str = "smollm2-135m"
    text: str = "France is a country, and the name of its capital city is"
    other: str = "Italy is a country, and the name of its capital city is"
    answer: str = " Paris"
    wrong: str = " Rome"
    token: int = -1
    """Id of the first token of the corrupted run for the massive coordinate; -1 = as ``other``."""


def main(cfg: Config) -> PatchGrid:
    """Both sweeps; returns the second."""
    model = melens.load(cfg.model)
    located = melens.locate(model)
    tokenizer = model.tokenizer
    clean, other = (torch.tensor([tokenizer(t)["input_ids"]]) for t in (cfg.text, cfg.other))
    swapped = other.clone()
    if cfg.token >= 0:
        swapped[0, 0] = cfg.token
    folder = Path("runs") / f"04_patching-{cfg.model}"
    massive = patch(
        model,
        Batch.of(clean),
        Batch.of(swapped),
        positions=[0],
        sites=["resid_pre", "resid_mid", "attn_out", "mlp_out"],
        metric=MassiveCoordinate(located),
    )
    answer = patch(
        model,
        Batch.of(clean),
        Batch.of(other),
        sites=["resid_pre", "attn_out", "mlp_out"],
        metric=LogitDifference(cfg.answer, cfg.wrong),
        checkpoint=folder / "answer.cells.json",
    )
    _save(massive, folder, "massive")
    _save(answer, folder, "answer")
    (folder / "answer.cells.json").unlink(missing_ok=True)
    return answer


def _save(result: PatchGrid, folder: Path, name: str) -> None:
    from melens.figures import save_figure

    write_atomically(folder / f"{name}.json", result.to_json())
    save_figure(draw_change(result), folder / f"{name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for field in fields(Config):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    main(Config(**vars(parser.parse_args())))
