"""What a model can do with an edit and without it, paired by item, with doses and controls."""

from melens.evaluating.run import evaluate
from melens.settings import Compare, Items, Run

__all__ = ["Compare", "Items", "Run", "evaluate"]
