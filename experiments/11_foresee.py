"""11_foresee: does the scan of the weights predict what running the model finds?

    python experiments/11_foresee.py --jobs 2                 # 880 planted models, 10 minutes
    python experiments/11_foresee.py --seeds 1                # half a minute
    python experiments/11_foresee.py --real smollm2-135m,gemma3-270m   # their saved results too

Planted models (tests/support/planted.py) of seeds that nothing else uses, four kinds of them with
a late eraser too, each scanned from its saved files and located by running it; the scan's
constants were chosen on the two real models alone. Two baselines: the largest |entry| of any down
projection, and the largest ratio of a down projection column's maximum to its mean.
Writes runs/11_foresee/{study.json, cases.jsonl, figure.png}.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import melens
from melens.batches import Batch
from melens.figures import save_figure
from melens.figures.draw import house_style
from melens.models.opening import open_checkpoint
from melens.provenance import git_commit, versions
from melens.results import load_result
from melens.scanning import scan
from melens.scanning.plan import plan_of
from melens.store import write_atomically

ROOT = Path(__file__).parent.parent
QUESTIONS = ("layer", "dim", "neuron", "erase", "no false erasure")
METHODS = ("scan", "largest entry", "column max/mean", "scan, tokens tried")
SCANS = ("scan", "scan, tokens tried")
BANDS = (0.0, 0.25, 0.5, 0.75, 0.9)
"""Of confidence."""


@dataclass(frozen=True)
class Config:
    """One run."""

    seeds: int = 20
    first_seed: int = 3000
    """tests/ use seeds below 100, and seed 1000 was looked at while the rule was made."""
    jobs: int = 1
    """Processes, a seed each at a time."""
    real: str = ""
    """Named models whose locate and isolate results are in docs/results, joined by commas."""
    out: str = "runs"


@dataclass(frozen=True)
class Answer:
    """A layer, a dimension, a neuron and an erase layer; None = said to be none."""

    layer: int | None
    dim: int | None = None
    neuron: int | None = None
    erase: int | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class Case:
    """One model: what was found by running it, and what each method predicted."""

    model: str
    family: str
    kind: str
    truth: Answer
    located: Answer
    foretold: dict[str, Answer]

    def right(self, method: str, question: str) -> bool | None:
        """None where there is nothing to be right about, or the method does not say."""
        if question == "no false erasure":
            none = self.foretold[method].erase is None
            return none if method in SCANS and self.truth.erase is None else None
        truth, said = getattr(self.truth, question), getattr(self.foretold[method], question)
        if question == "erase":
            return None if method not in SCANS or truth is None else truth == said
        if question != "layer" and truth is None:
            return None
        if question == "neuron" and not self.right(method, "layer"):
            return False
        return truth == said


def main(cfg: Config) -> dict[str, Any]:
    """Every case, then the rates."""
    cases = _planted(cfg)
    real = [_real(name) for name in cfg.real.split(",") if name]
    study = {
        "config": asdict(cfg),
        "versions": versions(),
        "git": git_commit(),
        "rates": rates(cases),
        "located": located(cases),
        "disagree": disagreements(cases),
        "confidence": confidence(cases),
        "real": [asdict(case) for case in real],
    }
    folder = Path(cfg.out) / "11_foresee"
    write_atomically(folder / "study.json", json.dumps(study, indent=1) + "\n")
    lines = "".join(json.dumps(asdict(case)) + "\n" for case in cases)
    write_atomically(folder / "cases.jsonl", lines)
    with house_style():
        save_figure(draw(study["rates"]), folder / "figure.png")
    return study


def rates(cases: list[Case]) -> list[dict[str, Any]]:
    """Right answers of each method to each question, by kind of emergence, and of all."""
    kinds = list(dict.fromkeys(case.kind for case in cases))
    groups = {kind: [case for case in cases if case.kind == kind] for kind in kinds}
    some = [case for case in cases if case.truth.layer is not None]
    groups["all planted"] = [case for case in some if case.truth.erase is None]
    groups["all planted, erased"] = [case for case in some if case.truth.erase is not None]
    groups["nothing to find"] = [case for case in cases if case.truth.layer is None]
    made = []
    for group, members in groups.items():
        for method in METHODS:
            row: dict[str, Any] = {"group": group, "method": method, "models": len(members)}
            for question in QUESTIONS:
                said = [case.right(method, question) for case in members]
                counted = [answer for answer in said if answer is not None]
                row[question] = [sum(counted), len(counted)]
            made.append(row)
    return made


def located(cases: list[Case]) -> dict[str, list[int]]:
    """How often running the model found the layers that were planted."""
    both = [(case.truth, case.located) for case in cases]
    return {
        "layer": [sum(a.layer == b.layer for a, b in both), len(both)],
        "erase": [sum(a.erase == b.erase for a, b in both), len(both)],
    }


def disagreements(cases: list[Case]) -> list[str]:
    """One line for every layer or erase layer that the scan got wrong."""
    made = []
    for case in cases:
        found = case.foretold["scan"]
        ask = ("layer", "erase", "no false erasure")
        if any(case.right("scan", question) is False for question in ask):
            made.append(
                f"{case.model}: ME Layer {case.truth.layer} in truth, {found.layer} foretold; "
                f"erased at {case.truth.erase} / {found.erase}; "
                f"dim {case.truth.dim} / {found.dim}; confidence {found.confidence or 0.0:.2f}"
            )
    return made


def confidence(cases: list[Case]) -> list[dict[str, Any]]:
    """Right layers among the scan's named ones, by its confidence."""
    named = [case for case in cases if case.foretold["scan"].layer is not None]
    made = []
    for least, most in zip(BANDS, (*BANDS[1:], 1.01), strict=True):
        among = [c for c in named if least <= (c.foretold["scan"].confidence or 0.0) < most]
        right = sum(case.right("scan", "layer") is True for case in among)
        made.append({"from": least, "below": min(most, 1.0), "right": right, "of": len(among)})
    return made


