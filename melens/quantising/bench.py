"""What all schemes of one call are run with: the plain model, texts, trials, static scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from melens.errors import InterventionError, ModelError, PromptError
from melens.evaluating.edits import located_facts
from melens.exporting.prefix_search import choose_prefix
from melens.formatting import brief
from melens.inputs import Inputs
from melens.isolating import find_super_weights
from melens.isolating.spikes import DownEntry
from melens.locating.search import locate_in
from melens.measuring.located import check_same_model
from melens.protocols import JsonObject
from melens.quantising.layers import PlainModel, plain_model
from melens.quantising.rounding import require_divides
from melens.quantising.running import KeptWhole, require_cache, require_prefix
from melens.quantising.schemes import Scheme
from melens.quantising.trials import (
    Calibration,
    Choices,
    IdRows,
    MarkedTexts,
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
MOST_SEEDS, MOST_PREFIX = 2, 4
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
    seeds: tuple[int, ...] = (0,)
    """Of the random controls."""

    def __post_init__(self) -> None:
        """Refuse numbers of tokens and seeds that cannot be."""
        require_whole("first", self.first)
        require_whole("prefix", self.prefix, least=0)
        if self.prefix > MOST_PREFIX:
            raise InterventionError(
                f"a prefix has at most {MOST_PREFIX} tokens, got {self.prefix}."
            )
        if not isinstance(self.seeds, (tuple, list)) or len(set(self.seeds)) < len(self.seeds):
            raise InterventionError(
                f"seeds must be a list of different numbers, () for none, got {brief(self.seeds)}."
            )
        if not isinstance(self.super_weights, (SuperWeights, type(None))):
            raise InterventionError(
                "super_weights must be what melens.super_weights returns, got "
                f"{brief(self.super_weights, 40)}."
            )
        for seed in self.seeds:
            require_whole("a seed", seed, least=0)
        if len(self.seeds) > MOST_SEEDS:
            raise InterventionError(
                f"at most {MOST_SEEDS} seeds of controls (20 passes a scheme), got "
                f"{len(self.seeds)}."
            )


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
    """The same texts after the prefix."""
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
        scored, others = refuse_early(inputs, schemes, protect)
        plain = plain_model(inputs.model)
        schemes, left_out = _possible(plain, schemes)
        located = me_layer or locate_in(inputs)
        check_same_model(inputs, located)
        holds = located if located.massive else None
        texts = MarkedTexts.of(inputs.model, scored, holds, batch_size=batch_size)
        made = cls(inputs, schemes, protect, located, plain, scored, others, texts)
        made.left_out |= left_out
        made.prefix = made._prefix()
        if made.prefix is not None:
            made.prefixed = made._texts(scored, prefixed=True)
        found = made._searched()
        made.choices = choices(inputs, plain, located, found, seeds=protect.seeds)
        made._say_what_is_not_there()
        if any(scheme.static for scheme in schemes):
            made._calibrate()
        return made

    def _calibrate(self) -> None:
        """One pass over the texts that are not scored, and one with the prefix before them."""
        for side in (False, True) if self.prefix else (False,):
            texts = self._texts(self.others, prefixed=side)
            self.calibrations[side] = Calibration.of(self.plain, texts)
        ran = {one.path for one in self.plain.weights} - set(self.plain.missed)
        unseen = ran - set().union(*self.calibrations[False].sizes)
        if unseen:
            self.left_out["static scales"] = (
                f"{len(unseen)} linear layers that no text for scales came through take a scale of "
                f"what they read: {', '.join(sorted(unseen)[:3])}"
            )

    def _say_what_is_not_there(self) -> None:
        """Protections of weights that this model gives nothing for."""
        if not any(scheme.weights for scheme in self.schemes):
            return
        if self.choices.super_weights is None:
            self.left_out.setdefault("super-weights", "none was found")
        if self.choices.layers is None:
            self.left_out["me-layers"] = (
                "no ME Layer or erase layer has a down projection, or no other layers are like them"
            )

    def _texts(self, rows: IdRows, *, prefixed: bool) -> MarkedTexts:
        holds = self.located if self.located.massive else None
        size = max(map(len, self.texts.batches))
        prefix = self.prefix if prefixed else None
        return MarkedTexts.of(self.inputs.model, rows, holds, batch_size=size, prefix=prefix)

    def trials(self, scheme: Scheme) -> list[TrialPlan]:
        """What is kept whole beside a scheme, the first being nothing."""
        tokens = [] if self.texts.massive_count == 0 else ["massive-token"]
        if self.texts.differs_from_first(self.protect.first):
            tokens.append("first-tokens")
        first = self.protect.first
        tokens = [name for name in tokens if self._fits(name, self.texts, first)]
        if self.prefixed is not None and self._fits("prefix", self.prefixed, first):
            tokens.append("prefix")
        return self.choices.of(scheme, tokens, seeds=self.protect.seeds)

    def _fits(self, name: str, texts: MarkedTexts, first: int) -> bool:
        fits = texts.has_controls(name, first=first)
        if not fits:
            self.left_out[name] = "some text has too few other tokens for a control"
        return fits

    def texts_of(self, trial: TrialPlan) -> MarkedTexts:
        """The texts, or those with the prefix before them."""
        behind = "prefix" in (trial.name, trial.control_of)
        return self.prefixed if behind and self.prefixed is not None else self.texts

    def spared(self, trial: TrialPlan, texts: MarkedTexts, at: int, scheme: Scheme) -> KeptWhole:
        """What one batch keeps whole under a trial."""
        first = self.protect.first
        largest: Mapping[str, float] = {}
        if scheme.static:
            largest = self.calibrations[texts is self.prefixed].largest(trial, first=first)
        whole = KeptWhole(entries=trial.entries, modules=trial.modules, largest=largest)
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
            "kept": [[t.key, t.entries, sorted(t.modules)] for t in self.choices.every],
            "located": located_facts(self.located),
            "batch_size": max(map(len, self.texts.batches)),
            "first": given.first,
            "prefix": None if self.prefix is None else self.prefix.token_ids,
        }

    def _prefix(self) -> TextPrefix | None:
        wanted = any(scheme.inputs or scheme.cache for scheme in self.schemes)
        if not self.texts.massive_count:
            self.left_out["massive-token"] = NONE
            return None
        if not self.protect.prefix or not wanted:
            return None
        firsts = {row[0] for row in self.scored}
        limit = getattr(self.inputs.model.cfg, "n_ctx", None)
        if limit and max(map(len, self.scored)) + self.protect.prefix > limit:
            self.left_out["prefix"] = f"no room for it in a context of {limit} tokens"
            return None
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


def refuse_early(
    inputs: Inputs, schemes: Sequence[Scheme], protect: Protect
) -> tuple[list[list[int]], list[list[int]]]:
    """What can be refused before anything is measured.

    Returns: rows to be scored, and rows for static scales: one of CALIBRATION, spread over all.
    Raises:  InterventionError: super weights of another model. PromptError: too few texts.
    """
    given = protect.super_weights
    if given is not None and given.run.weights != inputs.weights:
        raise InterventionError(
            f"the super weights are of {given.run.model} with other weights; search this model, or "
            "leave them out."
        )
    rows = [list(row) for row in dict.fromkeys(map(tuple, inputs.rows))]  # equal texts count once
    if not any(scheme.static for scheme in schemes):
        return rows, []
    others = rows[CALIBRATION - 1 :: CALIBRATION] or rows[-1:]
    scored = [row for row in rows if row not in others]
    if not scored:
        raise PromptError(
            "a static scheme needs a text for its scales and another to be scored on; give two "
            "different texts at least, or schemes without 'static'."
        )
    return scored, others
