"""How one layer's FFN writes the massive coordinate: neurons, direction, gains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from melens.errors import SiteError
from melens.isolating.runs import Prefixes, RunChange, ablate
from melens.models.anatomy import anatomy, norm_gain, norm_of
from melens.models.ffn import FFN, ffn_input, ffn_of
from melens.protocols import HookedModel
from melens.results.isolate import Decomposition, Direction, Gains, Neuron

TARGETS = (0.5, 0.9, 0.99)
TOP_DIMS = 12


@dataclass(frozen=True)
class Written:
    """One layer's neurons at the massive token, means over the prefixes."""

    ffn: FFN
    gate: Float[Tensor, " d_mlp"] | None
    up: Float[Tensor, " d_mlp"]
    product: Float[Tensor, " d_mlp"]
    contributions: Float[Tensor, " d_mlp"]
    """Of every neuron to the massive coordinate, a norm on the write path included."""
    made: float
    """What the hook of the FFN's write shows."""
    summed: float
    """Contributions, and the down projection's bias."""

    @property
    def shares(self) -> Float[Tensor, " d_mlp"]:
        """Contributions over their sum, the bias included."""
        return _share(self.contributions, self.contributions.new_tensor(self.summed))

    def top(self, share: float) -> list[int]:
        """The fewest neurons that together make a share of the write."""
        order = self.shares.argsort(descending=True)
        reached = self.shares[order].cumsum(0) >= share
        count = int(reached.int().argmax()) + 1 if reached.any() else len(order)
        return order[:count].tolist()

    def strongest(self, count: int) -> list[int]:
        """The neurons that move the coordinate most, whatever their sign."""
        return self.contributions.abs().argsort(descending=True)[:count].tolist()


def sites_of_writes(model: HookedModel, layers: Iterable[int]) -> list[str]:
    """All that :func:`written_at` reads of these layers; nothing of one without neurons."""
    made: list[str] = []
    for layer in layers:
        with suppress(SiteError):
            made += _read_at(model, layer, ffn_of(model, layer))
    return made


def _read_at(model: HookedModel, layer: int, ffn: FFN) -> list[str]:
    write = anatomy(model).blocks[layer].ffn_write
    sites = [ffn.up, ffn.product, ffn.output, write, ffn.gate, _scale_site(model, layer)]
    return [site for site in dict.fromkeys(sites) if site]


def _scale_site(model: HookedModel, layer: int) -> str | None:
    """What the norm behind the FFN divides by; None without one."""
    after = "ln2_post" in anatomy(model).blocks[layer].norms
    return f"blocks.{layer}.ln2_post.hook_scale" if after else None


def written_at(model: HookedModel, layer: int, prefixes: Prefixes) -> Written:
    """Read one layer's neurons at the massive tokens.

    Raises:  SiteError: the block has no FFN with neurons.
    """
    ffn = ffn_of(model, layer)
    write, norm = anatomy(model).blocks[layer].ffn_write, _scale_site(model, layer)
    assert write is not None
    found = prefixes.read(_read_at(model, layer, ffn))
    seen = {site: x.double() for site, x in found.items()}
    dim = prefixes.dim
    weights = ffn.down[:, dim].double()
    bias = getattr(ffn.weights, "b_out", None)
    extra = bias.detach()[dim].double() if isinstance(bias, Tensor) else weights.new_zeros(())
    scale = torch.ones_like(seen[write][:, dim])
    if norm is not None:  # it multiplies all contributions of a token by one factor
        scale = norm_gain(model, layer, "ln2_post")[dim].double() / seen[norm][:, 0]
    each = seen[ffn.product] * weights * scale[:, None]
    gate = ffn.activation(seen[ffn.gate].float()).double() if ffn.gate else None
    return Written(
        ffn=ffn,
        gate=gate.mean(0) if gate is not None else None,
        up=seen[ffn.up].mean(0),
        product=seen[ffn.product].mean(0),
        contributions=each.mean(0),
        made=seen[write][:, dim].mean().item(),
        summed=(each.sum(-1) + extra * scale).mean().item(),
    )


def decomposition(found: Written, coordinate: float) -> Decomposition:
    """The layer's write as a sum over neurons."""
    return Decomposition(
        layer=found.ffn.layer,
        written=found.made,
        share=found.made / coordinate,
        error=abs(found.summed - found.made) / max(abs(found.made), 1e-12),
        neurons_for={str(target): len(found.top(target)) for target in TARGETS},
    )


