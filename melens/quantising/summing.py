"""From rows of texts to means, paired differences and what protection buys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from melens.intervals import bootstrap, paired_difference, weighted_mean
from melens.item_rows import ItemRow, Rows
from melens.quantising.bench import SchemeBench
from melens.quantising.layers import linear_layers, whole_layers
from melens.quantising.schemes import Scheme
from melens.quantising.trials import TrialPlan
from melens.results.evaluation import Delta, Score
from melens.results.quantise import Quantisation, QuantisedTrial, SchemeTrials

BASE, DIVERGES, AGREES = "base", "kl", "agreement"
"""Names among a row's further measures: loss of the model as it is, KL, agreement."""
Column = Float[Tensor, " text"]


@dataclass(frozen=True)
class SchemeRun:
    """A scheme that was run."""

    scheme: Scheme
    trials: Sequence[TrialPlan]
    passes: int
    bits: Mapping[str, float | None]
    """By trial."""


def condition(scheme: Scheme, trial: TrialPlan) -> str:
    """What rows of a scheme and trial are named."""
    return f"{scheme.name}: {trial.key}"


def assembled(
    bench: SchemeBench, ran: Sequence[SchemeRun], rows: Rows, *, seed: int
) -> Quantisation:
    """The result, from finished rows alone."""
    tests = 2 * sum(trial.role == "protected" for one in ran for trial in one.trials)
    tables = [_Table(one, rows, seed, max(tests, 1)) for one in ran]
    missed = bench.plain.missed
    first = tables[0].columns["as is"]
    located, prefix = bench.located, bench.prefix
    run = bench.inputs.run_info(
        seed=seed,
        items=rows.key,
        first_tokens=bench.protect.first,
        me_layer_of=located.run.settings.get("ids"),
    )
    return Quantisation(
        base_loss=_score(first.base, first.weight, seed),
        texts=len(first.weight),
        tokens=int(first.weight.sum()),
        massive_tokens=bench.texts.massive_count,
        calibration_texts=len(bench.others),
        me_layer=located.me_layer,
        n_layers=bench.plain.n_layers,
        prefix=() if prefix is None else prefix.token_ids,
        left_out=tuple(f"{name}: {why}" for name, why in bench.left_out.items()),
        schemes=tuple(table.trials(missed) for table in tables),
        model_type=getattr(bench.plain.hf.config, "model_type", None),
        linear=tuple(linear_layers(bench.plain)),
        whole=whole_layers(bench.plain),
        run=run,
    )


@dataclass(frozen=True)
class _Columns:
    """One trial, text by text."""

    loss: Column
    base: Column
    kl: Column
    agreement: Column
    weight: Column
    kept: int

    @classmethod
    def of(cls, rows: Sequence[ItemRow]) -> _Columns:
        base, kl, agreement = (
            torch.tensor([row.also[name][0] for row in rows]).double()
            for name in (BASE, DIVERGES, AGREES)
        )
        loss = torch.tensor([row.value for row in rows]).double()
        weight = torch.tensor([row.weight for row in rows]).double()
        return cls(loss, base, kl, agreement, weight, sum(row.about["kept"] for row in rows))

    @property
    def damage(self) -> Column:
        """Nats that rounding costs each text."""
        return self.loss - self.base


class _Table:
    """All trials of one scheme."""

    def __init__(self, ran: SchemeRun, rows: Rows, seed: int, tests: int) -> None:
        self.ran, self.seed, self.tests = ran, seed, tests
        self.columns: dict[str, _Columns] = {}
        for trial in ran.trials:
            found = rows.of(condition(ran.scheme, trial))
            order = sorted(found, key=int)
            self.columns[trial.key] = _Columns.of([found[item] for item in order])
        self.as_is = self.columns["as is"]

    def trials(self, missed: tuple[str, ...]) -> SchemeTrials:
        made = [self._trial(trial) for trial in self.ran.trials]
        return SchemeTrials(
            scheme=self.ran.scheme.name,
            about=self.ran.scheme.said(),
            passes=self.ran.passes,
            unrounded=missed if self.ran.scheme.weights or self.ran.scheme.inputs else (),
            trials=tuple(made),
        )

    def _trial(self, trial: TrialPlan) -> QuantisedTrial:
        own, seed = self.columns[trial.key], self.seed
        kept = trial is not self.ran.trials[0]
        return QuantisedTrial(
            name=trial.name,
            role=trial.role,
            control_of=trial.control_of,
            seed=trial.seed,
            tokens=own.kept,
            weights=tuple(
                _named(name, at) for name, found in trial.entries.items() for at in found
            ),
            modules=tuple(sorted(trial.modules)),
            bits=self.ran.bits[trial.key],
            loss=_score(own.loss, own.weight, seed),
            damage=_apart(own.loss, own.base, own.weight, seed),
            kl=_score(own.kl, own.weight, seed),
            agreement=_score(own.agreement, own.weight, seed),
            bought=_apart(self.as_is.damage, own.damage, own.weight, seed) if kept else None,
            share=self._share(own) if kept else None,
            beyond_random=self._beyond(trial, lambda found: found.damage),
            kl_beyond_random=self._beyond(trial, lambda found: found.kl),
        )

    def _share(self, own: _Columns) -> Score | None:
        """Part of the damage as is that goes away, a ratio of means; texts drawn together."""
        whole = _apart(self.as_is.loss, self.as_is.base, own.weight, self.seed)
        if whole.interval is None or whole.interval[0] <= 0:
            return None
        bought, damage = self.as_is.damage - own.damage, self.as_is.damage
        value = float((bought * own.weight).sum() / (damage * own.weight).sum())
        found = bootstrap(_ratio, bought * own.weight, damage * own.weight, seed=self.seed)
        return Score(value=value, interval=found)

    def _beyond(self, trial: TrialPlan, of: Callable[[_Columns], Column]) -> Delta | None:
        """How much more random ones leave of a measure than this."""
        if trial.role != "protected":
            return None
        same = [t for t in self.ran.trials if t.control_of == trial.name]
        controls = [of(self.columns[t.key]) for t in same]
        if not controls:
            return None
        own = self.columns[trial.key]
        apart = torch.stack(controls).mean(0) - of(own)
        found = weighted_mean(apart, own.weight, seed=self.seed, tests=self.tests)
        return Delta(value=found.value, interval=found.interval)


def _ratio(bought: Tensor, damage: Tensor) -> Tensor:
    return bought.sum(-1) / damage.sum(-1)


def _score(values: Column, weights: Column, seed: int) -> Score:
    found = weighted_mean(values, weights, seed=seed)
    return Score(value=found.value, interval=found.interval)


def _apart(one: Column, other: Column, weights: Column, seed: int) -> Delta:
    found = paired_difference(one, other, weights, seed=seed)
    return Delta(value=found.value, interval=found.interval)


def _named(name: str, at: tuple[int, ...]) -> str:
    return f"{name}[{','.join(map(str, at))}]"
