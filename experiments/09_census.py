"""09_census: is the ME Layer early, and the same within a family? Published layer profiles say.

    python experiments/09_census.py           # 2 s, no weights and no network

melens' own criteria (melens/locating/criteria.py, thresholds.py) on the layer profiles that ship
with melens (melens/data/published/profiles.json, 27 checkpoints), then on the layers that other
sources published (models.json). Asked: one index over sizes, between base, instruct and vision
variants, over training tokens, and with experts? Same index within a family more often than
across families?
Writes runs/09_census/{study.json, figure.png}.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from melens.figures import save_figure
from melens.figures.draw import ERASE_COLOUR, ME_COLOUR, PAGE, house_style
from melens.provenance import git_commit, versions
from melens.published import known_models, profiles, published_profile, published_rows
from melens.published.record import PublishedProfile
from melens.store import write_atomically

EARLY = 0.25
"""Relative depth that counts as early: the first quarter of the layers."""
SHUFFLES = 10_000
OTHERS = {
    "Llama 1": ("llama-7b", "llama-13b", "llama-30b"),
    "Llama 2": ("Llama-2-7b-hf", "Llama-2-13b-hf"),
    "Llama 3": ("Llama-3.2-1B", "Llama-3.2-3B", "Meta-Llama-3-8B"),
    "Mistral 7B": ("Mistral-7B-v0.1", "Mistral-7B-v0.3"),
    "OLMo 0724": ("OLMo-1B-0724-hf", "OLMo-7B-0724-hf"),
    "Falcon": ("falcon-7b", "falcon-11B"),
    "Gemma 2": ("gemma-2-2b", "gemma-2-9b"),
    "phi": ("phi-2", "phi-4"),
    "Qwen3, dense": ("Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-32B"),
}
"""Families of which other sources published a layer for two models or more."""
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Config:
    """One run."""

    out: str = "runs"


def main(cfg: Config) -> dict[str, Any]:
    """The study, saved with its figure."""
    made = {
        "config": asdict(cfg),
        "versions": versions(),
        "git": git_commit(),
        **study(),
    }
    folder = Path(cfg.out) / "09_census"
    write_atomically(folder / "study.json", json.dumps(made, indent=1) + "\n")
    with house_style():
        save_figure(draw(made["profiles"]), folder / "figure.png")
    return made


def study() -> dict[str, Any]:
    """Everything that follows from the record alone."""
    rows = [checkpoint(one) for one in profiles().profiles]
    return {
        "source": profiles().source,
        "early": EARLY,
        "profiles": rows,
        "questions": questions(rows),
        "pairs": pairs(rows),
        "shuffled": shuffled(rows),
        "verdicts": dict(Counter(row["verdict"] for row in rows)),
        "depths": depths(rows),
        "others": others(),
        "agree": agreements(rows),
    }


def checkpoint(profile: PublishedProfile) -> dict[str, Any]:
    """One checkpoint by melens' criteria. Layers count from 0, at the block output."""
    found = profile.answer()
    at = found.me_layer
    layers = profile.n_layers - 1
    return {
        "model": profile.published_as,
        "family": profile.family,
        "variant": profile.variant,
        "billions": profile.billions,
        "tokens": profile.tokens,
        "experts": profile.experts,
        "n_layers": profile.n_layers,
        "verdict": found.verdict,
        "me_layer": at,
        "depth": None if at is None else at / layers,
        "main_layer": found.main_layer,
        "main_depth": None if found.main_layer is None else found.main_layer / layers,
        "share": found.share,
        "effective_layers": found.effective_layers,
        "peak": found.peak,
        "at_least_a_tenth": list(found.steps),
        "passing_a_text": None if at is None else profile.passing[at] / profiles().texts,
        "ffn_over_attention": None
        if at is None
        else profile.mlp_output[at] / profile.attn_output[at],
        "criteria": found.criteria,
    }