def neuron_rows(found: Written, neurons: Sequence[int], prefixes: Prefixes) -> list[Neuron]:
    """The table of chosen neurons, each ablated alone."""
    layer = found.ffn.layer
    return [
        Neuron(
            layer=layer,
            neuron=n,
            share=found.shares[n].item(),
            gate=found.gate[n].item() if found.gate is not None else None,
            up=found.up[n].item(),
            product=found.product[n].item(),
            weight=found.ffn.down[n, prefixes.dim].item(),
            left=prefixes.left(RunChange(layer, (ablate(layer, [n]),))),
        )
        for n in neurons
    ]


def direction_of(
    ffn: FFN,
    dim: int,
    massive: Float[Tensor, "prefix d_model"],
    others: Float[Tensor, "token d_model"],
) -> tuple[Direction, Float[Tensor, " d_model"]]:
    """The input direction that makes the coordinate, and how well tokens align with it.

    With every gate wide open the write is the quadratic form x' M x, M = sum over neurons of
    W_down[n, dim] (g_n u_n' + u_n g_n') / 2; its leading eigenvector is the direction. A plain FFN
    has a linear form, sum of W_down[n, dim] w_n.

    Args:    massive, others: FFN inputs, gains included.
    """
    gate, up = (x.double() if x is not None else None for x in ffn.reads)
    assert up is not None
    weights = ffn.down[:, dim].double()
    x, rest = massive.double(), others.double()
    made = (ffn.product_of(massive).double() @ weights).mean()
    if gate is None:
        vector = weights @ up
        size = vector.norm()
        v, top = _share(vector, size), size
        concentration = 1.0 if size > 0 else 0.0
        alone = whole = (x @ vector).mean()
    else:
        half = einsum(gate, weights, up, "n i, n, n j -> i j")
        values, vectors = torch.linalg.eigh((half + half.T) / 2)
        lead = int(values.abs().argmax())
        top = values[lead]
        v = vectors[:, lead] if bool(top != 0) else torch.zeros_like(vectors[:, lead])
        concentration = _share(top.square(), values.square().sum()).item()
        alone = (top * (x @ v).square()).mean()
        whole = einsum(x, half, x, "t i, i j, t j -> t").mean()
    aligned, ordinary = _cosines(x, v), _cosines(rest, v)
    return Direction(
        kind="linear" if gate is None else "quadratic",
        eigenvalue=top.item(),
        concentration=concentration,
        massive=aligned.mean().item(),
        others_median=ordinary.median().item(),
        others_max=ordinary.max().item(),
        explained=_share(alone, made).item(),
        predicted=_share(whole, made).item(),
    ), v.float()


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Part / whole; 0 where an FFN writes exactly nothing, so that there is nothing to share."""
    return part / whole if whole != 0 else torch.zeros_like(part)


def gains_of(
    model: HookedModel, layer: int, dim: int, normalized: Float[Tensor, "prefix d_model"]
) -> Gains:
    """Each dimension's gain set to the mean, one at a time: what is left of the write.

    Args:    normalized: the massive tokens' FFN inputs before the gain.
    """
    ffn, norm = ffn_of(model, layer), anatomy(model).blocks[layer].ffn_norm
    assert norm is not None
    found = norm_of(model, layer, norm)
    gain, shift = found.gain.to(normalized), found.bias.to(normalized)
    weights = ffn.down[:, dim].to(normalized)
    clean = normalized * gain + shift
    base = (ffn.product_of(clean) @ weights).mean()
    left = []
    for row in torch.arange(len(gain)).split(64):
        each = clean.expand(len(row), *clean.shape).clone()
        for i, d in enumerate(row.tolist()):
            each[i, :, d] += normalized[:, d] * (gain.mean() - gain[d])
        left.append(_share((ffn.product_of(each) @ weights).mean(-1), base))
    shares = torch.cat(left)
    top = (shares - 1).abs().argsort(descending=True)[:TOP_DIMS]
    return Gains(
        norm=norm,
        mean=gain.mean().item(),
        at_dim=gain[dim].item(),
        left=tuple(shares.tolist()),
        top=tuple(top.tolist()),
        gains=tuple(gain.tolist()),
    )


def input_sites(model: HookedModel, layer: int) -> tuple[str, str | None]:
    """Hooks of the FFN's input, and of the same before the norm's gain if there is a norm."""
    site = f"blocks.{layer}.{anatomy(model).blocks[layer].ffn_norm}.hook_normalized"
    return ffn_input(model, layer), site if site in model.hook_dict else None


def _cosines(x: Float[Tensor, "row d"], v: Float[Tensor, " d"]) -> Float[Tensor, " row"]:
    return (x @ v).abs() / x.norm(dim=-1).clamp_min(1e-30)
