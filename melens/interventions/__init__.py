"""Edits of a running model, as context managers: loosen one thing, look, leave no trace.

Every edit takes ``(model, layer, *, tokens, ...)`` and a strength with a neutral value. ``layer``
counts from 0, or is what ``melens.locate`` returns (its ME Layer). ``tokens`` is a located ME Layer
(its massive tokens of the primary dimension; the default where ``layer`` is one), ``"first"`` (the
default where ``layer`` is a number), ``"all"`` or absolute positions; padding never counts, and
under a KV cache a position means the same token. Edits nest, act downstream only and are undone on
errors too; one that never took place is an error.
"""

from melens.interventions.attention import qk_orthogonalise
from melens.interventions.core import INTERVENTIONS, Intervention, intervention
from melens.interventions.ffn import (
    ffn_ablate_neurons,
    ffn_cap,
    ffn_pull_back,
    ffn_rms_normalise,
    ffn_scale,
    ffn_zero_weights,
)
from melens.interventions.keys import drop_key
from melens.interventions.norm import norm_flatten, norm_ones, norm_scale_dims, norm_shuffle
from melens.interventions.residual import residual_set, write_block
from melens.interventions.transplant import transplant
from melens.interventions.wemask import MaskRecord, check_mask, wemask

__all__ = [
    "INTERVENTIONS",
    "Intervention",
    "MaskRecord",
    "check_mask",
    "drop_key",
    "ffn_ablate_neurons",
    "ffn_cap",
    "ffn_pull_back",
    "ffn_rms_normalise",
    "ffn_scale",
    "ffn_zero_weights",
    "intervention",
    "norm_flatten",
    "norm_ones",
    "norm_scale_dims",
    "norm_shuffle",
    "qk_orthogonalise",
    "residual_set",
    "transplant",
    "wemask",
    "write_block",
]
