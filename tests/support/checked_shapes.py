"""The leg that checks shapes: ``make test-shapes`` loads this as a plugin of pytest.

Annotated tensors are checked by jaxtyping and beartype in every module of CHECKED. That makes
tests slow, so it is done once, in tests that reach them all: a function or dataclass with an
annotated tensor that no test has called fails the run.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Any

import beartype
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "metrics",
    "intervals",
    "batches",
    "resume",
    "interventions",
    "locating",
    "measuring",
    "scanning",
    "isolating",
    "patching",
    "quantising",
    "evaluating.forced",
    "exporting",
    "finetuning.focus",
)
CHECKED = tuple(f"melens.{name}" for name in PACKAGES)
"""Where tensors are computed. Not capture, models and cli: their tensors pass through."""
TOWER = beartype.BeartypeConf(is_pep484_tower=True)
"""An int is a float, as it is for every type checker: ``alpha=2`` is a call like any other."""
reached: set[str] = set()


def pytest_load_initial_conftests() -> None:
    """Before anything imports melens."""
    install_import_hook(CHECKED, f"{__name__}.checked")


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    """Fail where a shape was never checked, unless the run failed anyway."""
    missed = sorted(set(annotated()) - reached)
    if missed and not exitstatus:
        session.exitstatus = 1
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(f"\nshapes that no test reached: {', '.join(missed)}", red=True)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The type checker that jaxtyping calls on every function: beartype, and a note of the name."""
    checker = beartype.beartype(conf=TOWER)(function)
    name = f"{function.__module__}.{function.__qualname__}"

    @wraps(checker)
    def noted(*args: Any, **kwargs: Any) -> Any:
        reached.add(name)
        return checker(*args, **kwargs)

    return noted


def annotated() -> Iterator[str]:
    """Every function and dataclass of CHECKED with a tensor in its annotations, by its name."""
    for name in CHECKED:
        base = ROOT / Path(*name.split("."))
        for path in sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]:
            parts = path.relative_to(ROOT).with_suffix("").parts
            tree = ast.parse(path.read_text("utf-8"))
            yield from _annotated(tree, ".".join(parts).removesuffix(".__init__"), _types(path))


@cache
def _types(path: Path) -> set[str]:
    """Names that mean an annotated tensor in a module: of jaxtyping, and what is made of them."""
    names: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            theirs = ROOT / Path(*node.module.split(".")).with_suffix(".py")
            known = _types(theirs) if theirs.is_file() else set()
            every = node.module == "jaxtyping"
            names |= {x.asname or x.name for x in node.names if every or x.name in known}
        elif isinstance(node, ast.Assign) and _hold([node.value], names):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def _annotated(scope: ast.AST, name: str, types: set[str]) -> Iterator[str]:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.ClassDef):
            if _is_dataclass(node) and _hold(_fields(node), types):
                yield f"{name}.{node.name}.__init__"
            yield from _annotated(node, f"{name}.{node.name}", types)
        elif isinstance(node, ast.FunctionDef):
            if _hold(_signature(node), types) and not _is_stub(node):
                yield f"{name}.{node.name}"
            yield from _annotated(node, f"{name}.{node.name}.<locals>", types)
        else:
            yield from _annotated(node, name, types)


def _hold(annotations: list[ast.expr | None], types: set[str]) -> bool:
    nodes = (node for one in annotations if one is not None for node in ast.walk(one))
    return any(isinstance(node, ast.Name) and node.id in types for node in nodes)


def _signature(node: ast.FunctionDef) -> list[ast.expr | None]:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [*(argument.annotation for argument in given), node.returns]


def _fields(node: ast.ClassDef) -> list[ast.expr | None]:
    return [line.annotation for line in node.body if isinstance(line, ast.AnnAssign)]


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _is_stub(node: ast.FunctionDef) -> bool:
    """A signature alone: nothing but a docstring and an ellipsis, or what says so by raising."""
    last = ast.unparse(node.body[-1])
    return last == "raise NotImplementedError" or all(isinstance(x, ast.Expr) for x in node.body)
