"""Which parameters make the massive activation: norm x FFN, neurons, super weights; controls."""

from melens.isolation.cause import isolate

__all__ = ["isolate"]
