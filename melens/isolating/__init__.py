"""Which parameters make the massive activation: norm x FFN, neurons, super weights; controls."""

from melens.isolating.cause import isolate
from melens.isolating.means import mean_coordinates
from melens.isolating.super_weight_search import Search, find_super_weights, super_weights

__all__ = ["Search", "find_super_weights", "isolate", "mean_coordinates", "super_weights"]
