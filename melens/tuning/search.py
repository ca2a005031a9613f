"""tune(): a race of settings on development items, and the best of them held to other items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic

from melens import __version__, locating
from melens.errors import InterventionError, MetricError
from melens.evaluating.edits import (
    BASE,
    EditCondition,
    Role,
    check_held,
    located_facts,
    unedited,
)
from melens.evaluating.forced import Forced, ItemOutcome, Runner
from melens.evaluating.runner import ItemLoop
from melens.inputs import Inputs
from melens.interventions.wemask import least_rate
from melens.item_rows import ItemRow, Rows
from melens.models.decoder import decoder_of
from melens.protocols import HookedModel, JsonObject, ModelLike
from melens.results import MELayer
from melens.results.edit import Edit
from melens.results.reading import HoldsMELayer
from melens.results.tune import Tuning
from melens.settings import Run, setting_of
from melens.tuning.assemble import Found, Ledger, assembled, made_controls
from melens.tuning.items import (
    Halves,
    Metric,
    Objective,
    Texts,
    alike_items,
    check_enough,
    items_of,
    objective_of,
    read_once,
    split,
)
from melens.tuning.space import (
    CONTROLS,
    DEFAULT_EVALUATIONS,
    Budget,
    Race,
    Space,
    drawn,
    race_of,
)

UNEDITED = EditCondition("base", "base", BASE)
KEPT_BYTES = 2**28
"""Final residuals of one batch under all settings of a wave, float32."""
PROBED = 4
"""Settings that one item is timed under, where the budget is in seconds."""


def tune(  # noqa: PLR0913 (what is searched, on what, by what, and how are four things)
    model: ModelLike,
    texts: Texts = None,
    metric: Metric = "loss",
    budget: Budget | int | None = None,
    *,
    me_layer: HoldsMELayer | None = None,
    space: Space | None = None,
    run: Run | None = None,
) -> Tuning:
    """Search for a setting of the mask that improves a model, and say whether there is one.

    Items are divided at random into development and held-out ones. On the development items the
    settings race by successive halving: all run on a few items, paired against the unedited model;
    the better half goes on to twice as many items, and so on to all. Candidates are ranked by the
    weighted mean of their paired differences; controls (random dimensions) race by the same rule
    among themselves. The best few are then run on the held-out items, controls beside them; one
    counts as found if its interval, widened by Bonferroni for the number confirmed, lies on the
    better side of zero. No such setting is a result like any other.

    A batch runs unedited once, and every setting of the wave goes on from the first layer that it
    changes. Settings that come to the same dimensions stay apart.

    Args:    model: a name, a path, a transformers model or a bridge.
             texts: None = the bundled texts; a file, texts, Prompts, Items, or ready items.
             metric: ``"loss"`` (nats a token), a forced task by name, a function of (Forced,
             Foreseen) giving (value, weight) with lower values better, or an Objective. Pairs are
             weighted by the unedited run's weight.
             budget: evaluations (a whole number) or a Budget; 2000 evaluations unless told
             otherwise. The confirmation's share is put aside first. Evaluations are never
             exceeded, seconds by one batch at most; locating is not in them.
             me_layer: what ``melens.locate`` returns; None = located here on the bundled texts,
             with the BOS or the chat template of the items.
             space: what to try.
             run: seed (of the split, of the settings drawn where the budget cannot carry all, of
             the bootstrap), batches, file of every score, progress in evaluations.
    Returns: every trial, what was confirmed, the split, what was spent, the best Edit or None.
    Raises:  PromptError: too few items. InterventionError, SiteError: settings that the model
             cannot follow, or too small a budget. MetricError: a metric that is not finite, or
             without a name where a resume file is asked for. ResultError: the file is of another
             search.
    Source:  Jamieson & Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter
             Optimization", AISTATS 2016 (arXiv 1502.07943): Successive Halving. Differing from it,
             items that a setting has seen are kept for the next rung, and rungs grow with the
             items instead of dividing the budget evenly.
    """
    run, space = setting_of(run, Run, "run"), space or Space()
    budget = Budget(DEFAULT_EVALUATIONS) if budget is None else budget
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    _check_resumable(metric, run)
    texts = read_once(texts, metric)
    check_enough(texts, metric, budget.held_out)
    inputs, found = unedited(model, me_layer)
    bridge = inputs.model
    objective, items = items_of(bridge, texts, metric)
    halves = split(items, share=budget.held_out, seed=run.seed)
    _check_rates(bridge, space)
    if budget.seconds is None:  # refuses too small a budget before locating
        _plan(space, halves, budget, int(budget.evaluations or 0))
    found = found or locating.locate(inputs, alike_items(bridge.tokenizer, texts, metric))
    search = _Search(
        inputs,
        found,
        objective,
        halves,
        space,
        budget,
        run,
    )
    return search.run()


def _check_resumable(metric: Metric, run: Run) -> None:
    objective = objective_of(metric)
    if run.keep is not None and objective is not None and objective.name is None:
        raise MetricError(
            "a search by a function without a name cannot be resumed; pass Objective(function, "
            "name=...), or leave the file of items out."
        )


def _check_rates(model: HookedModel, space: Space) -> None:
    size = model.cfg.d_model
    if none := [rate for rate in space.rates if not int(rate * size)]:
        raise InterventionError(
            f"rate {none[0]:g} of {size} dimensions is none; "
            f"it must be at least {least_rate(size):g}."
        )


def _plan(space: Space, halves: Halves, budget: Budget, evaluations: int) -> tuple[Race, int]:
    """The race, and the evaluations put aside for the confirmation."""
    keep = min(budget.confirm, len(space.candidates()))
    reserved = (keep + CONTROLS) * len(halves.held_out)
    items = len(halves.development)
    return race_of(space, items, evaluations, keep, reserved=reserved), reserved


@dataclass
class _Search:
    """One search; its rows are its only memory, so that a killed one can be taken up."""

    inputs: Inputs
    """The model, ready; no batches."""
    me_layer: MELayer
    objective: Objective
    halves: Halves
    space: Space
    budget: Budget
    how: Run
    started: float = field(default_factory=monotonic)
    _done: int = 0
    _total: int = 0

    @property
    def model(self) -> HookedModel:
        """The bridge."""
        return self.inputs.model

    def __post_init__(self) -> None:
        """Check every setting, and take up the file."""
        self.candidates = [_condition(edit, "edited") for edit in self.space.candidates()]
        self.controls = [_condition(edit, "control") for edit in self.space.controls()]
        every = (UNEDITED, *self.candidates, *self.controls)
        self.runner = Runner(self.inputs, every, self.me_layer)
        items = [*self.halves.development, *self.halves.held_out]
        check_held(self.model, self.me_layer, [item.ids for item in items])
        self._check_gains()
        self.rows = Rows(self.how.keep, self._facts())
        self.loop = ItemLoop(self.runner, self.rows, self._row)

    def run(self) -> Tuning:
        """Race, confirm, and put together what the rows say."""
        race, reserved, planned, pace = self._race()
        seed = self.how.seed
        entered = [
            *drawn(self.candidates, race.candidates, seed),
            *drawn(self.controls, race.controls, seed),
        ]
        self._total = race.cost + reserved
        found = self._raced(race, entered, self._deadline(reserved * pace))
        ledger = Ledger(self.rows, self.objective, seed)
        candidates, controls = found.ranked(ledger, "edited"), found.ranked(ledger, "control")
        confirmed = candidates[: self.budget.confirm]
        others = made_controls(self.model, confirmed[0], controls[:1], self.me_layer, seed)
        self.runner = Runner(self.inputs, (UNEDITED, *confirmed, *others), self.me_layer)
        self.loop = ItemLoop(self.runner, self.rows, self._row)
        held = self._wave(
            self.halves.held_out, (*confirmed, *others), "confirmation", self._deadline(0.0)
        )
        found.confirmed, found.others, found.held = confirmed, others, held
        found.race, found.planned, found.reserved = race, planned, reserved
        return assembled(self, ledger, found)

    def _race(self) -> tuple[Race, int, int, float]:
        """The race, the reserve, all evaluations planned, and seconds an evaluation."""
        if self.budget.evaluations is not None:
            planned, pace = self.budget.evaluations, 0.0
        elif self.rows.has("plan", "plan"):
            row = self.rows.of("plan")["plan"]
            planned, pace = int(row.value), row.also["seconds"][0]
        else:
            pace = self._timed()
            planned = int((self.budget.seconds or 0) / pace)
        try:
            race, reserved = _plan(self.space, self.halves, self.budget, planned)
        except InterventionError as error:
            if self.budget.seconds is None:
                raise
            raise InterventionError(
                f"{self.budget.seconds:g} seconds are about {planned} evaluations here, "
                f"{pace:.2g} s each: {error}"
            ) from None
        if self.budget.seconds is not None:
            also = {"seconds": (pace, 1.0)}
            self.rows.add([ItemRow("plan", "plan", float(planned), 1.0, also)])
        return race, reserved, planned, pace

    def _timed(self) -> float:
        """Seconds an evaluation, of the longest item alone: a batch is seldom slower."""
        item = max(self.halves.development, key=lambda item: len(item.ids))
        every = [*self.candidates, *self.controls]
        probed = every[:: max(1, len(every) // PROBED)][:PROBED]
        self.runner.outcome([item], [UNEDITED])  # checks the model once, and warms it up
        start = monotonic()
        self.runner.outcome([item], [UNEDITED, *probed])
        return max(monotonic() - start, 1e-6) / len(probed)

    def _raced(self, race: Race, entered: list[EditCondition], deadline: float | None) -> Found:
        """Run the rungs; losers stop, and a clock that runs out stops all."""
        found, alive = Found(entered), entered
        ledger = Ledger(self.rows, self.objective, self.how.seed)
        for rung, upto in enumerate(race.rungs):
            new = self.halves.development[len(found.seen) : upto]
            finished = self._wave(new, alive, "search", deadline)
            found.show(alive, finished)
            if len(finished) < len(new) or upto == race.rungs[-1]:
                break
            best = found.best(ledger, race.field(rung + 1))
            found.stop([c for c in alive if c not in best], after=rung + 1)
            alive = best
        found.alive = alive
        return found

    def _wave(
        self,
        items: Sequence[Forced],
        conditions: Sequence[EditCondition],
        name: str,
        deadline: float | None,
    ) -> tuple[Forced, ...]:
        """Run items under all conditions; the items that are finished under every one.

        Batches depend on the wave alone, as :class:`ItemLoop` says.
        """
        todo = [UNEDITED, *conditions]
        before = self._done

        def stop() -> bool:
            late = deadline is not None and monotonic() > deadline
            if late and (self.loop.ran or name == "confirmation"):
                self.rows.add([ItemRow("stop", f"stop {name}", 0.0, 1.0)])
            return self.rows.has("stop", f"stop {name}")

        def progress(done: int, _: int) -> None:
            self._done = before + done * len(conditions)
            if self.how.progress is not None:
                self.how.progress(self._done, max(self._done, self._total))

        fits = KEPT_BYTES // (4 * self.model.cfg.d_model * len(todo))
        tokens = min(self.how.batch_tokens, fits)
        self.loop.run(items, todo, batch_tokens=tokens, progress=progress, stop=stop)
        return tuple(i for i in items if all(self.rows.has(i.id, c.name) for c in todo))

    def _row(self, one: ItemOutcome) -> ItemRow:
        value, weight = self.objective(one.item, one.found)
        also = {} if one.energy is None else {"energy": (one.energy, 1.0)}
        about = dict(one.item.about) if one.condition == UNEDITED.name else {}
        return ItemRow(one.item.id, one.condition, value, weight, also, about)

    def _deadline(self, aside: float) -> float | None:
        """When to stop, with ``aside`` seconds left for what comes next."""
        seconds = self.budget.seconds
        return None if seconds is None else self.started + seconds - aside

    def _check_gains(self) -> None:
        """A rule that reads gains needs a norm that has one; refuse before the first pass."""
        decoder = decoder_of(self.model)
        if {"gamma", "product", "bottom-gamma"} & set(self.space.selects):
            for layer in sorted(set(self.runner.starts) - {decoder.n_layers}):
                decoder.gain(layer)

    def _facts(self) -> JsonObject:
        """What the numbers depend on."""
        return {
            "melens": __version__,
            "metric": self.objective.name,
            "weights": self.inputs.weights,
            "located": located_facts(self.me_layer),
            "dtype": str(next(self.model.parameters()).dtype),
            "device": next(self.model.parameters()).device.type,
            "settings": [c.edit.model_dump(mode="json") for c in self.runner.conditions],
            "budget": [self.budget.evaluations, self.budget.seconds],
            "confirm": self.budget.confirm,
            "seed": self.how.seed,
            "batch_tokens": self.how.batch_tokens,
            "development": [[i.id, list(i.ids), _at(i)] for i in self.halves.development],
            "held_out": [[i.id, list(i.ids), _at(i)] for i in self.halves.held_out],
        }


def _condition(edit: Edit, role: Role) -> EditCondition:
    return EditCondition(edit.label, role, edit)


def _at(item: Forced) -> list[int]:
    """Positions of the scored tokens."""
    return [at for at, scored in enumerate(item.scored) if scored]
