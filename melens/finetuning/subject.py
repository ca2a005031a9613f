"""A model that is about to be trained, and what on: everything that can be refused is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melens.errors import InterventionError, PromptError
from melens.finetuning.data import (
    TokenRows,
    TrainingData,
    TrainingRow,
    read_training_data,
    tokenise,
)
from melens.finetuning.rewards import reward_of
from melens.finetuning.settings import Objective, Training, training_of
from melens.inputs import prepare
from melens.locating import locate
from melens.measuring.located import check_same_model
from melens.models.loading import adopt, load_plain
from melens.models.origin import Origin, fingerprint, remember
from melens.models.view import view_of
from melens.protocols import Tokenizer, TransformersModel
from melens.provenance import ModelFacts
from melens.results import MELayer
from melens.results.reading import HoldsMELayer, located_in

LOCATED = 8
"""Rows of the training data that the ME Layer is located on."""


@dataclass(frozen=True)
class TrainingSet:
    """What one trainer is given: rows as they were read, and as token ids."""

    data: TrainingData
    tokens: TokenRows

    @property
    def kept(self) -> list[TrainingRow]:
        """Rows that are short enough, as they were read."""
        short = set(self.tokens.lines)
        return [row for row in self.data.rows if row.line in short]


@dataclass
class TrainingSubject:
    """A model that is about to be trained, and what on."""

    hf: TransformersModel
    tokenizer: Tokenizer
    facts: ModelFacts
    source: str
    """What the model is loaded by again: a path of a folder is whole."""
    numbers: int
    """Of the model, before anything is put around it."""
    me_layer: MELayer | None
    rows: TrainingSet
    held_out: TrainingSet | None

    @property
    def first_token(self) -> int | None:
        """The token that every row starts with; None where they differ."""
        sets = [rows for rows in (self.rows, self.held_out) if rows is not None]
        firsts = {ids[0] for rows in sets for ids in rows.tokens.ids}
        return firsts.pop() if len(firsts) == 1 else None


def objective_of(data: TrainingData, how: Training) -> Objective:
    """What is asked for, or what the rows are made for."""
    return how.objective or ("dpo" if data.kind == "preference" else "sft")


def checked(
    model: str | Path,
    data: Path | str,
    how: Training,
    *,
    held_out: Path | str | None = None,
    me_layer: HoldsMELayer | None = None,
) -> TrainingSubject:
    """Everything that can be refused, refused; then the model with its rows.

    Raises:  as :func:`finetune`.
    """
    for name, given in (("model", model), ("data", data), ("held_out", held_out)):
        if given is not None and not isinstance(given, (str, Path)):
            raise InterventionError(
                f"{name} must be a name or a path, got {type(given).__name__}; what is trained is "
                "read from the disk, so that a run can be taken up again."
            )
    rows = read_training_data(data)
    others = None if held_out is None else read_training_data(held_out)
    _check_fits(how, rows)
    if others is not None and others.kind != rows.kind:
        raise InterventionError(
            f"{others.path} has rows of the kind {others.kind}, and {rows.path} of the kind "
            f"{rows.kind}; held-out rows must be of the same kind."
        )
    return _subject_of(model, rows, others, how, located_in(me_layer))


def _check_fits(how: Training, rows: TrainingData) -> None:
    """Refuse rows that the objective cannot use, before any weights are loaded."""
    objective = objective_of(rows, how)
    pairs = rows.kind == "preference"
    if pairs != (objective == "dpo"):
        needs = "prompt, chosen and rejected" if objective == "dpo" else "one answer a row"
        raise InterventionError(
            f"{objective} needs rows with {needs}; {rows.path} has {rows.kind}."
        )
    if objective == "grpo":
        reward_of(how.reward)
    training_of(how, {"objective": objective})  # what excludes an objective, where none was named


def _subject_of(
    model: str | Path,
    data: TrainingData,
    held_out: TrainingData | None,
    how: Training,
    me_layer: MELayer | None,
) -> TrainingSubject:
    """Load the model, tokenise, and locate where that is needed."""
    hf, tokenizer, origin = load_plain(model, device=how.device)
    tokenizer = _fitted(tokenizer, how)

    def tokens(of: TrainingData) -> TrainingSet:
        return TrainingSet(of, tokenise(of, tokenizer, max_tokens=how.max_tokens, chat=how.chat))

    rows = tokens(data)
    bridge = adopt(view_of(hf), tokenizer=tokenizer)
    remember(bridge, Origin(origin.name, revision=origin.revision))
    texts = [list(ids) for ids in rows.tokens.ids[:LOCATED]]
    if me_layer is not None:
        check_same_model(prepare(bridge, texts), me_layer)
    elif how.mask.name != "none" or how.at == "me-layer":
        me_layer = locate(bridge, texts)
    first = next(hf.parameters())
    facts = ModelFacts(
        name=origin.name,
        revision=origin.revision,
        weights=fingerprint(bridge),
        dtype=str(first.dtype).removeprefix("torch."),
        device=str(first.device),
    )
    local = Path(model).expanduser()
    return TrainingSubject(
        hf,
        tokenizer,
        facts,
        str(local.absolute()) if local.exists() else str(model),
        sum(value.numel() for value in hf.parameters()),
        me_layer,
        rows,
        held_out and tokens(held_out),
    )


def _fitted(tokenizer: Tokenizer, how: Training) -> Tokenizer:
    """The tokenizer, with the template that was given.

    Raises:  PromptError: it has nothing to pad with.
    """
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise PromptError(
            "this tokenizer has neither a padding nor an end-of-text token, and texts of different "
            "lengths are padded; set tokenizer.pad_token and save it with the model."
        )
    if how.chat_template is not None:
        own: Any = tokenizer
        own.chat_template = how.chat_template
    return tokenizer
