"""Named constants of the verdict. Provisional: chosen on two models (docs/definitions.md)."""

from melens.results.locate import last_body_layer as last_body_layer

SPARSE_TOKENS = 4
"""A dimension that is massive on more tokens of a sequence than this ..."""
SPARSE_SHARE = 0.03
"""... and on more than this share of them is a broad outlier dimension, not a massive token."""
FIRST_SHARE = 0.1
"""The ME Layer is where the cumulative write share passes this."""
SINGLE_SHARE = 0.75
SINGLE_EFFECTIVE = 1.6
"""Single: one layer holds SINGLE_SHARE and the effective number stays below this."""
STEP_SHARE = 0.1
STEPS_SHARE = 0.75
STEPS_MOST = 3
"""Multi-step: 2 to STEPS_MOST layers of at least STEP_SHARE each hold STEPS_SHARE together."""
ERASED_LEFT = 0.5
"""A stage is erased where less than this part of its peak norm is left."""
ERASE_SHARE = 0.05
"""The erase layer takes away at least this share of the peak; less is drift."""
DIRECTION_COSINE = 0.99
FINAL_FACTOR = 2.0
"""Growth of max |x| from one layer to the next that counts as final-layer growth."""
