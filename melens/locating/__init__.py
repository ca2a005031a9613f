"""Locating the ME Layer: the layer where what stays of a massive activation first appears."""

from melens.locating.criteria import CRITERIA
from melens.locating.search import locate

__all__ = ["CRITERIA", "locate"]
