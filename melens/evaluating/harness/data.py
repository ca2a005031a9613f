"""What lm-eval asks of our task files: items from local files, and their scores.

``offline_tasks/*.yaml`` name these functions. The folder of the data comes from the task manager's
metadata (``data``), else from the environment variable ``MELENS_DATA``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from melens.batches import read_text
from melens.errors import PromptError
from melens.evaluating.harness.rows import GENERATION_TASKS
from melens.evaluating.refusals import is_refusal, read_prompts
from melens.evaluating.scoring import extract_answer, same_answer
from melens.lines import is_text, json_object, lines_of
from melens.store import TEXT, read_limited

OFFLINE_TASKS = Path(__file__).parent / "offline_tasks"
ITEM = "item_id"
"""Field of an item that holds its id."""
NUMBER_WITH_MARK = r"#### (\-?[0-9\.\,]+)"
ANY_NUMBER = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
IGNORED = [",", r"\$", r"(?s).*#### ", r"\.$"]
"""As in lm-eval's own gsm8k task, whose scores these give."""
TEXTS = ("question", "problem", "prompt", "answer", "solution")
"""Fields of items that are text."""
Doc = dict[str, Any]


def data_folder(metadata: Mapping[str, Any]) -> Path:
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
        return hashlib.sha256(read_limited(path, TEXT)).hexdigest()[:16]
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror or error}.") from None


def items(task: str, folder: Path) -> list[Doc]:
    """A task's items in the file's order, each with its id.

    Raises:  PromptError: no such file, or one whose lines are no such items.
    """
    path = data_file(task, folder)
    if task == "xstest":
        return [{ITEM: p.id, "prompt": p.prompt, "label": p.label} for p in read_prompts(path)]
    wanted = {"gsm8k": ("question", "answer"), "math500": ("problem", "solution", "answer"),
              "ifeval": ("key", "prompt", "instruction_id_list", "kwargs")}[task]  # fmt: skip
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


def gsm8k(**metadata: Any) -> Any:
    """GSM8K's test items as lm-eval wants a data set."""
    return _dataset("gsm8k", metadata)


def math500(**metadata: Any) -> Any:
    """MATH-500 as lm-eval wants a data set."""
    return _dataset("math500", metadata)


def ifeval(**metadata: Any) -> Any:
    """IFEval as lm-eval wants a data set."""
    return _dataset("ifeval", metadata)


def xstest(**metadata: Any) -> Any:
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


def score_ifeval(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
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
        predictions=next(iter(found)), references=[doc["answer"]], regexes_to_ignore=IGNORED,
        ignore_case=True,
    )  # fmt: skip
    return float(theirs["exact_match"])


def _dataset(task: str, metadata: Mapping[str, Any]) -> Any:
    from datasets import Dataset

    return {"test": Dataset.from_list(items(task, data_folder(metadata)))}
