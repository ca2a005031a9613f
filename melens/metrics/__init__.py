"""Pure tensor functions, one file per notion; nothing here ever sees a model."""

from melens.metrics.attention import attention_entropy, key_attention, uniform_alpha
from melens.metrics.direction import cosines, effective_number, write_shares
from melens.metrics.loss import next_token_loss, sequence_loss
from melens.metrics.magnitude import (
    METRICS,
    Metric,
    heaviest_norm_ratio,
    layer_median,
    massive_ratio,
    max_magnitude,
    metric,
)
from melens.metrics.spectrum import (
    SPECTRAL,
    effective_rank,
    effective_rank_centred,
    matrix_entropy,
    matrix_entropy_centred,
    participation_ratio,
    participation_ratio_centred,
    stable_rank,
    stable_rank_centred,
    top1_share,
    top1_share_centred,
)

__all__ = [
    "METRICS",
    "SPECTRAL",
    "Metric",
    "attention_entropy",
    "cosines",
    "effective_number",
    "effective_rank",
    "effective_rank_centred",
    "heaviest_norm_ratio",
    "key_attention",
    "layer_median",
    "massive_ratio",
    "matrix_entropy",
    "matrix_entropy_centred",
    "max_magnitude",
    "metric",
    "next_token_loss",
    "participation_ratio",
    "participation_ratio_centred",
    "sequence_loss",
    "stable_rank",
    "stable_rank_centred",
    "top1_share",
    "top1_share_centred",
    "uniform_alpha",
    "write_shares",
]
