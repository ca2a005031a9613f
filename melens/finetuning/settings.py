"""How to train: one object, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, get_args

from melens.errors import InterventionError
from melens.formatting import brief
from melens.interventions.core import check_number
from melens.protocols import JsonObject, Options
from melens.registry import did_you_mean
from melens.results.edit import Edit
from melens.results.finetune import MaskedIn

Method = Literal["lora", "full", "sink"]
At = Literal["all", "me-layer"]
Objective = Literal["sft", "dpo", "grpo"]
RATES: dict[Method, float] = {"lora": 2e-4, "full": 2e-5, "sink": 1e-2}
"""Learning rates where none is given."""
COUNTS = (
    "steps",
    "batch_size",
    "accumulate",
    "rank",
    "save_every",
    "look_every",
    "generations",
    "max_new_tokens",
)
LEAST_TOKENS = 4
MOST_SEED = 2**32 - 1
NO_MASK = Edit(name="none")


@dataclass(frozen=True)
class Training:
    """What is trained, for how long, and when the mask is in force."""

    method: Method = "lora"
    """lora: low-rank adapters. full: every weight. sink: one key and value a layer, in place of
    the first token."""
    at: At = "all"
    """all: LoRA on every linear layer of the blocks, or every weight. me-layer: the ME Layer's FFN
    and the norm that it reads through."""
    objective: Objective | None = None
    """sft: the answer's tokens. dpo: the better of two answers. grpo: answers of the model's own,
    by a reward. None = dpo for pairs of answers, sft for everything else."""
    remedy: Literal["none", "focus"] = "none"
    """focus: fast weights under a two-way context (FocuSFT, arXiv 2605.09932); of lora and sft."""
    mask: Edit = NO_MASK
    masked_in: MaskedIn = "both"
    """In training alone, at inference alone, or both; without a mask this says nothing. Losses on
    held-out rows are taken as the training's are."""
    steps: int = 100
    """Of the optimiser."""
    batch_size: int = 4
    accumulate: int = 1
    """Batches a step."""
    learning_rate: float | None = None
    """None = RATES of the method; linear decay to 0 from there."""
    max_tokens: int = 256
    """Longer rows are left out and counted, never cut."""
    rank: int = 8
    packing: bool = False
    """Several texts a row, none of which sees another."""
    checkpointing: bool = False
    """Compute blocks again in the backward pass instead of keeping them."""
    bf16: bool = False
    """Autocast to bfloat16; weights stay as they are loaded."""
    save_every: int = 50
    """Steps between checkpoints, and between evaluations."""
    look_every: int = 20
    """Steps between two looks at the ME Layer."""
    reward: str = "math"
    """Of grpo: math, 1 where the answer's number is the row's by the strict scorer, else 0; or
    module:function of your own, ``(completions, answer, **rest) -> numbers``, as TRL calls it."""
    generations: int = 4
    """Answers a prompt, of grpo; ``batch_size`` must be a multiple."""
    max_new_tokens: int = 64
    """Of an answer that grpo draws."""
    chat: bool | None = None
    """None = the chat template where there is one."""
    chat_template: str | None = None
    """A template of one's own (Jinja), in place of the tokenizer's."""
    device: str | None = None
    """None = CUDA, else MPS, else CPU."""
    report_to: tuple[str, ...] = ()
    """Trackers of transformers, e.g. tensorboard; losses and looks are in the folder anyway."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:  InterventionError: naming the setting and what would fit.
        """
        for name, choices in (("method", Method), ("at", At), ("masked_in", MaskedIn)):
            check_choice(name, getattr(self, name), get_args(choices))
        if self.objective is not None:
            check_choice("objective", self.objective, get_args(Objective))
        for name in COUNTS:
            check_whole(name, getattr(self, name), 2 if name == "generations" else 1)
        check_whole("seed", self.seed, 0)
        if self.seed > MOST_SEED:
            raise InterventionError(f"seed must be at most {MOST_SEED}, got {self.seed}.")
        if isinstance(self.report_to, str):
            raise InterventionError(
                f"report_to must be a list of names, got {self.report_to!r:.40}."
            )
        if self.max_tokens < LEAST_TOKENS:
            raise InterventionError(
                f"max_tokens must be at least {LEAST_TOKENS}, got {self.max_tokens}."
            )
        rate = self.learning_rate
        if rate is not None and not 0 < check_number("learning_rate", rate) < 1:
            raise InterventionError(f"learning_rate must be between 0 and 1, got {rate}.")
        if not isinstance(self.mask, Edit) or self.mask.name not in ("none", "wemask"):
            raise InterventionError(
                f"mask must be a melens.results.Edit called wemask or none, got {self.mask!r:.60}."
            )
        self._go_together()
        if self.report_to:
            check_trackers(self.report_to)

    def _go_together(self) -> None:
        """Refuse settings that exclude each other."""
        check_choice("remedy", self.remedy, ("none", "focus"))
        if self.remedy == "focus" and (
            self.method != "lora" or self.objective in ("dpo", "grpo") or self.packing
        ):
            raise InterventionError(
                "remedy='focus' puts fast LoRA weights beside those that are trained, on one text "
                "a row: it needs method='lora', objective='sft' and no packing."
            )
        if self.method == "sink" and (self.packing or self.at != "all" or self.checkpointing):
            raise InterventionError(
                "method='sink' trains one key and value a layer: packing, checkpointing and "
                "at='me-layer' do not go with it."
            )
        if self.method == "sink" and self.objective in ("dpo", "grpo"):
            raise InterventionError(
                f"method='sink' leaves the first token out of every text, which TRL's trainer for "
                f"{self.objective} cannot; use method='lora' or objective='sft'."
            )
        if self.checkpointing and self.objective in ("dpo", "grpo"):
            raise InterventionError(
                f"checkpointing is for sft: TRL's trainer for {self.objective} switches it off and "
                "on again by itself, and a block computed again would not know its tokens."
            )
        if self.accumulate > 1 and self.objective == "grpo":
            raise InterventionError(
                "grpo draws answers for several batches at once where it accumulates, and would "
                "not go on the same after an interruption; use a larger batch_size."
            )
        if self.packing and self.objective in ("dpo", "grpo"):
            raise InterventionError(f"packing is for sft; {self.objective} pads its answers.")
        if self.objective == "grpo" and self.batch_size % self.generations:
            raise InterventionError(
                f"batch_size must be a multiple of generations ({self.generations}) for grpo, got "
                f"{self.batch_size}."
            )

    @property
    def rate(self) -> float:
        """The learning rate that is used."""
        return RATES[self.method] if self.learning_rate is None else self.learning_rate

    @property
    def trains_masked(self) -> bool:
        """Whether the mask is in force in training."""
        return self.mask.name != "none" and self.masked_in in ("training", "both")

    def facts(self) -> JsonObject:
        """What the weights depend on, for a run's record and the key of what is kept."""
        made = {**asdict(self), "mask": self.mask.model_dump(mode="json")}
        return {name: value for name, value in made.items() if name != "report_to"}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that transformers does not know, or that are not installed.

    Raises:  InterventionError: naming those that are there.
    """
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    there = get_available_reporting_integrations()
    if missing := [name for name in names if name not in there]:
        raise InterventionError(
            f"report_to: {brief(missing[0], 40)} is no tracker that is installed here (there are: "
            f"{', '.join(there) or 'none'}); losses and looks are in the folder anyway."
        )


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse what is no whole number from ``least`` on.

    Raises:  InterventionError: naming the setting.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InterventionError(
            f"{name} must be a whole number from {least}, got {brief(value, 40)}."
        )


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is none of several words.

    Raises:  InterventionError: naming them, and the nearest.
    """
    if value not in choices:
        raise InterventionError(
            f"{name} must be one of {', '.join(choices)}, got {brief(value, 40)}."
            f"{did_you_mean(str(value), choices)}"
        )


def training_of(given: Training | None, settings: Options) -> Training:
    """Settings given as one object, as single words, or both; words win.

    Raises:  InterventionError: an unknown word, or no ``Training``.
    """
    if given is not None and not isinstance(given, Training):
        raise InterventionError(f"how must be a melens.finetuning.Training, got {given!r:.60}.")
    known = [field.name for field in fields(Training)]
    for name in settings:
        if name not in known:
            raise InterventionError(
                f"finetune takes no {name!r:.40}; its settings are {', '.join(known)}."
                f"{did_you_mean(name, known)}"
            )
    return replace(given or Training(), **settings)
