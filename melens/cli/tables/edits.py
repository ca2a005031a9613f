"""The tables of what edits do: evaluations, long context, a search, a melens.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from melens.cli.listing import Listing, cell, table_of
from melens.formatting import interval_text, with_interval, within
from melens.protocols import JsonObject

if TYPE_CHECKING:
    from collections.abc import Sequence

    from melens.results.edit import Edit, EditFile
    from melens.results.evaluation import Evaluation, Score
    from melens.results.finetune import EmergenceRow, FineTuning, LossRow
    from melens.results.long_context import LongCondition, LongContext
    from melens.results.sidecar import Sidecar, SidecarLayer
    from melens.results.tune import Confirmed, Trial, Tuning

T = TypeVar("T")
NAMES = {"energy": "masked energy"}


@table_of("evaluate")
def _evaluate(result: Evaluation) -> Iterator[Listing]:
    better = "higher" if result.higher_is_better else "lower"
    rows = result.rows()
    yield Listing(
        f"{result.task}: {result.unit}, {better} is better; {result.n} items. In brackets 95 % "
        "bootstrap over items; delta = edited minus base, item by item:",
        [_effect(row) for row in rows],
    )
    yield Listing(
        "\nWhat each edit is, and further means over the same items:",
        [_beside(row) for row in rows],
    )
    yield Listing(f"\n{result.about}")
    if result.edited.also_delta:
        shown = ", ".join(
            f"{name.replace('_', ' ')} {with_interval(found.value, found.interval, '+.4g')}"
            for name, found in result.edited.also_delta.items()
        )
        yield Listing(f"Edited minus base: {shown}.")
    yield Listing("")


def _effect(row: JsonObject) -> JsonObject:
    delta = row["delta"]
    return {
        "condition": row["condition"],
        "role": row["role"],
        "value": cell(row["value"]),
        "interval": within(row["interval"], ".4g").strip() or "-",
        "delta": "-" if delta is None else f"{delta:+.4g}",
        "paired interval": within(row["delta_interval"], "+.4g").strip() or "-",
    }


def _beside(row: JsonObject) -> JsonObject:
    told = ("role", "value", "interval", "delta", "delta_interval")
    return {NAMES.get(name, name): value for name, value in row.items() if name not in told}


@table_of("long-context")
def _long_context(result: LongContext) -> Iterator[Listing]:
    yield Listing(
        f"{result.about}\n\nFound, and loss of the answers in nats a token; differences to no edit "
        "are paired by item, 95 % bootstrap:",
        [_overall(condition) for condition in result.conditions],
    )
    caption = "\nFound by length and depth (0 = before the text, 1 = right before the question):"
    shown = (result.base, result.edited, *result.controls)
    for length in result.lengths:
        rows = [_by_depth(condition, length, result.depths) for condition in shown]
        yield Listing(caption, rows)
        caption = ""
    if result.texts:
        yield Listing(
            f"\nLoss of {result.texts} plain texts by position from 0, nats a token, and each "
            "edit's difference to it:",
            [_bin(result, shown, i) for i in range(len(result.base.bins))],
        )
    yield Listing("")


def _overall(condition: LongCondition) -> JsonObject:
    whole = condition.overall
    return {
        "condition": condition.name,
        "edit": condition.edit.label,
        "found": f"{whole.found.value:.1%}{_change(whole.found_delta)}",
        "answer loss": f"{cell(whole.loss.value)}{_change(whole.loss_delta)}",
        "text loss": condition.text_loss
        and f"{cell(condition.text_loss.value)}{_change(condition.text_delta)}",
        "energy": condition.energy,
    }


def _by_depth(condition: LongCondition, length: int, depths: Sequence[float]) -> JsonObject:
    made: JsonObject = {"length": length, "condition": condition.name}
    for depth in depths:
        found = condition.cell(length, depth)
        made[f"depth {depth:g}"] = f"{found.found} of {found.n}"
    return made


def _bin(result: LongContext, shown: Sequence[LongCondition], i: int) -> JsonObject:
    here = result.base.bins[i]
    last = here.stop - 1
    name = f"{here.start}-{last}" if last > here.start else str(here.start)
    made: JsonObject = {"position": name, "tokens": here.tokens, "base": here.loss.value}
    for condition in shown[1:]:
        delta = condition.bins[i].delta
        made[condition.name] = _change(delta).strip()
    return made


def _change(delta: Score | None) -> str:
    return "" if delta is None else f" {with_interval(delta.value, delta.interval, '+.3g')}"


LISTED = 12


@table_of("tune")
def _tune(result: Tuning) -> Iterator[Listing]:
    better = "higher" if result.higher_is_better else "lower"
    ranked = sorted(result.trials, key=lambda trial: -result.sign * trial.delta)
    yield Listing(
        f"Development, differences to the unedited model in {result.unit} ({better} is better), "
        "95 % for each alone:",
        [_trial(trial) for trial in ranked[:LISTED]],
    )
    if len(ranked) > LISTED:
        yield Listing(f"... and {len(ranked) - LISTED} more in the JSON")
    if result.confirmed:
        yield Listing(
            f"\nHeld out, {result.confirmed[0].items} other items (unedited {result.base:.4g}):",
            [_confirmed(row) for row in result.confirmed],
        )
    yield Listing("\nRule: the race's best, confirmed on held-out items (in full: --explain).")
    if result.best is not None:
        yield Listing(f"\nTo use it: {flags(result.best)}")
    yield Listing("")


@table_of("finetune")
def _finetune(result: FineTuning) -> Iterator[Listing]:
    yield Listing(
        f"{result.texts:,} texts, {result.tokens:,} tokens; {result.too_long:,} too long and left "
        "out. Loss, nats a token where the objective is sft:",
        [_loss(row) for row in _ends([row for row in result.losses if row.loss is not None])],
    )
    if held := [
        row for row in result.losses if row.held_out is not None or row.held_out_reward is not None
    ]:
        yield Listing("\nOn held-out rows:", [_held_out(row) for row in _ends(held)])
    if result.looks:
        yield Listing(
            "\nThe ME Layer meanwhile (layers count from 0, at the block output):",
            [_look(row) for row in _ends(list(result.looks))],
        )
    yield Listing("")


def _ends(rows: list[T]) -> list[T]:
    """First, last and up to ten in between."""
    step = max(1, len(rows) // (LISTED - 1))
    return [*rows[:-1:step], *rows[-1:]]


def _loss(row: LossRow) -> JsonObject:
    return {"step": row.step, "loss": row.loss} | _rewarded("reward", row.reward)


def _held_out(row: LossRow) -> JsonObject:
    return {"step": row.step, "loss": row.held_out} | _rewarded("reward", row.held_out_reward)


def _rewarded(name: str, value: float | None) -> JsonObject:
    return {} if value is None else {name: value}


def _look(row: EmergenceRow) -> JsonObject:
    return {
        "step": row.step,
        "verdict": row.verdict,
        "ME Layer": row.me_layer,
        "coordinate": row.coordinate,
        "largest |x|": row.largest,
        "norm ratio": row.norm,
        "sink rate": row.sink_rate,
        "key rank": row.key_rank,
    }


def flags(edit: Edit) -> str:
    """The options under which other commands take this mask."""
    layers = edit.layers if isinstance(edit.layers, str) else ",".join(map(str, edit.layers))
    return (
        f"--mask-select {edit.select} --mask-rate {edit.rate:g} --mask-strength "
        f"{edit.strength:g} --mask-layers {layers}"
    )


def _trial(trial: Trial) -> JsonObject:
    return {
        "setting": trial.edit.label,
        "items": trial.items,
        "difference": f"{trial.delta:+.4g}{within(trial.interval, '+.3g')}",
        "masked energy": _percent(trial.energy),
        "stopped": "-" if trial.stopped_after is None else f"rung {trial.stopped_after}",
        "": "control" if trial.role == "control" else "",
    }


def _confirmed(row: Confirmed) -> JsonObject:
    return {
        "setting": row.edit.label,
        "difference": f"{row.delta:+.4g}{within(row.interval, '+.3g')}",
        "corrected": interval_text(row.corrected, "+.3g"),
        "optimism": "-" if row.optimism is None else f"{row.optimism:+.4g}",
        "masked energy": _percent(row.energy),
        "": "control" if row.role == "control" else "",
    }


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:z.1%}"


@table_of("edit")
def _edit(result: EditFile) -> Iterator[Listing]:
    yield Listing("", result.rows())


@table_of("sidecar")
def _sidecar(result: Sidecar) -> Iterator[Listing]:
    told = [row for row in result.layers if row.coordinate is not None]
    if told:
        yield Listing(
            f"Massive where |x[{result.dim}]| is above the threshold (block outputs, residual "
            "units); clip = 0.999 quantile of other tokens:",
            [_told(row) for row in told],
        )
    if result.protected:
        yield Listing(
            "\nWeights to keep in high precision, down_proj.weight[dim, neuron]:",
            [one.model_dump() for one in result.protected],
        )
    if result.outlier_dimensions:
        yield Listing(
            "\nDimensions that are large on nearly all tokens:",
            [one.model_dump() for one in result.outlier_dimensions],
        )
    yield Listing("")


def _told(row: SidecarLayer) -> JsonObject:
    pairs = zip(row.dims, row.values, strict=True)
    return {
        "layer": row.layer,
        "threshold": row.coordinate,
        "norm": row.norm or None,
        "massive": ", ".join(f"{dim}: {value:,.0f}" for dim, value in pairs),
        "clip": row.clip,
        "right_here": row.told,
    }
