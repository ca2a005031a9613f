"""Whether any setting of the mask improves a model: a search, confirmed on held-out items."""

from melens.tuning.items import Objective
from melens.tuning.search import tune
from melens.tuning.space import Budget, Space

__all__ = ["Budget", "Objective", "Space", "tune"]
