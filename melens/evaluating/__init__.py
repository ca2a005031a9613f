"""What a model can do with an edit and without it, paired by item, with doses and controls."""

from melens.evaluating.edits import Plan
from melens.evaluating.run import Settings, evaluate
from melens.evaluating.tasks import Source

__all__ = ["Plan", "Settings", "Source", "evaluate"]
