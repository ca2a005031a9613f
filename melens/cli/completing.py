"""What a shell offers for an argument: named models, and the models and results that lie here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path


def models(incomplete: str) -> list[str]:
    """Named models, folders with a config.json, .gguf files, and folders to look further in."""
    from melens.models.named import NAMED

    return [*_beginning(NAMED, incomplete), *_paths(incomplete, (".gguf",))]


def named_models(incomplete: str) -> list[str]:
    """Named models alone."""
    from melens.models.named import NAMED

    return _beginning(NAMED, incomplete)


def models_and_results(incomplete: str) -> list[str]:
    """:func:`models`, and JSON files."""
    return sorted({*models(incomplete), *_paths(incomplete, (".json",))})


def metrics(incomplete: str) -> list[str]:
    """Registered metrics."""
    from melens.metrics import METRICS

    return _beginning(METRICS, incomplete)


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _paths(incomplete: str, ends: tuple[str, ...]) -> list[str]:
    """Paths that go on as typed; a folder that is no model ends in a slash."""
    typed, slash, start = incomplete.rpartition("/")
    folder = Path(f"{typed}{slash}" or ".").expanduser()
    try:
        return sorted(_named(folder, f"{typed}{slash}", start, ends))
    except OSError:  # no such folder, or none that may be read
        return []


def _named(folder: Path, typed: str, start: str, ends: tuple[str, ...]) -> Iterator[str]:
    for path in folder.iterdir():
        if not path.name.startswith(start) or (path.name.startswith(".") and not start):
            continue
        if path.is_dir():
            yield f"{typed}{path.name}" + "/" * (not (path / "config.json").is_file())
        elif path.suffix.lower() in ends:
            yield f"{typed}{path.name}"
