"""long_context(): what an edit does to finding things in long texts, and to loss by position.

An answer counts as found if every one of its tokens is the likeliest, given the right ones before
it. That is exactly greedy decoding: up to the first wrong token both see the same context, so the
greedy answer begins with the right one if and only if no token is wrong. Nothing is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch

from melens import locating
from melens.batches import prompts
from melens.errors import PromptError
from melens.evaluating.edits import EditCondition, check_edit, conditions, unedited
from melens.evaluating.forced import Forced, Foreseen, ItemOutcome
from melens.evaluating.haystack import Haystack, bins, haystacks, plain_texts
from melens.evaluating.runner import rows_of_items
from melens.evaluating.scores import Setup
from melens.framing import bos_first, require_known
from melens.intervals import paired_difference, weighted_mean
from melens.item_rows import ItemRow, Rows
from melens.protocols import HookedModel, JsonObject, ModelLike
from melens.provenance import RunInfo
from melens.results.edit import Edit
from melens.results.evaluation import Delta, Score
from melens.results.long_context import (
    LengthCell,
    LengthRetrieval,
    LongCondition,
    LongContext,
    PositionBin,
    Retrieval,
)
from melens.results.reading import HoldsMELayer
from melens.settings import Compare, Run, setting_of
from melens.store import digest

PER_BIN = 128
"""Scored positions of a plain text in each of its bins, at most."""
ABOUT = {
    "passkey": "One five-digit number hidden in running text and asked for at the end",
    "needles": "Several cities' five-digit numbers hidden in running text, one asked for at the "
    "end, the others in the way",
}


def light_comparison(edit: Edit) -> Compare:
    """What is compared unless told otherwise, since long runs are expensive.

    Half the edit's dose, half-way from it to the whole, and one draw of random dimensions.
    """
    return Compare(rates=_around(edit.rate), strengths=_around(edit.strength), seeds=(0,))


def _around(dose: float) -> tuple[float, ...]:
    return tuple(sorted({dose / 2, (1 + dose) / 2} - {0.0, dose}))


def long_context(
    model: ModelLike,
    edit: Edit | None = None,
    *,
    me_layer: HoldsMELayer | None = None,
    haystack: Haystack | None = None,
    compare: Compare | None = None,
    run: Run | None = None,
) -> LongContext:
    """Hold an edit against the unedited model on long texts, item by item.

    Args:    model: a name, a path, a transformers model or a bridge.
             edit: None = WeMask by gamma, rate 0.5, all layers after the ME Layer.
             me_layer: what ``melens.locate`` returns; None = located here on the bundled texts,
             with the first token that the items have.
             haystack: what is hidden where, and in which text; plain texts.
             compare: None = one dose below the edit's and one above, one draw of random dimensions.
             run: seed, batches, file of items, progress (plain texts included).
    Returns: found and loss by length and depth, loss by position, paired differences with 95 %
             bootstrap intervals over items (over texts for positions).
    Raises:  PromptError: lengths that do not fit the model or the question, a text that cannot be
             read or is too short. InterventionError, SiteError: an edit that this model cannot
             follow, or that changes
             nothing. ResultError: the file of items is of another run, or ``me_layer`` of another
             model.
    """
    edit, haystack = edit or Edit(), haystack or Haystack()
    check_edit(edit)
    inputs, found = unedited(model, me_layer)
    hidden, plain = items_of(inputs.model, haystack)
    found = found or locating.locate(inputs, prompts(bos=haystack.bos, chat=haystack.chat))
    chosen = conditions(inputs.model, edit, found, compare or light_comparison(edit))
    job = _LongJob(
        Setup(inputs, chosen, found, setting_of(run, Run, "run")), haystack, hidden, plain
    )
    return job.assembled(job.rows())


def items_of(
    model: HookedModel, haystack: Haystack
) -> tuple[tuple[Forced, ...], tuple[Forced, ...]]:
    """The haystacks, and the plain texts; no forward pass.

    Args:    model: a bridge.
    Raises:  PromptError: as :func:`long_context`.
    """
    if model.tokenizer is None:
        raise PromptError("this model has no tokenizer; load it with melens.load(..., tokenizer=).")
    context = getattr(model.cfg, "n_ctx", None)
    hidden = haystacks(model.tokenizer, haystack, context=context)
    plain: tuple[Forced, ...] = ()
    if haystack.plain:
        longest = max(haystack.lengths)
        plain = plain_texts(
            model.tokenizer, haystack, length=longest, n=haystack.plain, per_bin=PER_BIN
        )
    require_known([item.ids for item in (*hidden, *plain)], model.cfg.d_vocab)
    return hidden, plain


@dataclass(frozen=True)
class _LongJob:
    """Items under their conditions."""

    bench: Setup
    haystack: Haystack
    hidden: tuple[Forced, ...]
    plain: tuple[Forced, ...]

    @property
    def _items(self) -> tuple[Forced, ...]:
        return (*self.hidden, *self.plain)

    def rows(self) -> Rows:
        """Every item under every condition."""
        facts = {"task": f"long-context {self.haystack.task}", "items": _hash(self._items)}
        return rows_of_items(self.bench, self._items, _row, facts)

    def assembled(self, rows: Rows) -> LongContext:
        """The result, from the rows alone."""
        base = rows.of("base")
        made = [self._condition(c, rows.of(c.name), base) for c in self.bench.conditions]
        by_role = {
            role: tuple(c for c in made if c.role == role) for role in ("dose", "control", "rival")
        }
        hay, path = self.haystack, self.bench.run.keep
        return LongContext(
            task=cast(Literal["passkey", "needles"], hay.task),
            needles=hay.needles if hay.task == "needles" else 1,
            lengths=hay.lengths,
            depths=hay.depths,
            seeds=hay.seeds,
            n=len(self.hidden),
            edit=made[1].edit,
            me_layer=self.bench.me_layer.me_layer,
            base=made[0],
            edited=made[1],
            dose=by_role["dose"],
            controls=by_role["control"],
            rivals=by_role["rival"],
            texts=len(self.plain),
            text_length=len(self.plain[0].ids) if self.plain else None,
            items=path and path.name,
            about=self._about(),
            run=self._run_info(rows.key),
        )

    def _about(self) -> str:
        how = (
            "the chat template, the answer begun"
            if self.haystack.chat
            else "'Question: ... Answer: ...', the answer begun"
        )
        text = (
            f"{ABOUT[self.haystack.task]} by {how}; lengths count question and answer. Found = "
            "greedy decoding gives the number, read off by teacher forcing. Every item has its own "
            "number and place in the text."
        )
        if self.haystack.text is None:
            text += " The text is the bundled English prose, repeated where it is too short."
        if self.plain:
            text += (
                f" Loss by position: {len(self.plain)} stretches of plain text as long as the "
                f"longest item, at most {PER_BIN} positions a bin."
            )
        return text

    def _run_info(self, key: str) -> RunInfo:
        source = self.haystack.text
        name = source.name if isinstance(source, Path) else "given" if source else "bundled"
        hay, bench = self.haystack, self.bench
        return bench.inputs.run_info(
            seed=bench.run.seed,
            items=key,
            ids=_hash(self._items),
            chat=hay.chat,
            bos=hay.bos,
            haystack_seed=hay.seed,
            text=name,
            bos_first=bos_first(bench.model.tokenizer, [item.ids for item in self.hidden]),
            me_layer_of=bench.me_layer.run.settings.get("ids"),
        )

    def _condition(
        self, condition: EditCondition, found: dict[str, ItemRow], base: dict[str, ItemRow]
    ) -> LongCondition:
        pair = _Pair(found, None if condition.role == "base" else base, self.bench.run.seed)
        lengths = {
            n: [i.id for i in self.hidden if i.about["length"] == n] for n in self.haystack.lengths
        }
        cells = [
            _cell(
                length,
                depth,
                [
                    found[i.id]
                    for i in self.hidden
                    if (i.about["length"], i.about["depth"]) == (length, depth)
                ],
            )
            for length in self.haystack.lengths
            for depth in self.haystack.depths
        ]
        texts = [item.id for item in self.plain]
        whole = pair.score(texts, None) if texts else (None, None)
        ids = [item.id for item in self.hidden]
        energies = [row.also["energy"][0] for row in found.values() if "energy" in row.also]
        return LongCondition(
            name=condition.name,
            role=condition.role,
            edit=condition.edit,
            overall=Retrieval.model_validate(pair.retrieval(ids)),
            by_length=tuple(
                LengthRetrieval.model_validate({"length": n, **pair.retrieval(chosen)})
                for n, chosen in lengths.items()
            ),
            cells=tuple(cells),
            text_loss=whole[0],
            text_delta=whole[1],
            bins=tuple(self._bin(pair, low, high) for low, high in self._bins()),
            energy=sum(energies) / len(energies) if energies else None,
        )

    def _bins(self) -> tuple[tuple[int, int], ...]:
        return bins(len(self.plain[0].ids)) if self.plain else ()

    def _bin(self, pair: _Pair, low: int, high: int) -> PositionBin:
        texts = [item.id for item in self.plain]
        loss, delta = pair.score(texts, f"from {low}")
        tokens = sum(pair.found[name].also[f"from {low}"][1] for name in texts)
        return PositionBin(start=low, stop=high, tokens=int(tokens), loss=loss, delta=delta)


@dataclass(frozen=True)
class _Pair:
    """One condition's rows beside the base's; None for the base itself."""

    found: dict[str, ItemRow]
    base: dict[str, ItemRow] | None
    seed: int

    def retrieval(self, ids: Sequence[str]) -> JsonObject:
        """Found and loss of these items."""
        exact, exact_delta = self.score(ids, None)
        loss, loss_delta = self.score(ids, "loss")
        return {
            "n": len(ids),
            "found": exact,
            "loss": loss,
            "found_delta": exact_delta,
            "loss_delta": loss_delta,
        }

    def score(self, ids: Sequence[str], what: str | None) -> tuple[Score, Delta | None]:
        """Mean of the rows' value (None) or a further measure, and its difference to the base."""
        values, weights = _columns([self.found[i] for i in ids], what)
        mean = weighted_mean(values, weights, seed=self.seed)
        score = Score(value=mean.value, interval=mean.interval)
        if self.base is None:
            return score, None
        before, _ = _columns([self.base[i] for i in ids], what)
        apart = paired_difference(values, before, weights, seed=self.seed)
        return score, Delta(value=apart.value, interval=apart.interval)


