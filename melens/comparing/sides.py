"""Side: one of the two, measured now or read from what was saved."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from melens.errors import ResultError
from melens.models.resolve import asked
from melens.protocols import JsonObject, ModelLike
from melens.provenance import bos_said
from melens.results import MELayer, Result, load_result
from melens.results.check import REPORT_JSON, CheckReport
from melens.results.diff import SideInfo
from melens.results.reading import located_of

if TYPE_CHECKING:
    from torch import Tensor

    from melens.batches import Prompts
    from melens.inputs import Inputs, Source

SAVED = (REPORT_JSON, "locate.json")


@dataclass(frozen=True)
class Side:
    """A located model with what else is at hand of it."""

    located: MELayer
    source: Literal["model", "locate", "check"]
    report: CheckReport | None = None
    """Behind ``source="check"``."""
    steps: Tensor | None = None
    """[layer, d_model]: the primary massive token's residual at every block output, float64."""
    prefix: tuple[int, ...] | None = None
    """Token ids up to that token."""
    width: tuple[int, int] | None = None
    """d_model and vocabulary size."""
    family: str | None = None
    """Of a model measured now, where melens knows it."""

    @classmethod
    def of_result(cls, result: Result, name: str = "this") -> Side:
        """From a saved locate or check result.

        Raises:  ResultError: another kind, or a report without a located ME Layer.
        """
        located = located_of(result, name)
        if isinstance(result, CheckReport):
            return cls(located, "check", report=result)
        return cls(located, "locate")

    @classmethod
    def of_model(
        cls,
        model: ModelLike,
        texts: Source = None,
        *,
        batch_size: int = 4,
        seed: int = 0,
        like: Side | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Side:
        """Locate now, and follow the primary massive token through the layers.

        Args:    like: a saved side; refused before the forward pass if its texts are others.
        Raises:  what ``melens.locate`` does; ResultError: other texts than ``like``'s.
        """
        from melens.inputs import prepare
        from melens.locating.search import locate_in
        from melens.locating.trajectory import trace

        inputs = prepare(model, texts, batch_size=batch_size)
        if like is not None:
            require_same_texts(like.located.run.settings, inputs.settings)
        found = locate_in(inputs, seed=seed, progress=progress)
        prefix = _prefix(inputs, found)
        steps = trace(inputs.model, [prefix])[0].resid[1:] if prefix else None
        cfg = inputs.model.cfg
        return cls(
            found,
            "model",
            steps=steps,
            prefix=tuple(prefix) if prefix else None,
            width=(int(cfg.d_model), int(cfg.d_vocab)),
            family=cfg.architecture,
        )

    def info(self) -> SideInfo:
        """What a Difference keeps of it."""
        run = self.located.run
        return SideInfo(
            name=run.model,
            source=self.source,
            verdict=self.located.verdict,
            me_layer=self.located.me_layer,
            n_layers=self.located.n_layers,
            d_model=self.width[0] if self.width else None,
            vocabulary=self.width[1] if self.width else None,
            dtype=run.dtype,
            weights=run.weights,
            ids=run.settings.get("ids"),
            bos_first=run.flag("bos_first"),
        )


def two_sides(
    sources: Sequence[object],
    texts: Callable[[Side | None], Source],
    measure: Callable[[int, Source, Side | None], Side],
    *,
    any_texts: bool = False,
) -> tuple[Side, Side]:
    """Both sides; what is saved is read, and refused, before a model is loaded.

    Args:    sources: A and B, as :func:`melens.comparing.diff` takes them.
             texts: makes the texts of a model, from the saved side if there is one.
             measure: (0 or 1, texts, the saved side they must fit) -> a side that is not saved.
    Raises:  what :func:`read_side`, :func:`require_same_texts` and the two callables raise.
    """
    saved = [read_side(source) for source in sources]
    if saved[0] and saved[1] and not any_texts:
        require_same_texts(saved[0].located.run.settings, saved[1].located.run.settings)
    if saved[0] and saved[1]:
        return saved[0], saved[1]
    other = saved[0] or saved[1]
    made, given = [], texts(other)
    for index, side in enumerate(saved):
        made.append(side or measure(index, given, None if any_texts else other))
        gc.collect()  # a bridge and its model point at each other: free the first
    return made[0], made[1]


def saved_file(source: object) -> Path | None:
    """The JSON file that ``source`` names, or None where it names a model.

    A folder counts as saved if it holds a report.json or a locate.json and no model.
    """
    if not isinstance(source, (str, Path)):
        return None
    path = Path(source).expanduser()
    if path.suffix.lower() == ".json":
        return path
    if path.is_dir() and not (path / "config.json").exists():
        return next((path / name for name in SAVED if (path / name).is_file()), None)
    return None


def read_side(source: object) -> Side | None:
    """A saved side; None where ``source`` is a model.

    Raises:  ResultError: a file that cannot be read, or that holds something else.
             ModelNotFoundError, ModelError: it names no model, before the other one is run.
    """
    if isinstance(source, Side):
        return source
    if isinstance(source, Result):
        return Side.of_result(source)
    path = saved_file(source)
    if path is None:
        if isinstance(source, (str, Path)):
            asked(source)
        return None
    return Side.of_result(load_result(path), str(path))


def texts_like(
    side: Side | None,
    source: str | Path | Sequence[str] = "bundled",
    *,
    n: int | None = None,
    length: int | None = None,
    bos: bool | None = None,
    chat: bool = False,
) -> Prompts:
    """Texts as asked for; what was left open is cut as a saved side's texts were.

    Raises:  PromptError: as ``melens.prompts``.
    """
    from melens.batches import prompts

    if side is not None:
        made = side.located.run.settings
        n, length = n or _count(made.get("sequences")), length or _count(made.get("length"))
        chat = chat or (bos is None and made.get("chat") is True)
        was = made.get("bos")
        bos = was if bos is None and not chat and isinstance(was, bool) else bos
    return prompts(source, n=n, length=length, bos=bos, chat=chat)


def require_same_texts(first: JsonObject, second: JsonObject) -> None:
    """Refuse to compare over other tokens.

    Raises:  ResultError: with what both were made of.
    """
    if first.get("ids") != second.get("ids"):
        raise ResultError(
            f"the two were measured on other tokens ({_about(first)}; {_about(second)}); measure "
            "both on the same texts, or take --any-texts (any_texts=True)."
        )


def _about(settings: JsonObject) -> str:
    start = f", {bos_said(settings['bos_first'])}" if "bos_first" in settings else ""
    return f"{settings.get('sequences')} sequences{start}, ids {settings.get('ids')}"


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _prefix(inputs: Inputs, found: MELayer) -> list[int]:
    """Ids up to the primary massive token's first place; empty where there is none."""
    if not found.massive:
        return []
    first = found.massive[0]
    for row in inputs.rows:
        if len(row) > first.position and row[first.position] == first.token_id:
            return row[: first.position + 1]
    return []
