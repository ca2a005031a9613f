"""Does the ME Layer survive training? A callback that looks every few steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from melens.batches import prompts
from melens.errors import InterventionError, ModelError
from melens.finetuning.keeping import append_row, cut_rows, read_rows
from melens.finetuning.settings import check_whole
from melens.inputs import Source, prepare
from melens.interventions.core import check_number
from melens.measuring.attention_sinks import T_PAPER, SinkPlan
from melens.measuring.located import run_once, settle
from melens.measuring.rank_collapse import RankPlan
from melens.models.attention import attention_sites
from melens.models.bridging import unwrapped
from melens.models.ffn import is_adapted
from melens.models.loading import adopt
from melens.models.view import merge_again, merged_view_of, parts_of, view_of
from melens.protocols import Tokenizer
from melens.results import Collapse, MELayer, Sinks
from melens.results.finetune import EmergenceRow

EVERY = 20
SHARE = 0.05
"""Of the training time, at most; a look that would cost more waits."""
N_SEQ, LENGTH = 4, 64
"""Of the fixed batch, where none is given."""


class EmergenceCallback(TrainerCallback):
    """Every ``every`` steps the emergence profile on a small fixed batch, written as rows.

    Usable with any ``transformers.Trainer``. It looks at the weights through a view of its own, in
    eval mode and without the edits that are open on the model; training is left as it was, its
    random numbers included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        texts: Source = None,
        *,
        every: int = EVERY,
        share: float = SHARE,
        file: Path | str | None = None,
        report: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        """Look at nothing yet.

        Args:    tokenizer: needed where ``texts`` are no token batches.
                 texts: as for ``melens.locate``; None = 4 x 64 tokens of the bundled ones.
                 every: steps. share: of the time since training began, at most; a look that is
                 due and would cost more is left for a later step. The first and the last step are
                 always looked at.
                 file: JSON lines, a row a look. report: called with the numbers of a look, named
                 ``emergence/...``: a trainer's ``log`` hands them to its trackers (TensorBoard
                 and the like). It may be set later, as ``callback.report``.
        Raises:  InterventionError: settings that cannot be meant.
        """
        check_whole("every", every, 1)
        if not 0 < check_number("share", share) <= 1:
            raise InterventionError(f"share must be above 0 and at most 1, got {share}.")
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise InterventionError(f"{file} is in no folder that exists; make it first.")
        self.every, self.share, self.rows = every, share, list[EmergenceRow]()
        self._tokenizer, self._texts, self.report = tokenizer, texts, report
        self._file = None if file is None else Path(file)
        self._began, self._spent = 0.0, 0.0
        self._view: nn.Module | None = None
        self._parts: list[object] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        processing_class: Tokenizer | None = None,
        **kwargs: object,
    ) -> None:
        """Look before the first step; the time of this look is not training's.

        Raises:  InterventionError: the file holds looks of another training.
        """
        if not state.is_world_process_zero:
            return
        self._began, self._spent = time.perf_counter(), 0.0
        if self._file is not None and state.global_step in _done(self._file, state.global_step):
            return  # taken up again where it was
        self.look(model, state.global_step, processing_class)
        self._began, self._spent = time.perf_counter(), 0.0

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        processing_class: Tokenizer | None = None,
        **kwargs: object,
    ) -> None:
        """Look where it is due and its share of the time allows it."""
        if not state.is_world_process_zero:
            return
        last = state.global_step >= state.max_steps > 0
        if last or (state.global_step % self.every == 0 and self._affordable()):
            self._log(self.look(model, state.global_step, processing_class))

    def look(self, model: nn.Module, step: int, tokenizer: Tokenizer | None = None) -> EmergenceRow:
        """Measure now, whatever the time.

        Raises:  PromptError: no tokenizer where texts need one. ModelError, ContractError: a model
                 whose hooks do not add up.
        """
        started = time.perf_counter()
        state = torch.get_rng_state()
        try:
            row = self._measured(model, step, tokenizer or self._tokenizer, started)
        except ModelError as error:
            if "NaN or Inf" not in str(error):
                raise
            row = _not_finite(step, time.perf_counter() - started)
        finally:
            torch.set_rng_state(state)
        self._spent += row.seconds
        self.rows.append(row)
        if self._file is not None:
            append_row(self._file, row.model_dump())
        return row

    def _affordable(self) -> bool:
        cost = self.rows[-1].seconds if self.rows else 0.0
        return self._spent + cost <= self.share * (time.perf_counter() - self._began)

    def _measured(
        self, model: nn.Module, step: int, tokenizer: Tokenizer | None, started: float
    ) -> EmergenceRow:
        plain = unwrapped(model)
        assert isinstance(plain, nn.Module)
        if self._texts is None:
            self._texts = prompts(n=N_SEQ, length=LENGTH)
        # bridged again where its bridge has copies of weights, which a step does not reach
        inputs = prepare(adopt(self._view_of(plain), tokenizer=tokenizer), self._texts)
        located = settle(inputs, None)
        sinks = SinkPlan(inputs, located, T_PAPER)
        ranks = RankPlan(inputs, located, attention_sites(inputs.model))
        run_once(inputs, ranks.taps, sinks.taps, progress=None)
        rated = sinks.result() if sinks.taps else None  # a state-space model has no attention
        seconds = time.perf_counter() - started
        return row_of(located.me_layer, rated, ranks.result(), step=step, seconds=seconds)

    def _view_of(self, model: nn.Module) -> nn.Module:
        """The model to be bridged: the one of the last look, while it has the same parts."""
        parts = parts_of(model)
        adapted = is_adapted(model)
        if self._view is None or parts != self._parts:
            self._view = merged_view_of(model) if adapted else view_of(model)
        elif adapted:  # what is added to the weights changes with every step
            merge_again(self._view, model)
        self._parts = parts
        return self._view

    def _log(self, row: EmergenceRow) -> None:
        """To the trackers that the trainer has (TensorBoard and the like)."""
        numbers = {
            f"emergence/{name}": float(value)
            for name, value in row.model_dump().items()
            if name in TRACKED and value is not None
        }
        if self.report is not None:
            self.report(numbers)


