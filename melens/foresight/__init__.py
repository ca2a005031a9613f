"""What can be said of a model that is not run: ceilings from its weights."""

from melens.foresight.weights import scan

__all__ = ["scan"]
