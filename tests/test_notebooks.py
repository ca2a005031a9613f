"""The notebooks run, show pictures, and are kept as they ran."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
AGAIN = "make it again: python experiments/make_notebooks.py"
LEAST_PICTURES = 1
MOST_BYTES = 2_000_000


@pytest.fixture(scope="module")
def made():
    path = ROOT / "experiments" / "make_notebooks.py"
    spec = importlib.util.spec_from_file_location("make_notebooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernel(made):
    with made.kernel() as inside:
        yield inside


def kinds(cell):
    """What a cell shows, without how it looks."""
    return [sorted(output.get("data", {"text": 0})) for output in cell.get("outputs", ())]


def test_there_are_notebooks():
    assert len(SOURCES) >= 4


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_kept_notebook_is_its_source_with_pictures(source, made):
    path = source.with_suffix(".ipynb")
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    written = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    assert [(cell.cell_type, cell.source) for cell in book.cells] == written, AGAIN
    assert sum(map(made.images, book.cells)) >= LEAST_PICTURES, AGAIN
    assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code"), AGAIN
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.notebooks
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_is_kept(source, made, kernel):
    """Every cell ends, every picture comes out again; the numbers are asserted in the cells."""
    ran = made.trimmed(made.executed(source, kernel))
    kept = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert sum(map(made.images, ran.cells)) >= LEAST_PICTURES
    assert list(map(kinds, ran.cells)) == list(map(kinds, kept.cells)), AGAIN
