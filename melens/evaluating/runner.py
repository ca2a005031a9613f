"""The one loop over items: batches under conditions, a row an item and condition, kept at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from melens.evaluating.edits import EditCondition, check_held
from melens.evaluating.forced import Forced, ItemOutcome, Runner
from melens.evaluating.scores import Setup
from melens.item_rows import ItemRow, Rows
from melens.protocols import JsonObject
from melens.settings import Progress

MakeRow = Callable[[ItemOutcome], ItemRow]
"""What is kept of one item under one condition."""


@dataclass
class ItemLoop:
    """Runs what the rows do not hold yet; they are its only memory, so that a kill loses a batch.

    Batches are those of the whole list, whatever an earlier run left of it: floating-point sums of
    a run that goes on are those of an uninterrupted one.
    """

    runner: Runner
    rows: Rows
    make: MakeRow
    ran: int = 0
    """Batches that were run, not found in the rows."""

    def run(
        self,
        items: Sequence[Forced],
        conditions: Sequence[EditCondition] | None = None,
        *,
        batch_tokens: int | None = None,
        progress: Progress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        """Every item under every condition, items of like length together, the longest first.

        Args:    conditions: None = all of the runner's; else some of them, the unedited first.
                 batch_tokens: tokens a batch, padding included; None = the runner's.
                 progress: called with (items done, items in all).
                 stop: asked before every batch that has to be run; True ends the loop.
        """
        todo, done = conditions or self.runner.conditions, 0
        for batch in self.runner.batches(items, batch_tokens):
            if not all(self.rows.has(item.id, c.name) for item in batch for c in todo):
                if stop is not None and stop():
                    return
                outcome = self.runner.outcome(batch, todo)
                self.rows.add([self.make(one) for one in outcome.each()])
                self.ran += 1
            done += len(batch)
            if progress is not None:
                progress(done, len(items))


def rows_of_items(
    bench: Setup,
    items: Sequence[Forced],
    make: MakeRow,
    facts: JsonObject,
) -> Rows:
    """All items under all of a setup's conditions; what its file of items holds is taken up.

    Args:    facts: what the rows depend on, beside the setup.
    Raises:  InterventionError: no item holds a massive token. ResultError: the file is of another
             evaluation.
    """
    check_held(bench.model, bench.me_layer, [item.ids for item in items])
    rows = Rows(bench.run.keep, bench.facts(**facts))
    runner = Runner(
        bench.inputs, bench.conditions, bench.me_layer, batch_tokens=bench.run.batch_tokens
    )
    ItemLoop(runner, rows, make).run(items, progress=bench.run.progress)
    return rows
