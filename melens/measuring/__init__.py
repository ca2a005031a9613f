"""What the massive token does: its portrait, rank collapse, attention sinks, attention maps."""

from melens.measuring.attention_sinks import sinks
from melens.measuring.maps import attention
from melens.measuring.massive_token import describe
from melens.measuring.metric import metric_by_layer
from melens.measuring.one_pass import Measurements, measure_all
from melens.measuring.rank_collapse import collapse
from melens.measuring.token_mixers import mixers

__all__ = [
    "Measurements",
    "attention",
    "collapse",
    "describe",
    "measure_all",
    "metric_by_layer",
    "mixers",
    "sinks",
]
