"""What all schemes of one call are run with: the plain model, texts, trials, static scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from melens.errors import InterventionError, ModelError, PromptError
from melens.evaluating.edits import located_facts
from melens.exporting.prefix_search import choose_prefix
from melens.inputs import Inputs
from melens.isolating import find_super_weights
from melens.isolating.spikes import DownEntry
from melens.locating.search import locate_in
from melens.measuring.located import check_same_model
from melens.protocols import JsonObject
from melens.quantising.layers import PlainModel, plain_model
from melens.quantising.rounding import require_divides
from melens.quantising.running import Spared, require_cache, require_prefix
from melens.quantising.schemes import Scheme
from melens.quantising.trials import (
    Calibration,
    Choices,
    MarkedTexts,
    Rows,
    TextPrefix,
    TrialPlan,
    choices,
)
from melens.results.locate import MELayer
from melens.results.super_weights import SuperWeights
from melens.settings import require_whole

CALIBRATION = 4
"""One text of so many, at least one, gives static scales and is not scored."""
SEARCHED = 2
"""Texts that super weights are searched on, where none are given."""
NONE = "no token of these texts is massive"


@dataclass(frozen=True)
class Protect:
    """What is tried as kept whole."""

    super_weights: SuperWeights | None = None
    """None = searched here, on two of the texts."""
    first: int = 4
    """First tokens of a cache."""
    prefix: int = 1
    """Tokens at most of a prefix that is searched; 0 = none is tried."""
    seeds: tuple[int, ...] = (0, 1)
    """Of the random controls."""

    def __post_init__(self) -> None:
        """Refuse what is no number of tokens, and no seed."""
        require_whole("first", self.first)
        require_whole("prefix", self.prefix, least=0)
        for seed in self.seeds:
            require_whole("a seed", seed, least=0)


@dataclass
class SchemeBench:
    """Made once, before the first scheme; refuses here what cannot be run."""

    inputs: Inputs
    schemes: tuple[Scheme, ...]
    protect: Protect
    located: MELayer
    plain: PlainModel
    scored: list[list[int]]
    others: list[list[int]]
    """Rows that give static scales and are not scored."""
    texts: MarkedTexts
    prefix: TextPrefix | None = None
    prefixed: MarkedTexts | None = None
    """The same texts behind the prefix."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Schemes and protections that are not tried, with the reason."""
    choices: Choices = field(default_factory=lambda: Choices(None, None, ()))
    calibrations: dict[bool, Calibration] = field(default_factory=dict)
    """By whether the prefix stands before the texts."""

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        schemes: Sequence[Scheme],
        me_layer: MELayer | None,
        protect: Protect,
        batch_size: int,
    ) -> SchemeBench:
        """Look at the model, mark its massive tokens, choose what is tried."""
        plain = plain_model(inputs.model)
        schemes, left_out = _possible(plain, schemes)
        located = me_layer or locate_in(inputs)
        check_same_model(inputs, located)
        scored, others = _set_aside(inputs.rows, any(scheme.static for scheme in schemes))
        holds = located if located.massive else None
        texts = MarkedTexts.of(inputs.model, scored, holds, batch_size=batch_size)
        made = cls(inputs, schemes, protect, located, plain, scored, others, texts)
        made.left_out |= left_out
        made.prefix = made._prefix()
        if made.prefix is not None:
            made.prefixed = made._texts(scored, prefixed=True)
        found = made._searched()
        made.choices = choices(inputs, plain, located, found, seeds=protect.seeds)
        if others:
            sides = (False, True) if made.prefix else (False,)
            made.calibrations = {
                side: Calibration.of(plain, made._texts(others, prefixed=side)) for side in sides
            }
        return made

    def _texts(self, rows: Rows, *, prefixed: bool) -> MarkedTexts:
        holds = self.located if self.located.massive else None
        size = max(map(len, self.texts.batches))
        prefix = self.prefix if prefixed else None
        return MarkedTexts.of(self.inputs.model, rows, holds, batch_size=size, prefix=prefix)

    def trials(self, scheme: Scheme) -> list[TrialPlan]:
        """What is kept whole beside a scheme, the first being nothing."""
        tokens = [] if self.texts.massive_count == 0 else ["massive-token"]
        if self.texts.differs_from_first(self.protect.first):
            tokens.append("first-tokens")
        if self.prefix is not None:
            tokens.append("prefix")
        return self.choices.of(scheme, tokens, seeds=self.protect.seeds)

    def spared(self, trial: TrialPlan, texts: MarkedTexts, at: int, scheme: Scheme) -> Spared:
        """What one batch keeps whole under a trial."""
        first = self.protect.first
        largest: Mapping[str, float] = {}
        if scheme.static:
            largest = self.calibrations[trial.name == "prefix"].largest(trial, first=first)
        whole = Spared(entries=trial.entries, modules=trial.modules, largest=largest)
        if trial.name == "prefix":
            return replace(whole, prefix=texts.prefix)
        return replace(whole, tokens=texts.kept(trial, at, first=first))

    def facts(self) -> JsonObject:
        """What every row depends on."""
        given = self.protect
        return {
            **self.inputs.facts(),
            "rows": self.scored,
            "calibration": self.others,
            "schemes": [[scheme.name, scheme.said()] for scheme in self.schemes],
            "trials": [[t.key, t.entries, sorted(t.modules)] for t in self._every_trial()],
            "located": located_facts(self.located),
            "first": given.first,
            "prefix": None if self.prefix is None else self.prefix.token_ids,
        }

    def _every_trial(self) -> list[TrialPlan]:
        return [trial for scheme in self.schemes for trial in self.trials(scheme)]

    def _prefix(self) -> TextPrefix | None:
        wanted = any(scheme.inputs or scheme.cache for scheme in self.schemes)
        if not self.texts.massive_count:
            self.left_out["massive-token"] = NONE
            return None
        if not self.protect.prefix or not wanted:
            return None
        firsts = {row[0] for row in self.scored}
        size = max(map(len, self.texts.batches))
        try:
            require_prefix(self.plain)
            if len(firsts) == 1 and not self.texts.differs_from_first(1):
                return TextPrefix((*firsts,), starts_texts=True)  # nothing else is massive
            source, most = self.inputs.over(self.scored, batch_size=size), self.protect.prefix
            found = choose_prefix(source, me_layer=self.located, most=most, batch_size=size)
        except (InterventionError, ModelError) as error:
            self.left_out["prefix"] = str(error)
            return None
        return TextPrefix(found.token_ids, found.starts_texts)

    def _searched(self) -> list[DownEntry]:
        if not any(scheme.weights for scheme in self.schemes):
            return []
        given = self.protect.super_weights
        if given is not None:
            if given.run.weights != self.inputs.weights:
                raise InterventionError(
                    f"the super weights are of {given.run.model} with other weights; search this "
                    "model, or leave them out."
                )
            return [DownEntry(w.layer, w.row, w.column, w.expert) for w in given.super_weights]
        try:
            return find_super_weights(self.inputs.over(self.scored[:SEARCHED]))
        except ModelError as error:
            self.left_out["super-weights"] = str(error)
            return []