def _planted(cfg: Config) -> list[Case]:
    """Every case, in the order of family, kind and seed, however many processes made them."""
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    if cfg.jobs == 1:
        made = [case for seed in seeds for case in _of_seed(seed)]
    else:
        with ProcessPoolExecutor(cfg.jobs, mp_context=get_context("spawn")) as pool:
            made = [case for some in pool.map(_of_seed, seeds) for case in some]
    groups = dict.fromkeys((case.family, case.kind) for case in made)
    return [case for group in groups for case in made if (case.family, case.kind) == group]


def _of_seed(seed: int) -> list[Case]:
    torch.set_num_threads(1)
    if str(ROOT / "tests" / "support") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests" / "support"))
    from planted import ERASABLE, FAMILIES, KINDS

    kinds = [(kind, False) for kind in KINDS] + [(kind, True) for kind in ERASABLE]
    return [_case(family, kind, seed, eraser) for family in FAMILIES for kind, eraser in kinds]


def _case(family: str, kind: str, seed: int, eraser: bool) -> Case:
    from planted import batch, plant

    made = plant(family, kind, seed, eraser=eraser)
    planted = made.truth
    with tempfile.TemporaryDirectory() as folder:
        made.model.save_pretrained(folder)
        foretold = {method: ask(Path(folder)) for method, ask in ASK.items()}
        neuron = _lone_column(Path(folder), planted.me_layer, planted.dim)
    found = melens.locate(made.model, [Batch.of(batch(made))])
    dim = found.massive[0].dim if found.massive else None
    located = Answer(found.me_layer, dim, None, found.erase_layer)
    dim = None if planted.me_layer is None else planted.dim
    truth = Answer(planted.me_layer, dim, neuron, planted.late_erasure)
    name = f"{kind}, erased" if eraser else kind
    return Case(f"{family} {name} {seed}", family, name, truth, located, foretold)


