"""Edits of a running model, as context managers: change one component, measure, restore exactly.

Every edit takes ``(model, layer, *, tokens, ...)`` and a strength with a neutral value. ``layer``
counts from 0, or is what ``melens.locate`` returns (its ME Layer). ``tokens`` is a located ME Layer
(the default where ``layer`` is one): the tokens that are massive in the running pass, told by the
residual at the ME Layer's output; ``"first"`` (the default where ``layer`` is a number), ``"all"``,
absolute positions, or ``"ids"`` (located ids wherever they stand). Padding never counts, and under
a KV cache a position means the same token. Edits nest, act downstream only and are undone on
errors too; one that never took place is an error. Each yields a record of the tokens it edited.
"""

from melens.interventions.attention import drop_key, qk_orthogonalise
from melens.interventions.core import INTERVENTIONS, EditedTokens, Intervention, intervention
from melens.interventions.ffn import (
    ffn_ablate_neurons,
    ffn_cap,
    ffn_pull_back,
    ffn_rms_normalise,
    ffn_scale,
    ffn_zero_weights,
    transplant,
)
from melens.interventions.norm import norm_flatten, norm_ones, norm_scale_dims, norm_shuffle
from melens.interventions.residual import residual_set, write_block
from melens.interventions.wemask import MaskRecord, check_mask, wemask

__all__ = [
    "INTERVENTIONS",
    "EditedTokens",
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
