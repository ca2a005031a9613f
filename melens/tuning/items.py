"""What a search measures and on which items: the metric, and the split of the items in two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from melens.batches import Batch, Prompts, prompts
from melens.capture import pad_id_of
from melens.errors import MetricError, PromptError
from melens.evaluating.forced import Forced, Foreseen
from melens.evaluating.tasks import (
    FORCED_TASKS,
    LIKELIHOOD_FILES,
    PLAIN_TEXTS,
    alike,
    read_jsonl,
    token_loss,
)
from melens.formatting import brief
from melens.framing import bos_first, head_size, require_known
from melens.inputs import Ids, rows_of
from melens.intervals import LEAST_OF_MANY, random_order
from melens.protocols import HookedModel, Tokenizer
from melens.settings import Items

LOSS = ("loss", "perplexity")
ITEMS = 64
"""Items taken where nothing else is said."""
LEAST_DEVELOPMENT = 10
LEAST_HELD_OUT = LEAST_OF_MANY
LEAST_CONTEXT, MOST_HEAD = 16, 8
"""Where no length is given, and before every piece: bounds on how many pieces a text can make."""
Score = Callable[[Forced, Foreseen], tuple[float, float]]
Texts = Prompts | Items | str | Path | Sequence[str] | Sequence[Forced] | Ids | None


@dataclass(frozen=True)
class Objective:
    """A metric of one's own."""

    score: Score
    """(item, what the model foresaw of it) -> (value, weight)."""
    name: str | None = None
    """Stands for the function in a resume file; without one nothing can be resumed."""
    unit: str = "units"
    higher_is_better: bool = False

    def __call__(self, item: Forced, found: Foreseen) -> tuple[float, float]:
        """Value and weight of one item.

        Raises:  MetricError: not finite, or no weight.
        """
        value, weight = (float(number) for number in self.score(item, found))
        if not (math.isfinite(value) and math.isfinite(weight) and weight > 0):
            raise MetricError(
                f"{self.name or 'the metric'} is {value} with weight {weight} on item {item.id}; "
                "it must be finite and weigh something. In half precision, try float32."
            )
        return value, weight


Metric = str | Score | Objective
"""What is measured: "loss" or a forced task by name, a function of one's own, or an Objective."""


def objective_of(metric: Metric) -> Objective | None:
    """The metric where it needs no task; None for the name of a forced task.

    Raises:  UnknownNameError: no task of that name. MetricError: neither name nor function.
    """
    if isinstance(metric, Objective):
        return metric
    if isinstance(metric, str):
        if metric in LOSS:
            return Objective(lambda item, found: token_loss(item, found)[0], "loss", "nats a token")
        _ = FORCED_TASKS[metric]
        return None
    if callable(metric):
        return Objective(metric)
    raise MetricError(f"metric must be 'loss', a task's name or a function, got {brief(metric)}.")


def items_of(
    model: HookedModel, texts: Texts, metric: Metric
) -> tuple[Objective, tuple[Forced, ...]]:
    """The metric and all items, as made for this model's tokenizer.

    Raises:  PromptError: no tokenizer, no texts, or an item over the model's context.
    """
    objective = objective_of(metric)
    if _forced(texts):
        if objective is None:
            raise PromptError(f"{metric} makes its own items; give it a file instead of items.")
        made = tuple(texts)  # type: ignore[arg-type]
    else:
        if model.tokenizer is None:
            raise PromptError("this model has no tokenizer; load it with melens.load(tokenizer=).")
        if objective is None:
            assert isinstance(metric, str)
            task = FORCED_TASKS[metric](model.tokenizer, _source(texts, metric))
            objective = Objective(
                lambda item, found: task.score(item, found)[0],
                task.name,
                task.unit,
                task.higher_is_better,
            )
            made = task.items
        else:
            made = _pieces(model, texts)
    if len({item.id for item in made}) != len(made):
        raise PromptError("two items have the same id; each needs its own.")
    limit = getattr(model.cfg, "n_ctx", None)
    require_known([item.ids for item in made], model.cfg.d_vocab)
    if limit and (long := [item for item in made if len(item.ids) > limit]):
        raise PromptError(
            f"item {long[0].id} has {len(long[0].ids)} tokens; the model's context is {limit}."
        )
    return objective, made


def alike_items(tokenizer: Tokenizer, texts: object, metric: object) -> Prompts:
    """The bundled texts with the beginning that the items have: where to locate for them."""
    if isinstance(texts, Prompts):
        return prompts(bos=texts.bos, chat=texts.chat)
    rows: list[list[int]] = []
    if _forced(texts):
        rows = [list(item.ids) for item in texts]
    elif (ready := Batch.read(texts)) is not None:
        rows = rows_of([ready])
    if rows:
        return prompts(bos=True if bos_first(tokenizer, rows) else None)
    task = metric if isinstance(metric, str) and metric in FORCED_TASKS else PLAIN_TEXTS[0]
    return alike(tokenizer, task, texts if isinstance(texts, Items) else Items())


