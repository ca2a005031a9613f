"""08_finetune: does a mask help in fine-tuning, and is a long-context remedy redundant beside it?

    python experiments/08_finetune.py --data ../shared/data --jobs 2
    python experiments/08_finetune.py --data ../shared/data --seeds 1 --steps 2 --items 8

Two studies, equal steps and the same rows for every arm of a seed. gsm8k: plain, masked, learned
sink and remedy (FocuSFT) trained on GSM8K's training split, then held-out answer likelihood on the
test split, WikiText-2 for what was lost, sinks and the ME Layer; a mask is tried at inference on
what was trained without it and the other way round. passkey: plain and masked, each without and
with the remedy, on passkeys and needles hidden in prose; retrieval is the likelihood of the hidden
number. Differences to plain are paired by item and seed, both drawn again (two-level bootstrap: of
few seeds such an interval is too narrow, so each seed's own difference is kept too), Bonferroni
over the arms of a study.

Run again after a kill, it goes on: a cell is one trained model with its measures. Writes
runs/08_finetune/{study.json, rows/, cells/, trained/}.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import melens
from melens.batches import read_text
from melens.evaluating.edits import applied
from melens.evaluating.haystack import Haystack, haystacks
from melens.finetuning import Training, trained_model
from melens.finetuning.data import read_training_data, tokenise
from melens.framing import plain_ids
from melens.models.loading import adopt, load_plain
from melens.models.view import view_of
from melens.provenance import git_commit, versions
from melens.results.edit import Edit
from melens.store import write_atomically

MASK = Edit(name="wemask", select="gamma", rate=0.5)
NONE = Edit(name="none")
TRAINED: dict[str, dict[str, dict[str, Any]]] = {
    "gsm8k": {
        "plain": {},
        "masked": {"mask": MASK},
        "sink": {"method": "sink"},
        "remedy": {"remedy": "focus"},
    },
    "passkey": {
        "plain": {},
        "masked": {"mask": MASK},
        "remedy": {"remedy": "focus"},
        "masked remedy": {"mask": MASK, "remedy": "focus"},
    },
}
"""Study -> what is trained -> its settings."""
EPSILON = 0.3
SINK_TOKENS, SINK_ITEMS = 64, 16
WIKI = 16
"""WikiText-2 stretches of 128 tokens."""
RESAMPLES = 10_000
OPEN = ("seeds", "jobs", "out", "data")
"""Settings that a run may change and still go on."""
Pair = tuple[list[int], list[bool]]
"""Token ids, and which of them are scored."""


@dataclass(frozen=True)
class Config:
    """One run."""

    data: str = ""
    """A folder with gsm8k/{train,test}.jsonl and wikitext2/test.txt."""
    model: str = "smollm2-135m"
    seeds: int = 3
    steps: int = 16
    batch_size: int = 4
    max_tokens: int = 160
    items: int = 48
    """Held-out items of each study."""
    jobs: int = 1
    out: str = "runs"


@dataclass(frozen=True)
class Cell:
    """One trained model."""

    study: str
    trained: str
    seed: int

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.study}-{self.trained.replace(' ', '-')}-{self.seed}"


def main(cfg: Config) -> dict[str, Any]:
    """Train and measure what is missing, then compare."""
    root = Path(cfg.out) / "08_finetune"
    write_rows(cfg, root)
    cells = [
        Cell(study, trained, seed)
        for seed in range(cfg.seeds)
        for study, arms in TRAINED.items()
        for trained in arms
    ]
    missing = [cell for cell in cells if not _kept(root, cell).exists()]
    if cfg.jobs > 1:
        with ProcessPoolExecutor(cfg.jobs, get_context("spawn")) as pool:
            list(pool.map(run_cell, [cfg] * len(missing), missing))
    else:
        for cell in missing:
            run_cell(cfg, cell)
    found = {cell: json.loads(_kept(root, cell).read_text("utf-8")) for cell in cells}
    study = {
        "config": {**asdict(cfg), "data": Path(cfg.data).name},
        "versions": versions(),
        "git": git_commit(),
        "cells": [{**asdict(cell), **values} for cell, values in found.items()],
        "effects": [row for name in TRAINED for row in effects(name, found, cfg.seeds)],
    }
    write_atomically(root / "study.json", json.dumps(study, indent=1) + "\n")
    return study


def _kept(root: Path, cell: Cell) -> Path:
    return root / "cells" / f"{cell.name}.json"


def write_rows(cfg: Config, root: Path) -> None:
    """Training rows of the passkey study, made by the generator of long-context evaluations."""
    path = root / "rows" / "passkey.jsonl"
    settings = root / "settings.json"
    asked = json.dumps({k: v for k, v in asdict(cfg).items() if k not in OPEN}, indent=1)
    if settings.exists() and settings.read_text("utf-8") != asked:
        raise SystemExit(f"{root} holds a run of other settings; name another --out.")
    if path.exists():
        return
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(settings, asked)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = load_plain(cfg.model)[1]
    rows = []
    for item in hidden(cfg, tokenizer, seed=1, each=24):
        prompt, answer = item.about["prompt"], item.about["answer"]
        rows.append({"prompt": prompt, "completion": f" {answer}"})
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def hidden(cfg: Config, tokenizer: Any, *, seed: int, each: int) -> Sequence[Any]:
    """Passkeys and needles in as many tokens as a training row may have."""
    made: list[Any] = []
    for task in ("passkey", "needles"):
        haystack = Haystack(
            task=task, lengths=(cfg.max_tokens - 8,), depths=(0.1, 0.5), seeds=each // 2, seed=seed
        )
        made += haystacks(tokenizer, haystack, context=None)
    return made


def run_cell(cfg: Config, cell: Cell) -> None:
    """Train one model, or take it up, and measure it under every use."""
    torch.set_num_threads(1 if cfg.jobs > 1 else torch.get_num_threads())
    root = Path(cfg.out) / "08_finetune"
    how = Training(
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        max_tokens=cfg.max_tokens,
        save_every=cfg.steps,
        look_every=10_000,
        chat=False,
        seed=cell.seed,
        device="cpu",
    )
    own = TRAINED[cell.study][cell.trained]
    rows = Path(cfg.data) / "gsm8k" / "train.jsonl"
    rows = root / "rows" / "passkey.jsonl" if cell.study == "passkey" else rows
    folder = root / "trained" / cell.name
    result = melens.finetune(cfg.model, rows, how, out=folder, **own)
    uses = {"": NONE} if cell.trained == "sink" else {"": NONE, "+mask": MASK}
    measured = measure(cfg, cell, folder, uses)
    values = {"summary": result.summary(), "loss": [r.loss for r in result.losses], **measured}
    path = _kept(root, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(values, indent=1) + "\n")


def measure(cfg: Config, cell: Cell, folder: Path, uses: dict[str, Edit]) -> dict[str, Any]:
    """Losses of every item, sink rate and profile of a trained model, under each use of it."""
    if cell.trained == "sink":
        from peft import PeftModel

        hf, tokenizer, _ = load_plain(cfg.model, device="cpu")
        bridge = None
        model: Any = PeftModel.from_pretrained(hf, str(folder / "last")).eval()
    else:
        hf, tokenizer, _ = trained_model(folder, device="cpu")
        bridge, model = adopt(view_of(hf), tokenizer=tokenizer), hf.eval()
    held = held_out(cfg, cell, tokenizer)
    first = held[0][0][0]
    located = None if bridge is None else melens.locate(bridge, [ids for ids, _ in held[:8]])
    hf.set_attn_implementation("eager")
    made: dict[str, Any] = {"verdict": located and located.verdict}
    made["me_layer"] = located and located.me_layer
    made["coordinate"] = located.massive[0].value if located and located.massive else None
    for use, edit in uses.items():
        with in_use(model, edit, located) as record:
            made[f"held_out{use}"] = losses(model, held, sink=bridge is None)
            made[f"wikitext{use}"] = losses(model, wiki(cfg, tokenizer, first), sink=bridge is None)
            made[f"sinks{use}"] = sink_rates(model, held[:SINK_ITEMS], sink=bridge is None)
        if record is not None:
            made[f"edited{use}"] = [record.edited.tokens, record.edited.rows]
    return made


@contextmanager
def in_use(model: Any, edit: Edit, located: Any) -> Iterator[Any]:
    """The edit in force, if there is one, and its record."""
    with nullcontext() if edit.name == "none" else applied(model, edit, located) as record:
        yield record


def held_out(cfg: Config, cell: Cell, tokenizer: Any) -> list[Pair]:
    """The study's own items, none of them trained on."""
    if cell.study == "passkey":
        items = hidden(cfg, tokenizer, seed=2, each=cfg.items // 2)
        return [(list(item.ids), list(item.scored)) for item in items][: cfg.items]
    read = read_training_data(Path(cfg.data) / "gsm8k" / "test.jsonl")
    rows = tokenise(read, tokenizer, max_tokens=cfg.max_tokens, chat=False)
    pairs = zip(rows.ids, rows.labels, strict=True)
    return [(list(ids), [label >= 0 for label in labels]) for ids, labels in pairs][: cfg.items]


def wiki(cfg: Config, tokenizer: Any, first: int) -> list[Pair]:
    """Stretches of WikiText-2 behind the token that the study's items begin with."""
    text = read_text(Path(cfg.data) / "wikitext2" / "test.txt")[:80_000]
    ids = plain_ids(tokenizer, text)
    cut = [ids[at : at + 127] for at in range(0, 127 * WIKI, 127)]
    # What follows the first token at once is not scored: a learned sink has no input there.
    return [([first, *piece], [False, False, *[True] * (len(piece) - 1)]) for piece in cut]


@torch.no_grad()
def losses(model: Any, items: Sequence[Pair], *, sink: bool, at_once: int = 8) -> list[float]:
    """Mean loss of each item's scored tokens, nats; right-padded batches."""
    found: list[float] = []
    for begin in range(0, len(items), at_once):
        part = items[begin : begin + at_once]
        width = max(len(ids) for ids, _ in part)
        ids = torch.tensor([[*i, *[0] * (width - len(i))] for i, _ in part])
        real = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in part])
        logits = model(ids[:, sink:], attention_mask=real[:, sink:]).logits
        for row, (item, scored) in enumerate(part):
            known = torch.tensor(item[1:])
            # Of a sink the first token is no input, and what stands first foresees the third.
            own = logits[row, : len(item) - 1 - sink].log_softmax(-1)
            foreseen = own.gather(-1, known[int(sink) :, None])[:, 0]
            keep = torch.tensor(scored[1 + sink :])
            found.append(float(-foreseen[keep].mean()))
    return found


