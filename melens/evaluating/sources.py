"""Task and data looked at before any model is loaded: what can be refused early is."""

from __future__ import annotations

from pathlib import Path

from melens.batches import read_text
from melens.errors import PromptError, UnknownNameError
from melens.evaluating.harness.data import (
    GENERATION_TASKS,
    GenerationSettings,
    GenerationTask,
    items,
)
from melens.evaluating.harness.run import check_task
from melens.evaluating.tasks import FORCED_TASKS, LIKELIHOOD_FILES, read_jsonl
from melens.registry import Registry
from melens.settings import Items


def check_source(task: str, chosen: Items) -> None:
    """Refuse a task that there is not, or data that it cannot be made of.

    Raises:  UnknownNameError: with the names of all tasks. PromptError: no data, or not its data.
             MissingPackageError: a task that generates, without melens[eval].
    """
    if chosen.n is not None and chosen.n < 1:
        raise PromptError(f"a task needs at least 1 item, got n={chosen.n}.")
    if task in GENERATION_TASKS:
        _check_generation(GENERATION_TASKS[task], chosen)
    elif task not in FORCED_TASKS:
        known: Registry[object] = Registry("task")
        for name in (*FORCED_TASKS, *GENERATION_TASKS):
            known.add(name, None)
        raise UnknownNameError(known.unknown(task))
    elif task in LIKELIHOOD_FILES:
        read_jsonl(chosen, *LIKELIHOOD_FILES[task])
    elif chosen.data is not None:
        read_text(chosen.data)


def _check_generation(task: GenerationTask, chosen: Items) -> None:
    folder = data_folder(task, chosen)
    check_task(task.name, GenerationSettings(folder, Path("answers"), limit=chosen.n))
    items(task.name, folder)


def data_folder(task: GenerationTask, chosen: Items) -> Path:
    """The folder that ``task.file`` lies in, whichever of folder, its part or file was given.

    Raises:  PromptError: none was given, or the file is not there.
    """
    if chosen.data is None:
        raise PromptError(f"{task.name} has no bundled items; give --data FOLDER with {task.file}.")
    given = chosen.data.expanduser().resolve()
    depth = len(Path(task.file).parts)
    for folder in (given, *list(given.parents)[:depth]):
        path = folder / task.file
        if path.is_file() and (path == given or given in path.parents):
            return folder
    raise PromptError(f"{chosen.data} holds no {task.file}; give the folder that does.")
