"""What the massive token does: its portrait, rank collapse, attention sinks, attention maps."""

from melens.measure.attention_sinks import sinks
from melens.measure.maps import attention
from melens.measure.massive_token import describe
from melens.measure.rank_collapse import collapse
from melens.measure.together import Measurements, measure_all

__all__ = ["Measurements", "attention", "collapse", "describe", "measure_all", "sinks"]
