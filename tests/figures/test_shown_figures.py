"""What a notebook shows: a figure as the last expression of a cell is a picture, by itself."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest
from planted_report import SAVED

from melens.figures.draw import FIGURES, Drawing
from melens.results import load_result

ROOT = Path(__file__).parents[2]
RUN = """
import json, sys
import nbformat
from nbclient import NotebookClient
cells = [nbformat.v4.new_code_cell(text) for text in json.loads(sys.argv[1])]
book = nbformat.v4.new_notebook(cells=cells)
NotebookClient(book, timeout=120, kernel_name="python3").execute()
print(json.dumps([[list(out.get("data", {"": 0})) for out in c.outputs] for c in book.cells]))
"""


@pytest.mark.notebooks
def test_cells_of_a_real_kernel_have_pictures():
    """No ``%matplotlib inline`` before it; with it there is still one picture and not two."""
    path = str(SAVED / "smollm2-135m-bos.locate.json")
    cells = [
        f"from melens.results import load_result\nlayer = load_result({path!r})\nlayer.plot()",
        "layer",
        "import sys\nassert 'matplotlib.pyplot' not in sys.modules",
        "%matplotlib inline\nlayer.plot()",
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(cells)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figure, result, nothing, inline = json.loads(done.stdout)
    assert [sorted(kinds) for kinds in figure] == [["image/png", "text/plain"]]
    assert [sorted(kinds) for kinds in result] == [["text/html", "text/plain"]]
    assert nothing == []
    assert [("image/png" in kinds) for kinds in inline] == [True]


@pytest.mark.parametrize("name", ["locate", "scan", "isolate"])
def test_every_figure_is_one_that_shows_itself(name):
    result = load_result(SAVED / f"smollm2-135m{'' if name == 'scan' else '-bos'}.{name}.json")
    for style in FIGURES[type(result)]:
        made = result.plot(style)
        assert isinstance(made, Drawing)
        assert made._repr_png_().startswith(b"\x89PNG")


def test_no_other_figures_are_made():
    for path in (ROOT / "melens").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("Figure", "plt.figure", "plt.subplots"), path


def test_notebooks_rely_on_it():
    """Their figures are last expressions; no magic is needed before them."""
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [cell.source for cell in jupytext.read(path).cells if cell.cell_type == "code"]
        assert not any(line.startswith("%") for cell in cells for line in cell.splitlines())
        last = [ast.parse(cell).body[-1] for cell in cells if cell.strip()]
        assert sum(isinstance(node, ast.Expr) for node in last) >= 2, path
