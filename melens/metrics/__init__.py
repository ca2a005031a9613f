"""Pure tensor functions, one file per notion; nothing here ever sees a model."""

from melens.metrics.direction import cosines, effective_number, write_shares
from melens.metrics.magnitude import (
    METRICS,
    Metric,
    heaviest_norm_ratio,
    layer_median,
    massive_ratio,
    max_magnitude,
    metric,
)

__all__ = [
    "METRICS",
    "Metric",
    "cosines",
    "effective_number",
    "heaviest_norm_ratio",
    "layer_median",
    "massive_ratio",
    "max_magnitude",
    "metric",
    "write_shares",
]