def _real(name: str) -> Case:
    """A named model against its saved results; the constants come from these two models."""
    saved = {"smollm2-135m": "smollm2-135m-bos"}.get(name, name)
    folder = ROOT / "docs" / "results"
    found: Any = load_result(folder / f"{saved}.locate.json")
    rows = json.loads((folder / f"{saved}.isolate.json").read_text("utf-8"))["neurons"]
    at = sorted(
        (row for row in rows if row["layer"] == found.me_layer), key=lambda row: -abs(row["share"])
    )
    located = Answer(
        found.me_layer, found.massive[0].dim, at[0]["neuron"] if at else None, found.erase_layer
    )
    foretold = {method: ask(name) for method, ask in ASK.items()}
    return Case(name, name, found.verdict, located, located, foretold)


def _ask_tried(model: Any) -> Answer:
    return _ask_scan(model, reach=True)


def _ask_scan(model: Any, *, reach: bool = False) -> Answer:
    found = scan(model, reach=reach)
    if found.me_layer is None:
        return Answer(None, confidence=found.confidence)
    highest = max(
        (c for c in found.candidates if c.layer == found.me_layer and c.dim == found.dims[0]),
        key=lambda c: c.ceiling,
    )
    return Answer(
        found.me_layer, found.dims[0], highest.neuron, found.erase_layer, found.confidence
    )


def _downs(model: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """Each layer's down projection as (dim, neuron)."""
    files = open_checkpoint(model)
    plan = plan_of(files)
    for layer in plan.layers:
        for ffn in layer.ffns:
            at = ffn.down
            whole = files.rows(at.name, at.first, at.first + at.rows).float().clone()
            yield layer.layer, whole.T if plan.layout.transposed else whole
    files.close()


def _ask_largest(model: Any) -> Answer:
    best, answer = -1.0, Answer(None)
    for layer, down in _downs(model):
        top = down.abs().max().item()
        if top > best:
            dim, neuron = divmod(int(down.abs().argmax()), down.shape[1])
            best, answer = top, Answer(layer, dim, neuron)
    return answer


def _ask_columns(model: Any) -> Answer:
    best, answer = -1.0, Answer(None)
    for layer, down in _downs(model):
        ratios = down.abs().amax(0) / down.abs().mean(0).clamp(min=1e-30)
        if ratios.max().item() > best:
            neuron = int(ratios.argmax())
            best, answer = (
                ratios.max().item(),
                Answer(layer, int(down[:, neuron].abs().argmax()), neuron),
            )
    return answer


ASK: dict[str, Callable[[Any], Answer]] = dict(
    zip(METHODS, (_ask_scan, _ask_largest, _ask_columns, _ask_tried), strict=True)
)


def _lone_column(folder: Path, layer: int | None, dim: int | None) -> int | None:
    """The planted neuron: of the columns with next to no entries, the one that writes ``dim``."""
    for at, down in _downs(folder):
        if at == layer and dim is not None:
            few = (down != 0).sum(0) <= 2
            return int((down[dim].abs() * few).argmax())
    return None


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Share of right answers by kind of emergence, one panel a question."""
    made = Figure(figsize=(6.9, 4.2), layout="constrained")
    panels = made.subplots(1, 4, sharey=True)
    groups = list(dict.fromkeys(row["group"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for axes, question in zip(panels, QUESTIONS[:4], strict=True):
        for i, method in enumerate(methods):
            found = {row["group"]: row[question] for row in rows if row["method"] == method}
            shares = [a / n if n else float("nan") for a, n in (found[g] for g in groups)]
            axes.plot(
                shares,
                [y + 0.2 * (i - (len(methods) - 1) / 2) for y in range(len(groups))],
                marker="os^x"[i],
                ls="",
                label=method,
            )
        axes.set_xlim(-0.05, 1.05)
        axes.set_xlabel(f"{question} right")
        axes.set_yticks(range(len(groups)), groups)
    panels[0].invert_yaxis()
    handles, names = panels[0].get_legend_handles_labels()
    made.legend(handles, names, loc="outside lower center", ncols=len(methods))
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Scan of the weights against running the model.")
    for field in fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    main(Config(**vars(parser.parse_args())))
