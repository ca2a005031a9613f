"""Run the notebooks' sources and write the notebooks with what they show.

    python experiments/make_notebooks.py [NAME ...]      # as 01_explore; all without names

A notebook is its source in percent format (notebooks/NAME.py) run from top to bottom. Kept are
pictures, tables and plain text; pages that carry a program of their own (circuitsvis) stay out, and
so do progress bars and what is said on stderr.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from melens.progress import tell
from melens.store import write_atomically

WIDGET = "application/vnd.jupyter.widget-view+json"
FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
MOST_HTML = 400_000
"""Characters of an output's HTML that are kept: a figure and a table, not a page with a program."""


@contextmanager
def kernel() -> Iterator[KernelManager]:
    """A kernel for several notebooks: to import and to start costs more than most of them."""
    made = KernelManager(kernel_name="python3")
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    made.start_kernel(cwd=str(FOLDER.parent), env=environment)
    try:
        yield made
    finally:
        made.shutdown_kernel(now=True)


def executed(source: Path, inside: KernelManager, *, timeout: int = 600) -> NotebookNode:
    """A notebook made of its percent source, and run, with no name of those that ran before.

    Raises:  CellExecutionError: a cell raised.
    """
    book = nbformat.from_dict(jupytext.read(source))
    for number, cell in enumerate(book.cells):
        cell["id"] = f"cell-{number}"
    forget = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%reset -f")])
    try:
        _run(book, inside, timeout)
    finally:
        _run(forget, inside, timeout)
    return book


def _run(book: NotebookNode, inside: KernelManager, timeout: int) -> None:
    client = NotebookClient(book, timeout=timeout, km=inside)
    try:
        client.execute()
    finally:
        client.kc.stop_channels()


def images(cell: NotebookNode) -> int:
    """Pictures among a cell's outputs, alone or inside HTML."""
    found = [output.get("data", {}) for output in cell.get("outputs", ())]
    return sum("image/png" in data or "<img " in data.get("text/html", "") for data in found)


def trimmed(book: NotebookNode) -> NotebookNode:
    """The notebook with what is kept of its outputs."""
    for cell in book.cells:
        cell["metadata"] = {}
        if cell.cell_type != "code":
            continue
        cell["outputs"] = [out for out in cell.outputs if not _passes(out)]
        for output in cell.outputs:
            data = output.get("data", {})
            if len(data.get("text/html", "")) > MOST_HTML:
                del data["text/html"]
    return book


def _passes(output: NotebookNode) -> bool:
    """Whether an output is of the moment: stderr, or a bar where ipywidgets is installed."""
    return output.get("name") == "stderr" or WIDGET in output.get("data", {})


def main() -> None:
    """Run and write the notebooks that are named."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("names", nargs="*", help="as 01_explore; all without names")
    names = asked.parse_args().names or sorted(path.stem for path in FOLDER.glob("*.py"))
    for name in names:
        with kernel() as inside:  # of its own: what is kept must not lean on what ran before
            book = trimmed(executed(FOLDER / f"{name}.py", inside))
        path = FOLDER / f"{name}.ipynb"
        write_atomically(path, nbformat.writes(book) + "\n")
        pictures = sum(map(images, book.cells))
        tell(f"{path.name}: {pictures} pictures, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
