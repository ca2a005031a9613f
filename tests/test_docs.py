"""The documents: tables, figures and references are what the results and the code say now."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import typer
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from processes import fresh

from melens.cli.app import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures():
    return script("make_figures")


@pytest.mark.examples
def test_tables_and_figures_are_what_the_results_say(figures, capsys):
    assert figures.main(["--check"]) == 0, (
        f"run: python experiments/make_figures.py\n{capsys.readouterr().out}"
    )


def test_what_is_stale_is_named_and_mended(figures, tmp_path, capsys, monkeypatch):
    few = {"smollm2-135m.png": figures.FIGURES["smollm2-135m.png"]}
    monkeypatch.setattr(figures, "FIGURES", few)
    monkeypatch.setattr(figures, "STUDIES", {})
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    page, picture = tmp_path / "docs" / "numbers.md", tmp_path / "docs/figures/smollm2-135m.png"
    good = (DOCS / "numbers.md").read_text("utf-8")
    page.write_text(good.replace("| 507 |", "| 508 |", 1), "utf-8")
    shutil.copy(DOCS / "figures" / "gemma3-270m.png", picture)
    arguments = ["--root", str(tmp_path)]
    assert figures.main([*arguments, "--check"]) == 1
    assert capsys.readouterr().out == f"out of date: {picture}\nout of date: {page}\n"
    assert figures.main(arguments) == 0
    assert page.read_text("utf-8") == good
    assert figures.same_picture(picture, DOCS / "figures" / "smollm2-135m.png")
    capsys.readouterr()
    assert figures.main([*arguments, "--check"]) == 0
    assert not capsys.readouterr().out
    with Image.open(DOCS / "figures" / "gemma3-270m.png") as old:
        old.load()
    old.save(picture, pnginfo=_software("Matplotlib version1.0, https://matplotlib.org/"))
    assert figures.main([*arguments, "--check"]) == 0
    assert capsys.readouterr().out == f"not compared (Matplotlib version1.0): {picture}\n"
    with pytest.raises(KeyError, match="nonsense"):
        figures.with_tables("<!-- table: nonsense -->\n<!-- /table -->")


def _software(name):
    made = PngInfo()
    made.add_text("Software", name)
    return made


def test_every_table_and_figure_is_shown_somewhere(figures):
    text = "".join(page.read_text("utf-8") for page in [*PAGES, ROOT / "README.md"])
    for name in figures.TABLES:
        assert f"<!-- table: {name} -->" in text, name
    there = {path.name for path in (DOCS / "figures").glob("*.png")}
    assert {*figures.FIGURES, *figures.STUDIES} == there
    for name in there:
        assert f"figures/{name})" in text, name


def test_cells_stay_cells(figures):
    assert figures.markdown([{"a": "x|y\nz", "b": None}, {"a": 12345.6, "b": 0.12345}]) == (
        "| a | b |\n| --- | --- |\n| x\\|y z | - |\n| 12,346 | 0.123 |\n"
    )


def test_references_are_what_the_code_says():
    script = ROOT / "experiments" / "make_reference.py"
    done = fresh(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", "--check")
    assert done.code == 0, f"python experiments/make_reference.py\n{done.stdout}{done.stderr}"


def test_every_command_and_option_is_on_the_page():
    page = (DOCS / "cli.md").read_text("utf-8")
    group = typer.main.get_command(app)
    sections = dict(
        re.findall(r"^## melens (\S+)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    )
    assert set(sections) == set(group.commands)
    for name, command in group.commands.items():
        for param in command.params:
            for flag in (*param.opts, *param.secondary_opts):
                shown = flag if flag.startswith("-") else f"`{param.metavar or flag.upper()}`"
                assert shown in sections[name], f"{name} {flag}"


def test_commands_shown_are_commands_that_there_are():
    group = typer.main.get_command(app)
    seen = set()
    for page in [*PAGES, ROOT / "README.md"]:
        blocks = "\n".join(code for language, code in FENCE.findall(page.read_text("utf-8")))
        for line in re.findall(r"(?:^|run: |entry: |\| )melens (.*)$", blocks, re.MULTILINE):
            name, *words = line.split(" #")[0].split()
            if name.startswith("-") or not re.fullmatch(r"[a-z-]+", name):
                continue
            assert name in group.commands, f"{page.name}: melens {name}"
            params = group.commands[name].params
            flags = {flag for p in params for flag in (*p.opts, *p.secondary_opts)}
            for word in words:
                if re.fullmatch(r"--?[a-z][\w-]*", word) and word not in ("--help", "--debug"):
                    assert word in flags, f"{page.name}: melens {name} {word}"
            seen.add(name)
    assert {"locate", "check", "diff"} <= seen


def anchors(text):
    """Ids of a page's headings, as Python-Markdown's toc makes them."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"[`*\\]", "", heading)
        plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        again = found.count(slug)
        found.append(f"{slug}_{again}" if again else slug)
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = page.read_text("utf-8")
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text("utf-8")), f"{page.name}: {target}"


def test_every_page_is_in_the_menu_and_nothing_is_fetched():
    made = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))

    def leaves(items):
        for item in items:
            value = next(iter(item.values())) if isinstance(item, dict) else item
            yield from [value] if isinstance(value, str) else leaves(value)

    assert sorted(leaves(made["nav"])) == sorted(str(page.relative_to(DOCS)) for page in PAGES)
    assert made["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css"} & set(made)


def python_of(*pages):
    """The pages' Python, one after the other, each in a namespace of its own."""
    made = ["pages = {}"]
    for page in pages:
        blocks = [
            c for name, c in FENCE.findall((DOCS / page).read_text("utf-8")) if name == "python"
        ]
        assert blocks, page
        made.append(
            f"exec(compile({chr(10).join(blocks)!r}, {page!r}, 'exec'), {{'__name__': {page!r}}})"
        )
    return "\n".join(made)


def run_pages(*pages):
    done = subprocess.run(
        [sys.executable, "-c", python_of(*pages)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.examples
def test_the_code_of_the_pages_runs():
    """All in one process: to import and to load costs more than what they do."""
    shown = run_pages(
        "extend/family.md",
        "extend/reducer.md",
        "extend/intervention.md",
        "extend/figure.md",
        "check.md",
        "index.md",
        "sweep.md",
        "sidecar.md",
        "quantise.md",
        "extend/task.md",
        "extend/metric.md",
    )
    assert "blocks.0.hook_resid_post" in shown
    assert "the ME Layer did not move: 11 in both" in shown
    assert "ME Layer 11 of 30" in shown
    assert "1 of 1 cells are done." in shown
    assert "8 of 512 tokens hold 99.8 % of the variance" in shown
    assert "rank 1: 1.044 left out with them in the buffer, 1.012 without" in shown
    assert "prose - code: cosine 0.987, dimension 507 holds 3.3 % and 0.0 %" in shown
    assert "nothing: 3.33 nats per token" in shown
    assert "with massive tokens: 4.96 nats per token" in shown
    assert "without: 3.61 nats per token" in shown
    assert "massive dimensions set to 0: 3.54 nats per token" in shown
    assert "least_squares: accuracy 0.91 with massive tokens, 0.90 without" in shown
    assert "logistic: accuracy 0.93 with massive tokens, 0.97 without" in shown
    assert "norm of the direction 0.05 and 0.35" in shown
    assert "capitals, 4 items" in shown
    assert "kv4-token costs" in shown


METRIC_CONTRACT = """
import pytest, sys
import test_metrics as contract
for check in (
    contract.test_every_metric_ignores_row_order_and_knows_its_scale,
    contract.test_every_metric_refuses_what_it_is_undefined_on,
):
    check("entry_kurtosis")
"""


def test_the_metric_of_the_page_lives_in_a_file_as_the_page_says(tmp_path):
    """In a scratch copy of melens: a file, its import, and the contract that walks the registry."""
    copy = tmp_path / "melens"
    shutil.copytree(ROOT / "melens", copy, ignore=shutil.ignore_patterns("__pycache__"))
    first = FENCE.search((DOCS / "extend" / "metric.md").read_text("utf-8"))
    (copy / "metrics" / "kurtosis.py").write_text(
        first[2].replace("from melens.metrics import METRICS, metric", IMPORTS), "utf-8"
    )
    with (copy / "metrics" / "__init__.py").open("a", encoding="utf-8") as file:
        file.write("from melens.metrics.kurtosis import entry_kurtosis\n")
    first = f"import sys; sys.path[:0] = {[str(tmp_path), str(ROOT / 'tests')]}\n"
    done = fresh(first + METRIC_CONTRACT)
    assert done.code == 0, done.stderr[-2000:]


IMPORTS = "from melens.metrics.magnitude import METRICS, metric"
"""Inside the package a name comes from where it is defined."""


def test_every_python_block_is_run_by_a_test():
    ran = set(re.findall(r'"((?:extend/)?[\w-]+\.md)"', Path(__file__).read_text("utf-8")))
    has = {
        str(page.relative_to(DOCS))
        for page in PAGES
        if any(name == "python" for name, _ in FENCE.findall(page.read_text("utf-8")))
    }
    elsewhere = {"api.md", "examples.md", "tour.md"}  # signatures; what legs of .ci/run run
    assert has - elsewhere <= ran


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 900