def _done(file: Path, step: int) -> list[int]:
    """Steps that were looked at up to here; of a training that is taken up, later ones come again.

    Raises:  InterventionError: a training begins, and the file goes on.
    """
    found = [row["step"] for row in read_rows(file)]
    if step:
        cut_rows(file, step)
    elif later := [one for one in found if one]:
        raise InterventionError(
            f"{file} holds looks of another training, up to step {max(later)}; name another file, "
            "or remove it."
        )
    return found


def _not_finite(step: int, seconds: float) -> EmergenceRow:
    """What there is to say of a model whose activations overflowed."""
    return EmergenceRow(
        step=step,
        verdict="not finite",
        me_layer=None,
        peak_layer=None,
        dims=(),
        coordinate=None,
        norm=None,
        largest=None,
        sink_rate=None,
        key_rank=None,
        by_layer=(),
        seconds=seconds,
    )


TRACKED = ("me_layer", "coordinate", "norm", "largest", "sink_rate", "key_rank", "seconds")


def row_of(
    located: MELayer, sinks: Sinks | None, ranks: Collapse, *, step: int, seconds: float
) -> EmergenceRow:
    """The numbers of three results that a row holds; no sink rate without attention."""
    first = located.massive[0] if located.massive else None
    after = [] if located.me_layer is None else ranks.curve("k")[0][max(located.me_layer, 0) + 1 :]
    known = [value for value in after if value is not None]
    peak = located.peak_layer
    return EmergenceRow(
        step=step,
        verdict=located.verdict,
        me_layer=located.me_layer,
        peak_layer=peak,
        dims=tuple(dict.fromkeys(token.dim for token in located.massive)),
        coordinate=first and first.value,
        norm=None if peak is None else located.profile[peak].norm_ratio,
        largest=max(row.max for row in located.profile),
        sink_rate=None if sinks is None else sinks.usual_rate,
        key_rank=sum(known) / len(known) if known else None,
        by_layer=tuple(row.max for row in located.profile),
        seconds=seconds,
    )
