"""How to train: one object, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from melens.errors import InterventionError
from melens.results.edit import Edit

Method = Literal["lora", "full", "sink"]
At = Literal["all", "me-layer"]
MaskedIn = Literal["off", "training", "inference", "both"]
RATES: dict[Method, float] = {"lora": 2e-4, "full": 2e-5, "sink": 1e-2}
"""Learning rates where none is given."""


@dataclass(frozen=True)
class Training:
    """What is trained, for how long, and when the mask is in force."""

    method: Method = "lora"
    """lora: low-rank adapters. full: every weight. sink: one key and value a layer, in place of
    the first token."""
    at: At = "all"
    """all: LoRA on every linear layer of the blocks, or every weight. me-layer: the ME Layer's FFN
    and the norm that it reads through."""
    mask: Edit = Edit(name="none")
    masked_in: MaskedIn = "both"
    """In training alone, at inference alone, or both; without a mask this says nothing."""
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
    chat: bool | None = None
    """None = the chat template where there is one."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:  InterventionError: naming the setting and what would fit.
        """
        for name, choices in (("method", Method), ("at", At), ("masked_in", MaskedIn)):
            if getattr(self, name) not in get_args(choices):
                raise InterventionError(
                    f"{name} must be one of {', '.join(get_args(choices))}, got "
                    f"{getattr(self, name)!r:.40}."
                )
        for name in ("steps", "batch_size", "accumulate", "rank", "save_every", "look_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InterventionError(f"{name} must be a whole number from 1, got {value!r:.40}.")
        if self.max_tokens < 4:
            raise InterventionError(f"max_tokens must be at least 4, got {self.max_tokens}.")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise InterventionError(
                f"learning_rate must be between 0 and 1, got {self.learning_rate}."
            )
        if self.mask.name not in ("none", "wemask"):
            raise InterventionError(f"the mask must be wemask or none, got {self.mask.name}.")
        if self.method == "sink" and (self.packing or self.at != "all" or self.checkpointing):
            raise InterventionError(
                "method='sink' trains one key and value a layer: packing, checkpointing and "
                "at='me-layer' do not go with it."
            )

    @property
    def rate(self) -> float:
        """The learning rate that is used."""
        return RATES[self.method] if self.learning_rate is None else self.learning_rate

    @property
    def trains_masked(self) -> bool:
        """Whether the mask is in force in training."""
        return self.mask.name != "none" and self.masked_in in ("training", "both")

    @property
    def infers_masked(self) -> bool:
        """Whether the trained model is used with the mask."""
        return self.mask.name != "none" and self.masked_in in ("inference", "both")

    def facts(self) -> dict[str, Any]:
        """All of it, for a run's record and the key of what is kept."""
        return {**asdict(self), "mask": self.mask.model_dump(mode="json")}
