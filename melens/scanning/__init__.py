"""What can be said of a model that is not run: ceilings from its weights; and the reach."""

from melens.scanning.predict import scan
from melens.scanning.reaching import reach

__all__ = ["reach", "scan"]
