"""Locating the ME Layer: the layer where what stays of a massive activation first appears."""

from melens.emergence.criteria import CRITERIA
from melens.emergence.search import locate

__all__ = ["CRITERIA", "locate"]
