"""Draw every figure and write every table and example report of the docs from saved results.

    python experiments/make_figures.py           # write what is out of date
    python experiments/make_figures.py --check   # write nothing, name it, exit 1 if there is any

Reads docs/results, docs/reports and docs/studies and loads no model. A figure counts as the same
where its pixels are (PNG files of equal pixels differ by the version of zlib); one that another
version of matplotlib drew is named and not judged. Of a report's page everything but the bytes of
its drawings is compared. A table stands between the comments ``<!-- table: NAME -->`` and
``<!-- /table -->`` of README.md or a page in docs/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from melens.figures import save_figure
from melens.figures.draw import house_style
from melens.reporting import html_page, markdown_report
from melens.results import load_result
from melens.store import write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
POLICIES = ROOT / "melens" / "data" / "policies"
S, S_RAW, G, G_RAW = "smollm2-135m-bos", "smollm2-135m", "gemma3-270m", "gemma3-270m-no-bos"
NAMES = {
    S: "SmolLM2-135M, BOS first",
    S_RAW: "SmolLM2-135M, no BOS",
    G: "Gemma-3-270M, BOS first",
    G_RAW: "Gemma-3-270M, no BOS",
}
CENSUS = "small-models.census"
FIGURES = {
    "gemma3-270m.png": (f"{G}.locate", "profile"),
    "gemma3-270m.scan.png": (f"{G}.scan", "ceilings"),
    "small-models.census.png": (CENSUS, "depth"),
    "smollm2-135m-bos.collapse.png": (f"{S}.collapse", "rank"),
    "smollm2-135m-bos.dose.png": (f"{S}.perplexity-gamma.evaluate", "dose"),
    "smollm2-135m-bos.isolate-layers.png": (f"{S}.isolate", "layers"),
    "smollm2-135m-bos.isolate.png": (f"{S}.isolate", "factorial"),
    "smollm2-135m-bos.quantise.png": (f"{S}.quantise", "quantise"),
    "smollm2-135m-bos.super-weights.png": (f"{S}.super-weights", "spikes"),
    "smollm2-135m.png": (f"{S_RAW}.locate", "profile"),
    "smollm2-135m.scan.png": (f"{S_RAW}.scan", "ceilings"),
    "smollm2-135m.sinks.png": (f"{S_RAW}.sinks", "curves"),
}
"""File in docs/figures -> the result it is drawn from, and its style."""
STUDIES = {
    "census-study.png": ("census.json", "09_census.py", "profiles"),
    "foresee-study.png": ("foresee.json", "11_foresee.py", "rates"),
}
"""File in docs/figures -> the study, the experiment that draws it, and the part that it draws."""
DRAWING = re.compile(r"data:image/svg\+xml,[^']+|(?<=id=\"drawer\">)[A-Za-z0-9+/=]+")
"""A drawing inside a page, or its packed script: their bytes differ by the versions of matplotlib
and of zlib."""
TABLES: dict[str, Callable[[], list[dict[str, Any]]]] = {}
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
Rows = list[dict[str, Any]]


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where ``--check`` finds something out of date, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    stale = 0
    for path, data in [*figures(options.root), *pages(options.root), *reports(options.root)]:
        if not options.check:
            write_atomically(path, data)
            said = "wrote"
        elif (
            isinstance(data, bytes) and path.exists() and drawn_by(path) != drawn_by(BytesIO(data))
        ):
            said = f"not compared ({drawn_by(path)})"
        else:
            stale, said = stale + 1, "out of date"
        sys.stdout.write(f"{said}: {path}\n")
    return int(stale > 0)


def figures(root: Path) -> Iterator[tuple[Path, bytes]]:
    """Figures that are missing or show something else than their result does now."""
    drawings = {name: partial(plotted, *source) for name, source in FIGURES.items()}
    drawings |= {name: partial(study, *source) for name, source in STUDIES.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, draw in drawings.items():
            made = draw(Path(folder) / name)
            path = root / "docs" / "figures" / name
            if not path.exists() or not same_picture(made, path):
                yield path, made.read_bytes()


def plotted(result: str, style: str, path: Path) -> Path:
    """A saved result in one of its styles."""
    return save_figure(saved(result).plot(style), path)


def study(counts: str, experiment: str, part: str, path: Path) -> Path:
    """A study's counts as its experiment draws them."""
    found = studied(counts)
    spec = importlib.util.spec_from_file_location("study", ROOT / "experiments" / experiment)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    with house_style():
        return save_figure(module.draw(found[part]), path)


