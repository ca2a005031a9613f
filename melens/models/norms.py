"""What a norm multiplies by, measured: its kind, its gain, and the constant its weight is kept at.

Models keep the gain of a norm in different ways: the weight itself, one plus the weight (Gemma,
Qwen3-Next), or none at all (OLMo-1). No table says which. A row of +1 and -1 has mean 0 and norm 1,
so RMSNorm and LayerNorm leave it as it is but for the gain, and a bias falls out of the difference
to its mirror image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from melens.errors import FoldedWeightsError, ModelError
from melens.placement import weights_here

Row = Float[Tensor, " d_model"]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest gain: a norm's output is rounded to its dtype."""
USUAL = 1e-3
WHOLE = 0.05
"""An offset this near to a whole number is that number."""


@dataclass(frozen=True)
class Norm:
    """output = normalised input * gain + bias."""

    kind: str
    """``rms`` or ``layer``: what the input is normalised by."""
    gain: Row
    """float32; stored weight + offset where that explains what the norm does, else as measured."""
    offset: float | None
    """What is added to the stored weight; None where no stored weight explains the gain."""
    bias: Row
    """float32; zeros where there is none."""

    @property
    def is_bare(self) -> bool:
        """Whether it has no gain at all, and only normalises."""
        return self.offset is None and bool((self.gain - self.gain.mean()).abs().max() < USUAL)


@torch.no_grad()
def measured_norm(module: nn.Module, width: int, *, where: str) -> Norm:
    """Gain, bias and kind of a norm over ``width`` channels.

    Args:    where: for errors, e.g. ``layer 3's norm before attention``.
    Raises:  ModelError: what it does is no normalisation times a gain.
    """
    with weights_here(module):
        weights = list(module.parameters())
    weight = next((p for p in weights if p.is_floating_point()), None)
    gain, bias, x, made = _gain_and_bias(module, width, weight)
    kind = _kind(x, made, gain, bias, weight)
    if kind is None:
        raise ModelError(
            f"{where}, a {type(module).__name__}, is no normalisation times a gain, so its gain "
            "cannot be read."
        )
    for stored in weights:
        if stored.shape != gain.shape:
            continue
        apart = gain - stored.detach().float().cpu()
        offset = apart.median().item()
        limit = _limit(weight) * max(1.0, gain.abs().max().item())
        if (apart - offset).abs().max().item() <= limit:
            offset = float(round(offset)) if abs(offset - round(offset)) < WHOLE else offset
            whole = stored.detach().float() + offset
            return Norm(kind, whole, offset, bias.to(whole))
    device = "cpu" if weight is None else weight.device
    return Norm(kind, gain.to(device), None, bias.to(device))


def stored_norm(module: nn.Module, *, where: str) -> Norm:
    """The norm of a HookedTransformer, whose module multiplies by ``w`` and adds ``b``.

    Raises:  FoldedWeightsError: it has no gain of its own.
    """
    weight, bias = getattr(module, "w", None), getattr(module, "b", None)
    if not isinstance(weight, Tensor):
        raise FoldedWeightsError(f"{where} has no gain of its own.")
    gain = weight.detach().float()
    kind = "rms" if "RMS" in type(module).__name__ else "layer"
    added = bias.detach().float() if isinstance(bias, Tensor) else torch.zeros_like(gain)
    return Norm(kind, gain, 0.0, added)


def _gain_and_bias(module: nn.Module, width: int, like: Tensor | None) -> tuple[Row, Row, Row, Row]:
    """From mirrored rows, of an odd width two, each with one channel at zero; and an ordinary row
    with what the module makes of it. One call: a load measures every norm.
    """  # noqa: D205
    row = torch.ones(width)
    row[1::2] = -1
    rows = [row]
    if width % 2:
        rows = [row.clone(), -row.roll(1)]
        rows[0][-1] = rows[1][0] = 0
    x = 1 + torch.randn(width, generator=torch.Generator().manual_seed(0))
    made = _run(module, torch.stack([*rows, *(-r for r in rows), x]), like)
    up, down = made[: len(rows)], made[len(rows) : -1]
    unit = [r / r.square().mean().sqrt() for r in rows]
    each = [(up[n] - down[n]) / 2 / r for n, r in enumerate(unit)]
    gain = torch.where(torch.isfinite(each[0]), each[0], each[-1])
    return gain, (up[0] + down[0]) / 2, x, made[-1]


def _kind(x: Row, made: Row, gain: Row, bias: Row, like: Tensor | None) -> str | None:
    for kind, centred in (("rms", x), ("layer", x - x.mean())):
        expected = centred / centred.square().mean().sqrt() * gain + bias
        if (made - expected).abs().max() <= 4 * _limit(like) * expected.abs().max().clamp_min(1):
            return kind
    return None


def _run(
    module: nn.Module, rows: Float[Tensor, "row d_model"], like: Tensor | None
) -> Float[Tensor, "row d_model"]:
    """Past the hooks on the module: an open edit is no part of its weights."""
    x = rows[:, None] if like is None else rows[:, None].to(like.device, like.dtype)
    return module.forward(x)[:, 0].detach().float().cpu()


def _limit(like: Tensor | None) -> float:
    return USUAL if like is None else TOLERANCE.get(like.dtype, USUAL)
