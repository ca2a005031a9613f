"""What can be said of a model that is not run: ceilings from its weights; and the reach."""

from melens.scanning.reaching import reach
from melens.scanning.weights import scan

__all__ = ["reach", "scan"]
