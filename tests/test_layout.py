"""The layout keeps itself: imports flow one way, names do not collide, files stay short."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from checked_shapes import CHECKED

SRC = Path(__file__).parent.parent / "melens"
SAVED = repr(str(SRC.parent / "docs" / "results" / "smollm2-135m.locate.json"))
ROWS = [
    {"formatting", "protocols"},
    {"errors", "intervals", "shapes", "provenance", "network", "progress", "collector"}
    | {"chat_child"},
    {"registry", "settings", "store", "framing", "token_ids", "placement"},
    {"chat"},
    {"metrics", "results", "batches"},
    {"capture", "item_rows"},
    {"models"},
    {"streaming"},
    {"interventions"},
    {"inputs", "resume"},
    {"locating"},
    {"measuring", "scanning", "published"},
    {"isolating", "patching"},
    {"evaluating"},
    {"tuning", "exporting"},
    {"finetuning", "quantising"},
    {"figures"},
    {"checking", "comparing"},
    {"reporting"},
    {"cli"},
    {"sweeping"},
]
LEVEL = {module: row for row, modules in enumerate(ROWS) for module in modules}
LAZY = {("results", "figures"), ("cli", "sweeping")}
FILES = sorted(SRC.rglob("*.py"))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def _home(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def _imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module == "melens":
                found += [name.name for name in node.names]
            elif (node.module or "").startswith("melens."):
                found.append((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found += [n.name.split(".")[1] for n in node.names if n.name.startswith("melens.")]
    return found


def test_imports_flow_one_way():
    for path in FILES:
        here = _home(path)
        for there in _imports(path) if here != "__init__" else ():
            if there != here and there in LEVEL and (here, there) not in LAZY:
                assert LEVEL[there] < LEVEL[here], f"{path}: {here} may not import {there}"


def test_every_module_has_a_row():
    assert {_home(path) for path in FILES} - {"__init__"} <= set(LEVEL)


def test_files_and_functions_stay_short():
    for path in FILES:
        text = path.read_text("utf-8")
        assert len(text.splitlines()) <= 500, path
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef) and "cli" not in path.parts:
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = (body[-1].end_lineno - body[0].lineno + 1) if body else 0
                assert length <= 40, f"{path.name}: {node.name} has {length} lines"


def test_public_names_are_few_and_no_module_shadows_one():
    import melens

    assert len(melens.__all__) <= 18
    modules = {path.stem if path.is_file() else path.name for path in SRC.iterdir()}
    assert not modules & set(melens.__all__)
    for name in melens.__all__:
        assert callable(getattr(melens, name))
        assert name in dir(melens)
    with pytest.raises(AttributeError, match="no attribute 'lokate'"):
        melens.lokate  # noqa: B018
    before = dir(melens)
    assert melens.comparing.diff
    assert melens.measuring.mixers
    assert melens.figures
    assert dir(melens) == before  # modules can be had, and are not public names


@pytest.mark.parametrize(
    "code",
    [
        "import melens",
        "import melens; assert melens.comparing.Side and melens.results.load_result",
        "from melens.cli.app import _run; assert _run(['--help'], debug=False) == 0",
        "from melens.cli.app import _run; assert _run(['locate', '--help'], debug=False) == 0",
        f"from melens.comparing import diff; assert diff({SAVED}, {SAVED}).verdict",
        f"from melens.results import load_result; assert load_result({SAVED}).plot()",
        "import melens.checking; from melens.models.resolve import asked",
    ],
)
def test_neither_import_nor_help_loads_torch(code):
    check = f"{code}; import sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0


def test_shapes_are_checked_where_they_are_written():
    """Every module with jaxtyping annotations is run under the type checker, but for two places."""
    for path in FILES:
        name = ".".join(("melens", *path.relative_to(SRC).with_suffix("").parts))
        if re.search(r"^from (jaxtyping|melens.shapes)", path.read_text("utf-8"), re.M):
            exempt = name.startswith(("melens.capture", "melens.models.", "melens.shapes"))
            assert name.startswith(CHECKED) != exempt, name


def test_the_files_that_contributing_names_exist():
    text = (SRC.parent / "CONTRIBUTING.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| W")]
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"`((?:melens|tests)/[\w./]*)`", row)
        assert named, row
        for name in named:
            assert (SRC.parent / name).exists(), name


def test_there_is_no_cycle_inside_a_package_either():
    """Imports at the top of a module, parent packages included, as Python runs them."""
    graph = {_dotted(path): set(_opened(path)) for path in FILES}
    known = set(graph)
    order = graphlib.TopologicalSorter({name: there & known for name, there in graph.items()})
    order.prepare()


def _dotted(path: Path) -> str:
    parts = ("melens", *path.relative_to(SRC).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def _opened(path: Path) -> Iterator[str]:
    """Modules that a module needs before it is ready, itself and its own packages left out."""
    here = _dotted(path)
    for node in _tree(path).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in (node.module, *(f"{node.module}.{n.name}" for n in node.names)):
                parts = name.split(".")
                for size in range(2, len(parts) + 1):
                    there = ".".join(parts[:size])
                    if not f"{here}.".startswith(f"{there}."):
                        yield there


def test_no_class_name_means_two_things():
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in _tree(path).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(_dotted(path))
    assert not [name for name, where in homes.items() if len(where) > 1]