def _forced(texts: object) -> TypeGuard[Sequence[Forced]]:
    return (
        isinstance(texts, (list, tuple))
        and bool(texts)
        and all(isinstance(item, Forced) for item in texts)
    )


def _source(texts: Texts, metric: str) -> Items:
    if texts is None or isinstance(texts, Path):
        return Items(data=texts, n=ITEMS)
    if not isinstance(texts, Items):
        raise PromptError(f"{metric} takes a file (pathlib.Path) or Items, not texts.")
    return replace(texts, n=texts.n or ITEMS)


def read_once(texts: Texts, metric: Metric) -> Texts:
    """What is cut into items, read here: standard input cannot be read again."""
    if objective_of(metric) is None or _forced(texts) or Batch.read(texts) is not None:
        return texts
    return _cut_texts(texts)


def check_enough(texts: Texts, metric: object, share: float) -> None:
    """Refuse, before a model is loaded, what can never make items enough.

    How many there are is known of items, rows of ids and files of questions; of texts only how many
    there are at most: a token is at least a byte.

    Raises:  PromptError: too few items, or nothing to make any of.
    """
    if _forced(texts):
        most = len(texts)  # type: ignore[arg-type]
    elif (ready := Batch.read(texts)) is not None:
        most = len(ready)
    elif isinstance(metric, str) and metric in LIKELIHOOD_FILES:
        most = len(read_jsonl(_source(texts, metric), *LIKELIHOOD_FILES[metric]))
    elif isinstance(metric, str) and metric not in LOSS:  # a task of somebody's own
        most = _source(texts, metric).n or ITEMS
    else:
        cut = _cut_texts(texts)
        step = max(1, (cut.length or LEAST_CONTEXT) - MOST_HEAD)
        most = sum(len(text.encode("utf-8", "replace")) // step + 1 for text in cut.texts)
        most = min(most, cut.n or most)
    _require_enough(most, share)


def _require_enough(count: int, share: float) -> int:
    """How many items are held out."""
    if not 0 < share < 1:
        raise PromptError(f"the held-out share must be between 0 and 1, got {brief(share, 40)}.")
    held = round(count * share)
    if held < LEAST_HELD_OUT or count - held < LEAST_DEVELOPMENT:
        raise PromptError(
            f"{count} different items make {count - held} to search on and {held} to "
            f"confirm on; it takes at least {LEAST_DEVELOPMENT} and {LEAST_HELD_OUT}. Give more or "
            "longer texts, or cut them shorter."
        )
    return held


def _cut_texts(texts: Any) -> Prompts:
    """Texts as they will be cut."""
    if isinstance(texts, Items):
        data = "bundled" if texts.data is None else texts.data
        return prompts(data, n=texts.n or ITEMS, length=texts.length, bos=texts.bos)
    if isinstance(texts, Prompts):
        return texts
    return prompts("bundled" if texts is None else texts, n=ITEMS)


def _pieces(model: HookedModel, texts: object) -> tuple[Forced, ...]:
    """Texts cut into items whose every token but the first counts."""
    if (ready := Batch.read(texts, pad_id=pad_id_of(model))) is not None:
        rows = rows_of([ready])
        return tuple(_item(model, i, row, 1) for i, row in enumerate(rows))
    texts = _cut_texts(texts)
    rows = texts.token_rows(model.tokenizer, max_length=getattr(model.cfg, "n_ctx", None))
    head = 1 if texts.chat else max(1, head_size(model.tokenizer, bos=texts.bos))
    return tuple(_item(model, i, row, head) for i, row in enumerate(rows))


def _item(model: HookedModel, number: int, row: Sequence[int], head: int) -> Forced:
    """One row whose tokens from ``head`` on count."""
    return Forced.scored_from(head, str(number), row, {"text": model.tokenizer.decode(row)})


@dataclass(frozen=True)
class Halves:
    """Items to search on and items to confirm on; none is in both, by its token ids."""

    development: tuple[Forced, ...]
    """In the order in which the race shows them."""
    held_out: tuple[Forced, ...]
    repeated: int
    """Items left out because another has the same tokens."""


def split(items: Sequence[Forced], *, share: float, seed: int) -> Halves:
    """Divide items at random; ``share`` of them are held out.

    Raises:  PromptError: too few items for either side.
    """
    first = {item.ids: item for item in reversed(items)}
    unique = [item for item in items if first[item.ids] is item]
    order = random_order(len(unique), seed=seed).tolist()
    held = _require_enough(len(unique), share)
    return Halves(
        development=tuple(unique[i] for i in order[held:]),
        held_out=tuple(unique[i] for i in order[:held]),
        repeated=len(items) - len(unique),
    )
