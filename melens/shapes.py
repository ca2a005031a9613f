"""Shape aliases (jaxtyping) used in signatures; enforced by beartype in the tests."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

Resid = Float[Tensor, "batch pos d_model"]
"""Residual stream, or anything written into it."""
Trajectory = Float[Tensor, "step d_model"]
"""One token's residual, step 0 = the embedding, step l + 1 = the output of layer l."""
TokenIds = Int[Tensor, "batch pos"]
TokenMask = Bool[Tensor, "batch pos"]
"""True at real tokens, False at padding."""