def _columns(rows: Sequence[ItemRow], what: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [(row.value, row.weight) if what is None else row.also[what] for row in rows]
    both = torch.tensor(pairs, dtype=torch.float64)
    return both[:, 0], both[:, 1]


def _cell(length: int, depth: float, rows: Sequence[ItemRow]) -> LengthCell:
    losses, weights = _columns(rows, "loss")
    return LengthCell(
        length=length,
        depth=depth,
        n=len(rows),
        found=round(sum(row.value for row in rows)),
        loss=weighted_mean(losses, weights).value,
    )


def _hash(items: Sequence[Forced]) -> str:
    return digest([repr([(item.id, item.ids, item.scored) for item in items])])


def _row(one: ItemOutcome) -> ItemRow:
    value, weight, also = score_of(one.item, one.found)
    if one.energy is not None:
        also["energy"] = (one.energy, 1.0)
    # The prompt of a long item is long: once is enough.
    about = {k: v for k, v in one.item.about.items() if one.condition == "base" or k != "prompt"}
    return ItemRow(one.item.id, one.condition, value, weight, also, about)


def score_of(
    item: Forced, foreseen: Foreseen
) -> tuple[float, float, dict[str, tuple[float, float]]]:
    """Value, weight and further measures of an item.

    A hidden number: 1 if it is found, and the loss of its tokens. A plain text: its mean loss, and
    that of the positions in each bin.
    """
    loss = foreseen.loss.double()
    mean = (float(loss.mean()), float(len(loss)))
    if item.about["task"] != "plain":
        return float(bool(foreseen.right.all())), 1.0, {"loss": mean}
    at = torch.tensor(item.scored).nonzero()[:, 0]
    also = {}
    for low, high in bins(len(item.ids)):
        inside = loss[(at >= low) & (at < high)]
        also[f"from {low}"] = (float(inside.mean()), float(len(inside)))
    return mean[0], mean[1], also
