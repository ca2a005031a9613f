"""Which parameters make the massive activation: norm x FFN, neurons, super weights; controls."""

from melens.isolation.cause import isolate
from melens.isolation.means import mean_coordinates
from melens.isolation.super_weight_search import super_weights

__all__ = ["isolate", "mean_coordinates", "super_weights"]