def same_picture(one: Path, two: Path) -> bool:
    """Whether two PNG files hold the same pixels."""
    with Image.open(one) as a, Image.open(two) as b:
        first, second = np.asarray(a.convert("RGBA")), np.asarray(b.convert("RGBA"))
    return first.shape == second.shape and bool((first == second).all())


def drawn_by(file: Any) -> str:
    """The version of matplotlib in a PNG file: two draw letters a little differently."""
    with Image.open(file) as picture:
        return str(picture.info.get("Software", "?")).partition(",")[0]


def reports(root: Path) -> Iterator[tuple[Path, str]]:
    """Example reports whose page or text says something else than their JSON does now."""
    for source in sorted((root / "docs" / "reports").glob("*.json")):
        report = load_result(source)
        for ending, make in ((".html", html_page), (".md", markdown_report)):
            path, fresh = source.with_suffix(ending), make(report)
            old = path.read_text("utf-8") if path.exists() else ""
            if DRAWING.sub("", fresh) != DRAWING.sub("", old):
                yield path, fresh


def pages(root: Path) -> Iterator[tuple[Path, str]]:
    """Pages whose tables are out of date, with their new text."""
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if not path.exists():
            continue
        text = path.read_text("utf-8")
        if (fresh := with_tables(text)) != text:
            yield path, fresh


def with_tables(text: str) -> str:
    """A page with its marked tables made anew.

    Raises:  KeyError: a table of a name that is not in TABLES.
    """
    return MARKED.sub(lambda found: f"{found[1]}{markdown(TABLES[found[2]]())}{found[4]}", text)


def markdown(rows: Rows) -> str:
    """A table; every cell is text on one line."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([cell(row[name]) for name in names] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(value: Any) -> str:
    """A value as a table shows it; a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", r"\|").replace("\n", " ")


@cache
def studied(name: str) -> Any:
    """A study of docs/studies."""
    return json.loads((ROOT / "docs" / "studies" / name).read_text("utf-8"))


@cache
def saved(name: str) -> Any:
    """A result of docs/results."""
    return load_result(RESULTS / f"{name}.json")


def linked(name: str, *, start: bool = True) -> str:
    """What a row is about, linked to its JSON; ``start`` says how the texts began."""
    key = max((key for key in NAMES if name.startswith(f"{key}.")), key=len)
    return f"[{NAMES[key] if start else NAMES[key].split(',')[0]}](results/{name}.json)"


def signed(value: float) -> str:
    """A difference to three digits."""
    return f"{value:+.3f}" if value else "0"


def table(name: str) -> Callable[[Callable[[], Rows]], Callable[[], Rows]]:
    """Register a table under its name."""

    def register(function: Callable[[], Rows]) -> Callable[[], Rows]:
        assert name not in TABLES, name
        TABLES[name] = function
        return function

    return register


def code(token: str) -> str:
    """A token as code, whatever it holds."""
    return f"`` {token!r} ``"


def within(score: Any) -> str:
    """A difference with its interval."""
    if score is None:
        return "-"
    ends = " to ".join(map(signed, score.interval or ()))
    return signed(score.value) + (f" ({ends})" if ends else "")


def percent(value: float | None) -> str:
    """A share of 1."""
    return "-" if value is None else f"{100 * value:.1f} %"


