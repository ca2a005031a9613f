"""What a model can do with an edit and without it, paired by item, with doses and controls."""

from melens.evaluation.conditions import Plan
from melens.evaluation.run import Settings, evaluate
from melens.evaluation.tasks import Source

__all__ = ["Plan", "Settings", "Source", "evaluate"]
