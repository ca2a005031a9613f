"""Find and remove massive activations as a sidecar file describes them; needs torch alone.

    massive = MassiveMask("massive.json")
    keep = ~massive.mask(resid, ids, layer=12)           # [batch, pos]
    clean = massive.clean(resid, ids, layer=12)          # [batch, pos, d_model], tokens clipped

``resid`` is the residual stream at the output of a block, layers counted from 0 (-1: embedding),
``ids`` are its token ids. Column 0 must be the first token of the text: cut left padding off.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor


class MassiveMask:
    """The rules of one model."""

    def __init__(self, path: str | Path) -> None:
        """Read a sidecar; another file is a ValueError."""
        self.data = json.loads(Path(path).read_text("utf-8"))
        if self.data.get("schema") != "melens/sidecar/1":
            raise ValueError(f"{path} is not a melens sidecar.")
        self.layers = {row["layer"]: row for row in self.data["layers"]}

    def mask(self, resid: Tensor, ids: Tensor | None, layer: int) -> Tensor:
        """Which tokens are massive, [batch, pos].

        Where the layer has a threshold, ``ids`` may be None. Before the ME Layer tokens are told by
        id: those that become massive as the first token. From the erase layer on none is massive.
        Raises:  ValueError: a layer after the ME Layer that cannot tell them.
        """
        row = self._row(resid, layer)
        if row["coordinate"] is not None:
            wide = resid.detach().to(torch.promote_types(resid.dtype, torch.float32))
            large = wide[..., self.data["dim"]].abs() > row["coordinate"]
            return large & (wide.norm(dim=-1) >= row["norm"])
        if layer > self.data["me_layer"]:
            erased = self.data["erase_layer"]
            if erased is None or layer < erased:
                raise ValueError(f"layer {layer} cannot tell massive tokens from others.")
            return torch.zeros(resid.shape[:-1], dtype=torch.bool, device=resid.device)
        if ids is None:
            raise ValueError(f"layer {layer} has no threshold; pass ids, which tell tokens there.")
        first = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids) == 0
        listed = torch.tensor(self.data["first_ids"], dtype=ids.dtype, device=ids.device)
        found = torch.isin(ids, listed)
        return first & (~found if self.data["other_first_tokens"] else found)

    def clean(self, resid: Tensor, ids: Tensor | None, layer: int, how: str = "clip") -> Tensor:
        """The residual without massive activations.

        drop: massive tokens are left out, [token, d_model]. clip: their massive dimensions are cut
        to what ordinary tokens reach at this layer. project: their massive dimensions become 0.
        """
        row, found = self._row(resid, layer), self.mask(resid, ids, layer)
        if how == "drop":
            return resid[~found]
        if how not in ("clip", "project"):
            raise ValueError(f"how must be drop, clip or project, got {how!r}.")
        dims = row["dims"] or [self.data["dim"]]
        made, limit = resid.clone(), row["clip"] if how == "clip" else 0.0
        for dim in dims:
            made[..., dim] = torch.where(found, made[..., dim].clamp(-limit, limit), made[..., dim])
        return made

    def _row(self, resid: Tensor, layer: int) -> dict:
        if layer not in self.layers or resid.shape[-1] != self.data["d_model"]:
            raise ValueError(
                f"{self.data['model']} has layers 0 to {self.data['n_layers'] - 1} of width "
                f"{self.data['d_model']}; got layer {layer}, width {resid.shape[-1]}."
            )
        return self.layers[layer]