@table("locate")
def located() -> Rows:
    """Where the massive activation emerges, a run a column."""
    made = []
    for key in NAMES:
        found = saved(f"{key}.locate")
        first = found.massive[0]
        made.append(
            {
                "": linked(f"{key}.locate"),
                "verdict": found.verdict,
                "ME Layer": f"{found.me_layer} of {found.n_layers}",
                "main step": found.main_layer,
                "10 to 90 %": f"{found.cumulative.p10} to {found.cumulative.p90}",
                "effective layers": found.effective_layers,
                "erase layer": found.erase_layer,
                "token": f"{code(first.token)} at {first.position}",
                "dimension": first.dim,
                "value": first.value,
                "FFN's part": percent(found.writer.ffn),
                "confidence in one layer": f"{found.confidence:.2f}",
            }
        )
    names = [row.pop("") for row in made]
    return [
        {"": what, **{name: row[what] for name, row in zip(names, made, strict=True)}}
        for what in made[0]
    ]


@table("criteria")
def criteria() -> Rows:
    """Every criterion's layer, run by run."""
    answers = {name: saved(f"{key}.locate").criteria.model_dump() for key, name in NAMES.items()}
    rules = next(iter(answers.values()))
    return [
        {"criterion": f"`{rule}`", **{name: found[rule] for name, found in answers.items()}}
        for rule in rules
    ]


@table("sinks")
def sinks() -> Rows:
    """How many heads sink, and from which layer on."""
    made = []
    for key in NAMES:
        found = saved(f"{key}.sinks")
        made.append(
            {
                "": linked(f"{key}.sinks"),
                "T": found.t,
                **{f"Sink^{eps}": f"{rate:.2f}" for eps, rate in found.overall.items()},
                "ME Layer": found.me_layer,
                "sinks in layers": ", ".join(map(str, found.spans)),
                "sinks on": "the first token" if found.onset_of == "first" else "later tokens",
            }
        )
    return made


@table("collapse")
def collapse() -> Rows:
    """Effective rank before and after the ME Layer; in brackets without the massive rows."""
    runs = {key: saved(f"{key}.collapse") for key in (S, G)}
    sites = [site for site in runs[S].sites if all(site in run.sites for run in runs.values())]
    made = []
    for site in sites:
        row: dict[str, Any] = {"site": f"`{site}`"}
        for key, run in runs.items():
            # what a block reads changes one layer after what it leaves
            after = run.me_layer + (site != "resid_post")
            kept, left = run.curve(site)
            steps = [f"{kept[i]:.1f} ({left[i]:.1f})" for i in (after - 1, after)]
            row[linked(f"{key}.collapse")] = (
                f"layer {after - 1}: {steps[0]}, layer {after}: {steps[1]}"
            )
        made.append(row)
    return made


@table("isolate")
def isolate() -> Rows:
    """The 2 x 2 of norm and FFN."""
    made = []
    for key in (S, G):
        found = saved(f"{key}.isolate")
        for row in found.rows():
            made.append(
                {
                    "": linked(f"{key}.isolate"),
                    "layer": found.layer,
                    "norm": row["norm"],
                    "FFN": row["ffn"],
                    "left of the coordinate": percent(row["left"]),
                    "sinks after": f"{row['sink_rate']:.2f}",
                    "loss change": "-"
                    if row["loss_interval"] is None
                    else within(_Score(row["loss_delta"], row["loss_interval"])),
                }
            )
    return made


