"""What can be said of a model that is not run: ceilings from its weights; and the reach."""

from melens.foresight.reaching import reach
from melens.foresight.weights import scan

__all__ = ["reach", "scan"]
