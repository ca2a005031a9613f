"""How routed experts write the massive coordinate: which expert, which neuron, how many use it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from melens.capture import stream
from melens.errors import ModelError, SiteError
from melens.inputs import Inputs
from melens.isolating.path import Others
from melens.isolating.runs import Prefixes
from melens.measuring.located import Located
from melens.models.anatomy import anatomy, norm_gain
from melens.models.experts import Experts, experts_of
from melens.models.ffn import ffn_input
from melens.protocols import HookedModel
from melens.results.isolate import RoutedExpert


def routed_rows(
    inputs: Inputs, located: Located, prefixes: Prefixes, layers: Sequence[int]
) -> tuple[list[RoutedExpert], dict[int, str]]:
    """Every expert that a massive token is routed to, the largest of a layer first.

    Args:    layers: those whose FFN has no neurons of its own.
    Returns: the rows, and for layers without any the reason.
    """
    rows: list[RoutedExpert] = []
    reasons: dict[int, str] = {}
    for layer in (n for n in layers if n <= prefixes.peak):
        try:
            rows += _layer(inputs, located, prefixes, experts_of(inputs.model, layer))
        except (ModelError, SiteError) as error:
            reasons[layer] = str(error)
    return rows, reasons


def _layer(
    inputs: Inputs, located: Located, prefixes: Prefixes, experts: Experts
) -> list[RoutedExpert]:
    model, layer = inputs.model, experts.layer
    site = ffn_input(model, layer)
    seen = prefixes.read([site])
    x = seen[site].to(experts.down(0).dtype)
    scale = _after(model, layer, prefixes).to(x.device)
    routed = experts.route(x)
    made = (experts.written(x)[:, prefixes.dim].double() * scale).mean()
    others = Others(located.heavy)
    stream(model, inputs.batches, {site: others})
    used = experts.route(others.result().to(x)).index
    rows = []
    for expert in experts.used(routed):
        weight = torch.where(routed.index == expert, routed.weight, 0).sum(1).double()
        down = experts.down(expert)[:, prefixes.dim].double()
        each = experts.product(x, expert).double() * down * (weight * scale)[:, None]
        parts = each.mean(0)
        top = int(parts.abs().argmax())
        rows.append(
            RoutedExpert(
                layer=layer,
                expert=expert,
                weight=weight.mean().item(),
                share=_share(parts.sum(), made),
                neuron=top,
                neuron_share=_share(parts[top], made),
                entry=down[top].item(),
                others=(used == expert).any(1).double().mean().item(),
            )
        )
    return sorted(rows, key=lambda row: -abs(row.share))


def _after(model: HookedModel, layer: int, prefixes: Prefixes) -> Float[Tensor, " prefix"]:
    """What a norm behind the FFN multiplies the massive dimension by; ones without one."""
    if "ln2_post" not in anatomy(model).blocks[layer].norms:
        return torch.ones(len(prefixes.clean), dtype=torch.float64)
    site = f"blocks.{layer}.ln2_post.hook_scale"
    gain = norm_gain(model, layer, "ln2_post")[prefixes.dim].double().cpu()
    return gain / prefixes.read([site])[site][:, 0].double().cpu()


def _share(part: Tensor, whole: Tensor) -> float:
    return (part / whole).item() if whole != 0 else 0.0
