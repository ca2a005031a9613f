"""What the stages of a check share: the model, its texts, and what was measured so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from melens.batches import Batch, padded_batches
from melens.batches import prompts as make_prompts
from melens.errors import ResultError
from melens.inputs import Inputs, Source, prepare
from melens.protocols import HookedModel, bridged_config
from melens.provenance import RunInfo
from melens.results import MELayer
from melens.results.base import Result

CAUSE_TOKENS = 64
"""Tokens of a text that single weights and blocks are edited on: each edit is a run of its own."""
VIEW_TOKENS = 48
"""Tokens of the first text that attention is shown over."""


@dataclass
class Bench:
    """A model on its texts; results are added as stages finish."""

    inputs: Inputs
    budget: str
    results: dict[str, Result] = field(default_factory=dict)
    schemes: tuple[str, ...] = ()
    """Number formats that the policy names."""

    @classmethod
    def of(
        cls, model: HookedModel, source: Source, budget: str, schemes: Sequence[str] = ()
    ) -> Bench:
        """Adopt the model and cut the texts, once for all stages.

        Raises:  PromptError, ModelError: as ``melens.locate``.
        """
        if source is None or isinstance(source, str):
            source = make_prompts("bundled" if source is None else source)
        return cls(prepare(model, source), budget, schemes=tuple(schemes))

    @property
    def model(self) -> HookedModel:
        """The bridge."""
        return self.inputs.model

    @property
    def located(self) -> MELayer:
        """What the stage ``locate`` found.

        Raises:  ResultError: it did not run.
        """
        found = self.results.get("locate")
        if not isinstance(found, MELayer):
            raise ResultError("the stage locate has to run first.")
        return found

    @cached_property
    def short(self) -> Inputs:
        """The texts' first CAUSE_TOKENS tokens."""
        return self.inputs.over(padded_batches([row[:CAUSE_TOKENS] for row in self.inputs.rows], 4))

    @cached_property
    def first(self) -> Inputs:
        """The first text's first VIEW_TOKENS tokens."""
        return self.inputs.over([Batch.pad([self.inputs.rows[0][:VIEW_TOKENS]])])

    def run_info(self) -> RunInfo:
        """The check's own record, with what the model's config says."""
        return self.inputs.run_info(
            seed=self.located.run.seed,
            budget=self.budget,
            **config_facts(self.model),
            varied_texts=sum(len(set(row)) > 1 for row in self.inputs.rows),
        )


def config_facts(model: HookedModel) -> dict[str, int | str | None]:
    """Context and sliding window, as the model's config has them; None where it has none."""
    config = bridged_config(model)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or getattr(model.cfg, "n_ctx", None)
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * model.cfg.n_layers
    layers = [str(i) for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    windowed = isinstance(window, int) and bool(layers)
    return {
        "context": context if isinstance(context, int) else None,
        "sliding_window": window if windowed else None,
        "windowed_layers": ",".join(layers) if windowed else None,
        "parameters": sum(p.numel() for p in _distinct(model)),
    }


def _distinct(model: HookedModel) -> list[torch.Tensor]:
    """Every parameter once, however often it is tied."""
    return list({id(p): p for p in model.parameters()}.values())