@table("super-weights")
def super_weights() -> Rows:
    """Every super weight, and what removing it costs."""
    made = []
    for key in (S, G):
        found = saved(f"{key}.super-weights")
        about = linked(f"{key}.super-weights")
        for weight in found.super_weights:
            made.append(
                {
                    "": about,
                    "(layer, row, column)": str(weight.at)[1:-1],
                    "role": weight.role,
                    "value": weight.value,
                    "loss change without it": within(_Score(weight.loss_delta, weight.interval)),
                    "without its neuron": signed(weight.neuron_loss_delta),
                }
            )
        for name, group in (("all together", found.together), ("as many others", found.control)):
            made.append(
                {
                    "": about,
                    "(layer, row, column)": name,
                    "role": None,
                    "value": None,
                    "loss change without it": within(_Score(group.loss_delta, group.interval)),
                    "without its neuron": None,
                }
            )
    return made


class _Score:
    """A difference and its interval, as :func:`within` reads them."""

    def __init__(self, value: float, interval: tuple[float, float] | None) -> None:
        self.value, self.interval = value, interval


@table("mask")
def mask() -> Rows:
    """The mask by gamma and by activation, its controls and rivals, in nats a token."""
    made = []
    for key in (S, G):
        for rule in ("gamma", "activation"):
            name = f"{key}.perplexity-{rule}.evaluate"
            found = saved(name)
            for condition in found.conditions[1:]:
                made.append(
                    {
                        "": linked(name, start=False),
                        "mask by": rule,
                        "condition": condition.name,
                        "edit": condition.edit.label,
                        "loss change": within(condition.delta),
                        "energy masked": percent(condition.energy),
                    }
                )
    return made


@table("quantise")
def quantised() -> Rows:
    """Every scheme, as it is and with something kept whole; controls are means over seeds."""
    made = []
    for key in (S, G):
        found = saved(f"{key}.quantise")
        for scheme in found.schemes:
            for trials in _alike(scheme.trials):
                first = trials[0]
                made.append(
                    {
                        "": linked(f"{key}.quantise", start=False),
                        "scheme": f"`{scheme.scheme}`" if first.role == "as is" else "",
                        "kept whole": "nothing" if first.role == "as is" else first.name,
                        "costs": within(first.damage)
                        if len(trials) == 1
                        else cell(sum(one.damage.value for one in trials) / len(trials)),
                        "agreement": percent(
                            sum(one.agreement.value for one in trials) / len(trials)
                        ),
                        "beyond random": within(first.beyond_random),
                        "in KL": within(first.kl_beyond_random),
                    }
                )
    return made


def _alike(trials: Any) -> list[list[Any]]:
    """Controls of one protection together."""
    groups: dict[object, list[Any]] = {}
    for one in trials:
        groups.setdefault((one.name, one.control_of), []).append(one)
    return list(groups.values())


@table("tasks")
def tasks() -> Rows:
    """Every evaluation: without, with the edit, and the paired difference."""
    made = []
    for path in sorted(RESULTS.glob("*.evaluate.json")):
        name = path.name.removesuffix(".json")
        found = saved(name)
        made.append(
            {
                "": linked(name, start=False),
                "task": found.task,
                "items": found.n,
                "edit": found.edit.label,
                "without": f"{found.base.value:.3f}",
                "with": f"{found.edited.value:.3f}",
                "unit": found.unit,
                "better is": "more" if found.higher_is_better else "less",
                "difference": within(found.delta),
            }
        )
    return made


@table("long-context")
def long_context() -> Rows:
    """Passkeys in long texts, and the loss of plain ones."""
    made = []
    for key in (S, G):
        name = f"{key}.passkey.long-context"
        found = saved(name)
        for condition in found.conditions:
            made.append(
                {
                    "": linked(name, start=False),
                    "condition": condition.name,
                    "found": f"{condition.overall.found.value * found.n:.0f} of {found.n}",
                    "answer's loss": f"{condition.overall.loss.value:.3f}",
                    "plain text, change": within(condition.text_delta),
                }
            )
    return made