@torch.no_grad()
def sink_rates(model: Any, items: Sequence[Pair], *, sink: bool) -> list[float]:
    """Share of heads that give the first key over EPSILON on average, item by item (Gu et al. 2024,
    eq. 4)."""  # noqa: D205, D209
    rates = []
    for ids, _ in items:
        row = torch.tensor([ids[:SINK_TOKENS]])[:, sink:]
        weights = model(row, output_attentions=True).attentions
        mean = torch.stack([layer[0, :, 1 - sink :, 0].mean(-1) for layer in weights])
        rates.append(float((mean > EPSILON).float().mean()))
    return rates


def effects(study: str, found: dict[Cell, dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """Every arm minus plain, and in the passkey study how far mask and remedy add up."""

    def column(trained: str, name: str) -> torch.Tensor:
        return torch.tensor([found[Cell(study, trained, seed)][name] for seed in range(seeds)])

    arms = [(t, use) for t in TRAINED[study] for use in ("", "+mask") if (t, use) != ("plain", "")]
    arms = [arm for arm in arms if arm != ("sink", "+mask")]
    rows = []
    for measure_name in ("held_out", "wikitext", "sinks"):
        base = column("plain", measure_name)
        for trained, use in arms:
            apart = column(trained, f"{measure_name}{use}") - base
            low, high = two_level(apart, tests=len(arms))
            rows.append(_row(study, f"{trained}{use}", measure_name, apart, (low, high)))
    if study == "passkey":
        for name in ("held_out", "sinks"):
            both, neither = column("masked remedy", f"{name}+mask"), column("plain", name)
            apart = both - column("masked", f"{name}+mask") - column("remedy", name) + neither
            span = two_level(apart, tests=1)
            rows.append(_row(study, "interaction of mask and remedy", name, apart, span))
    return rows


def _row(
    study: str, arm: str, name: str, apart: torch.Tensor, interval: tuple[float, float]
) -> dict[str, Any]:
    by_seed = apart.double().reshape(len(apart), -1).mean(-1)
    return {
        "study": study,
        "arm": arm,
        "measure": name,
        "difference": float(by_seed.mean()),
        "interval": interval,
        "by_seed": by_seed.tolist(),
    }


def two_level(apart: torch.Tensor, *, tests: int) -> tuple[float, float]:
    """95 % of a mean over seeds and items, ``[seed, item]``, both drawn again; Bonferroni."""
    rng = torch.Generator().manual_seed(0)
    n_seeds, n = apart.shape
    seeds = torch.randint(n_seeds, (RESAMPLES, n_seeds), generator=rng)
    items = torch.randint(n, (RESAMPLES, n), generator=rng)
    chosen = torch.stack(
        [apart.double()[s][:, i].mean() for s, i in zip(seeds, items, strict=True)]
    )
    tail = 0.05 / tests / 2
    low, high = chosen.quantile(torch.tensor([tail, 1 - tail]).double()).tolist()
    return low, high


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in fields(Config):
        kind = {"int": int, "str": str}[str(field.type)]
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    main(Config(**vars(parser.parse_args())))
