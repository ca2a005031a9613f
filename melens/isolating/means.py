"""The empirical mean of the massive coordinates: what Sun et al. set them to."""

from __future__ import annotations

from collections.abc import Sequence

from melens.errors import ResultError
from melens.inputs import Source, prepare
from melens.isolating.runs import Prefixes
from melens.measuring.located import settle_primary
from melens.models.anatomy import check_layer, resid_post
from melens.protocols import ModelLike
from melens.results import MELayer


def mean_coordinates(
    model: ModelLike,
    me_layer: MELayer,
    prompts: Source = None,
    *,
    layer: int | None = None,
    dims: Sequence[int] | None = None,
) -> dict[int, float]:
    """Mean residual of the massive tokens in their massive dimensions, at a layer's output.

    Args:    prompts: texts, as for ``melens.locate``.
             layer: counted from 0; None = the ME Layer.
             dims: None = the massive ones.
    Returns: dimension -> mean over distinct inputs up to the massive token, residual units; goes
             into ``residual_set`` as ``dims`` and ``values``.
    Raises:  ResultError: no massive token in the model or in these texts.
    Source:  Sun et al., "Massive Activations in Large Language Models", 2024, section 2.2.
    """
    inputs = prepare(model, prompts)
    at = me_layer.me_layer if layer is None else layer
    if at is None or at < 0:
        raise ResultError(f"{me_layer.run.model} has no layer that its massive token emerges in.")
    check_layer(inputs.model, at)
    dims = sorted({token.dim for token in me_layer.massive}) if dims is None else dims
    prefixes = Prefixes(inputs, settle_primary(inputs, me_layer), me_layer.massive[0].dim)
    rows = prefixes.read([resid_post(at)])[resid_post(at)].double()
    return {dim: rows[:, dim].mean().item() for dim in dims}