def questions(rows: Rows) -> Rows:
    """Each question's groups of checkpoints, and whether their ME Layer is one layer."""
    made = []
    for question, same, label in (
        ("base against instruct, one size", _variants("base", "instruct"), "variant"),
        ("text against vision, one size", _variants("base", "vision"), "variant"),
        ("over training tokens", lambda row: row["family"] if row["tokens"] else None, "tokens"),
        ("over sizes of one family, dense", _sizes, "billions"),
        ("dense against experts of one family", _experts, "model"),
    ):
        for group, members in _grouped(rows, same).items():
            if len({str(row[label]) for row in members}) < 2:
                continue
            layers = {row["me_layer"] for row in members}
            made.append(
                {
                    "question": question,
                    "group": group,
                    "ME Layers": {str(row[label]): row["me_layer"] for row in members},
                    "main steps": {str(row[label]): row["main_layer"] for row in members},
                    "same ME Layer": len(layers) == 1,
                    "same main step": len({row["main_layer"] for row in members}) == 1,
                }
            )
    return made


def _grouped(rows: Rows, same: Callable[[dict[str, Any]], str | None]) -> dict[str, Rows]:
    groups: dict[str, Rows] = {}
    for row in sorted(rows, key=lambda row: (row["billions"] or 0, _tokens(row), row["model"])):
        if (name := same(row)) is not None:
            groups.setdefault(name, []).append(row)
    return groups


def _tokens(row: dict[str, Any]) -> float:
    return float((row["tokens"] or "0").removesuffix("T"))


def _variants(*wanted: str) -> Callable[[dict[str, Any]], str | None]:
    def same(row: dict[str, Any]) -> str | None:
        fits = row["family"] == "Qwen2.5" and row["variant"] in wanted
        return f"{row['family']} {row['billions']:g}B" if fits else None

    return same


def _sizes(row: dict[str, Any]) -> str | None:
    """One checkpoint a size: the base model, or the only one."""
    if row["experts"] or row["tokens"]:
        return None
    return row["family"] if row["family"] != "Qwen2.5" or row["variant"] == "base" else None


def _experts(row: dict[str, Any]) -> str | None:
    return row["family"] if row["family"] in ("Qwen3", "Qwen3.5") else None


def pairs(rows: Rows) -> Rows:
    """How often two models with an ME Layer share it: of one family, and of different ones.

    One checkpoint a pretrained model, so that a fine-tuned copy is no second witness.
    """
    alone = [row for row in rows if _is_own(row) and row["me_layer"] is not None]
    made = []
    for name, inside in (("the same family, another size", True), ("another family", False)):
        both = [(a, b) for a, b in combinations(alone, 2) if (a["family"] == b["family"]) is inside]
        same = [(a, b) for a, b in both if a["me_layer"] == b["me_layer"]]
        gaps = [abs(a["depth"] - b["depth"]) for a, b in both]
        made.append(
            {
                "pairs of": name,
                "models": len(alone),
                "pairs": len(both),
                "same ME Layer": len(same),
                "median gap in relative depth": median(gaps),
                "which": [f"{a['model']} and {b['model']}" for a, b in same] if inside else [],
            }
        )
    return made


def shuffled(rows: Rows) -> dict[str, Any]:
    """Are pairs of one family alike more often than with families shuffled over the models?

    Pairs share models, so that counts of pairs alone have no interval.
    """
    alone = [row for row in rows if _is_own(row) and row["me_layer"] is not None]
    families = [row["family"] for row in alone]
    layers = [row["me_layer"] for row in alone]
    seen, dice = _alike(families, layers), random.Random(0)
    at_least = 0
    for _ in range(SHUFFLES):
        dice.shuffle(families)
        at_least += _alike(families, layers) >= seen
    return {"shuffles": SHUFFLES, "at least as many": at_least / SHUFFLES}


