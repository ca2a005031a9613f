"""Training with an edit in force, and what becomes of the ME Layer meanwhile."""

from __future__ import annotations

from melens.finetuning.callback import EmergenceCallback
from melens.finetuning.merging import merge, trained_model
from melens.finetuning.planning import Plan, plan
from melens.finetuning.run import finetune
from melens.finetuning.settings import Training

__all__ = ["EmergenceCallback", "Plan", "Training", "finetune", "merge", "plan", "trained_model"]
