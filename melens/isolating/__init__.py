"""Which parameters make the massive activation: norm x FFN, neurons, super weights; controls."""

from melens.isolating.cause import isolate
from melens.isolating.means import mean_coordinates
from melens.isolating.super_weight_search import Search, super_weights

__all__ = ["Search", "isolate", "mean_coordinates", "super_weights"]