def _alike(families: Sequence[str], layers: Sequence[int]) -> int:
    return sum(
        a == b and x == y for (a, x), (b, y) in combinations(zip(families, layers, strict=True), 2)
    )


def _is_own(row: dict[str, Any]) -> bool:
    """Pretrained apart from all others here: of one base the base, of one run the last."""
    if row["family"] == "Qwen2.5":
        return row["variant"] == "base" or row["billions"] == 3
    return row["tokens"] in (None, "20T")


def depths(rows: Rows) -> dict[str, Any]:
    """How early: relative depth of the ME Layer, and of the main step."""
    made: dict[str, Any] = {}
    for name in ("depth", "main_depth"):
        found = [row[name] for row in rows if row[name] is not None]
        made[name] = {
            "models": len(found),
            "median": median(found),
            "least": min(found),
            "most": max(found),
            "early": sum(depth <= EARLY for depth in found),
        }
    return made


def others() -> Rows:
    """Layers of other sources; of a model with super weights alone the first of theirs."""
    made = []
    for family, names in OTHERS.items():
        said = {name: published_layer(published_rows(name)) for name in names}
        layers = {layer for layer, _ in said.values()}
        made.append(
            {
                "family": family,
                "layers": {name: layer for name, (layer, _) in said.items()},
                "of super weights": [name for name, (_, how) in said.items() if how],
                "same": len(layers) == 1,
            }
        )
    return made


def published_layer(rows: Iterable[dict[str, Any]]) -> tuple[int | None, bool]:
    """A model's published layer, and whether it is only that of its first super weight."""
    rows = list(rows)
    for row in rows:
        if row.get("steps"):
            return row["steps"][0], False
        if row.get("me_layer") is not None:
            return row["me_layer"], False
    found = [at[0] for row in rows for at in row.get("super_weights", ())]
    return (min(found), True) if found else (None, False)


def agreements(rows: Rows) -> Rows:
    """Checkpoints of which another source, or the same by hand, names a layer too."""
    by_name = {row["model"]: row for row in rows}
    made = []
    for name, published in known_models().items():
        profile = published_profile(name)
        layer, _ = published_layer(published)
        if profile is None or layer is None:
            continue
        found = by_name[profile.published_as]
        made.append(
            {
                "model": profile.published_as,
                "by the profile": found["me_layer"],
                "published": layer,
                "source": published[0]["source"],
                "same": found["me_layer"] == layer,
            }
        )
    return made


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """One line a checkpoint: its ME Layer, and its main step where that is another."""
    made = Figure(figsize=(PAGE, 0.8 + 0.19 * len(rows)), layout="constrained")
    axes = made.add_subplot()
    order = sorted(
        rows, key=lambda row: (row["family"], row["billions"] or 0, _tokens(row), row["model"])
    )
    for place, row in enumerate(order):
        axes.axhline(place, color="0.9", lw=0.6, zorder=0)
        if row["depth"] is None:
            axes.annotate("none", (0.0, place), va="center", fontsize=6, color="0.35")
            continue
        axes.plot([row["depth"], row["main_depth"]], [place, place], color=ERASE_COLOUR, lw=0.8)
        axes.plot(row["main_depth"], place, "|", color=ERASE_COLOUR, ms=8, mew=1.4)
        axes.plot(row["depth"], place, "o", color=ME_COLOUR, ms=5)
        axes.annotate(
            f"{row['me_layer']}, {row['verdict']}",
            (max(row["depth"], row["main_depth"]), place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=6,
        )
    axes.set_yticks(range(len(order)), [row["model"] for row in order])
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.axvline(EARLY, color="0.6", lw=0.8, ls=":")
    axes.set_xlabel(
        "relative depth: layer / (layers - 1); dot: ME Layer, bar: main step, dotted: a quarter"
    )
    axes.set_title("ME Layer of 27 published layer profiles, by melens' criteria", loc="left")
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=Config.out)
    main(Config(**vars(parser.parse_args())))