def _possible(
    plain: PlainModel, schemes: Sequence[Scheme]
) -> tuple[tuple[Scheme, ...], dict[str, str]]:
    """The schemes that this model can be rounded in, and why the others cannot be.

    Raises:  ModelError: none of them, as the first says.
    """
    errors: dict[str, ModelError] = {}
    for scheme in schemes:
        try:
            for one in plain.weights:
                require_divides(one.matrix.shape[-1], scheme.weights, one.name)
            if scheme.cache is not None:
                require_cache(plain, scheme)
        except ModelError as error:
            errors[scheme.name] = error
    if len(errors) == len(schemes):
        raise next(iter(errors.values()))
    kept = tuple(scheme for scheme in schemes if scheme.name not in errors)
    return kept, {name: str(error) for name, error in errors.items()}


def _set_aside(rows: list[list[int]], static: bool) -> tuple[list[list[int]], list[list[int]]]:
    """Rows to be scored, and rows for static scales: one of CALIBRATION, spread over all.

    Raises:  PromptError: there is only one row.
    """
    if not static:
        return rows, []
    if len(rows) < 2:
        raise PromptError(
            "a static scheme needs a text for its scales and another to be scored on; give two "
            "texts at least, or schemes without 'static'."
        )
    others = rows[CALIBRATION - 1 :: CALIBRATION] or rows[-1:]
    return [row for row in rows if not any(row is other for other in others)], others