@table("policy")
def policy() -> Rows:
    """Every rule of the default policy, with the comment that explains it."""
    strict = tomllib.loads((POLICIES / "strict.toml").read_text("utf-8"))["rules"]
    text = (POLICIES / "default.toml").read_text("utf-8")
    rules, made = tomllib.loads(text)["rules"], []
    for comment, name in re.findall(r"((?:^#.*\n)+)\[rules\.([\w-]+)\]", text, re.MULTILINE):
        rule = rules[name]
        other = {**rule, **strict.get(name, {})}
        made.append(
            {
                "rule": f"`{name}`",
                "severity": rule["severity"],
                "threshold": rule["threshold"],
                "strict": "the same"
                if other == rule
                else (f"{other['severity']}, {cell(other['threshold'])}"),
                "what is measured, and why it matters": " ".join(
                    line.removeprefix("#").strip() for line in comment.splitlines()
                ),
            }
        )
    assert {row["rule"].strip("`") for row in made} == set(rules), "a rule without a comment"
    return made


@table("census-profiles")
def census_profiles() -> Rows:
    """Every published profile by melens' criteria."""
    return [
        {
            "checkpoint": row["model"],
            "blocks": row["n_layers"],
            "verdict": row["verdict"],
            "ME Layer": row["me_layer"],
            "relative depth": _two_digits(row["depth"]),
            "main step": row["main_layer"],
            "its share": percent(row["share"]),
            "layers that add a tenth": ", ".join(map(str, row["at_least_a_tenth"])) or None,
            "largest": row["peak"],
            "Sun's rule first at": row["criteria"]["sun_layer"],
            "its own median": row["criteria"]["sun_token"],
            "tokens a text that pass": row["passing_a_text"],
        }
        for row in studied("census.json")["profiles"]
    ]


def _two_digits(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _by_name(layers: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {cell(layer)}" for name, layer in layers.items())


@table("census-questions")
def census_questions() -> Rows:
    """Whether groups of checkpoints have one ME Layer."""
    return [
        {
            "question": row["question"],
            "group": row["group"],
            "ME Layers": _by_name(row["ME Layers"]),
            "one layer": "yes" if row["same ME Layer"] else "no",
            "main steps": _by_name(row["main steps"]),
            "one main step": "yes" if row["same main step"] else "no",
        }
        for row in studied("census.json")["questions"]
    ]


@table("census-pairs")
def census_pairs() -> Rows:
    """Pairs of pretrained models, within a family and across."""
    return [
        {
            "pairs of": row["pairs of"],
            "with the same ME Layer": f"{row['same ME Layer']} of {row['pairs']}",
            "median gap in relative depth": _two_digits(row["median gap in relative depth"]),
        }
        for row in studied("census.json")["pairs"]
    ]


@table("census-others")
def census_others() -> Rows:
    """Layers that other sources published."""
    return [
        {
            "family": row["family"],
            "first layer": _by_name(row["layers"]),
            "one layer": "yes" if row["same"] else "no",
            "of super weights alone": ", ".join(row["of super weights"]) or None,
        }
        for row in studied("census.json")["others"]
    ]


@table("census-agree")
def census_agree() -> Rows:
    """Profiles beside a layer that was published for the same model."""
    return [
        {
            "checkpoint": row["model"],
            "by its profile": row["by the profile"],
            "published": row["published"],
            "the same": "yes" if row["same"] else "no",
            "source": row["source"],
        }
        for row in studied("census.json")["agree"]
    ]


@table("census-real")
def census_real() -> Rows:
    """The named models, located."""
    return [
        {
            "model": f"[{row.name}](results/{CENSUS}.json)",
            "parameters": f"{row.parameters:,}",
            "ME Layer": f"{row.me_layer} of {row.n_layers}",
            "relative depth": _two_digits(row.depth),
            "verdict": row.verdict,
            "predicted": row.predicted,
            "dimensions": ", ".join(map(str, row.dims)),
            "largest": row.largest,
            "sink rate": f"{row.sink_rate:.2f}",
            "published": row.published,
            "match": row.match,
        }
        for row in saved(CENSUS).models
    ]


if __name__ == "__main__":
    sys.exit(main())
