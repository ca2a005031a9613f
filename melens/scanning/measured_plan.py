"""Where the FFNs of a family without a layout lie: measured while its blocks are read.

One short pass over the files, a block in memory at a time (`models/roles`); then every layer's
matrices are named as the files name them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from melens.errors import ModelError
from melens.metrics.ceilings import FLOORS, SQUARED
from melens.models.checkpoint import Checkpoint
from melens.models.contract import failing, probe_ids
from melens.models.decoder import layer_list
from melens.models.ffn_formula import Bend, Formula
from melens.models.norms import Norm
from melens.models.roles import Roles, roles_of
from melens.scanning.plan import CheckpointPlan, FfnPlan, LayerPlan, Layout, Matrix
from melens.streaming.skeleton import Skeleton, build_skeleton
from melens.streaming.streamed import reading


class _NoPlan(Exception):
    """Why nothing can be said of one layer."""


def measured_plan(files: Checkpoint, folder: Path) -> CheckpointPlan:
    """Find every layer's FFN by what it does.

    Raises:  ModelError: the model cannot be built or run, or no layer has an FFN whose reach can be
             bounded; with the first layer's reason.
    """
    skeleton = build_skeleton(folder, files, dtype=torch.float32, device="cpu")
    model = skeleton.model
    with (
        reading(skeleton, files),
        failing(f"the parts of {type(model).__name__} are not to be told"),
    ):
        roles = roles_of(model, probe_ids(model.config))
    places = _Places(skeleton)
    layers = tuple(places.layer(row) for row in roles)
    if all(layer.reason for layer in layers):
        raise ModelError(f"{files.name} cannot be scanned: layer 0: {layers[0].reason}.")
    norm, act = places.facts()
    layout = Layout(
        blocks=(),
        ffns=(),
        norm=None,
        post=next((layer.post for layer in layers if layer.post), None),
        layer_norm=norm.kind == "layer",
        transposed=bool(places.transposed),
        offset=norm.offset or 0.0,
    )
    route = float(getattr(model.config, "routed_scaling_factor", None) or 1.0)
    return CheckpointPlan(layout, int(model.config.hidden_size), act, route, layers)


class _Places:
    """Names of a skeleton's parameters in the files, and what holds for all layers."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.blocks = layer_list(skeleton.model)
        slots = [slot for block in skeleton.blocks for slot in block]
        self.names = {
            (id(slot.module), slot.name): slot.pieces[0].name
            for slot in slots
            if len(slot.pieces) == 1 and not slot.pieces[0].part
        }
        self.pieces = {(id(slot.module), slot.name): slot.pieces for slot in slots}
        self.norm: Norm | None = None
        self.act: str | None = None
        self.transposed: bool | None = None

    def facts(self) -> tuple[Norm, str]:
        """What layers have in common; some layer is covered."""
        if self.act is None:
            raise ModelError("its FFNs bend their neurons by no activation with a bound.")
        return self.norm or Norm("rms", torch.ones(1), 0.0, torch.zeros(1)), self.act

    def layer(self, row: Roles) -> LayerPlan:
        """One layer's FFN, or why there is none to speak of."""
        try:
            return self._layer(row)
        except _NoPlan as why:
            return LayerPlan(row.layer, reason=str(why))

    def _layer(self, row: Roles) -> LayerPlan:
        if row.why or row.ffn_write is None:
            raise _NoPlan(row.why or "it has no FFN")
        block, post = self.blocks[row.layer], row.norms.get("ln2_post")
        if row.ffn_reads is None and post is None:
            raise _NoPlan("no norm bounds what its FFN reads")
        if row.ffn in row.found:
            raise _NoPlan("a norm makes its FFN's write of several parts")
        inner = [path for path in row.found if row.ffn and path.startswith(f"{row.ffn}.")]
        if inner and row.formula is None:
            raise _NoPlan(f"a norm stands inside its FFN ({inner[0]})")
        ffns = self._ffns(block, row)
        for path in filter(None, (row.ffn_reads, post)):
            self._agree_on_norm(row.found[path])
        norm = self._norm_name(block, row, row.ffn_reads)
        return LayerPlan(
            row.layer,
            ffns,
            norm,
            self._name(block, row.ffn_reads, "bias"),
            self._norm_name(block, row, post),
            factor=row.writes[row.ffn_write],
        )

    def _ffns(self, block: nn.Module, row: Roles) -> tuple[FfnPlan, ...]:
        if row.formula is not None:
            return (self._ffn(block, row.formula),)
        routed = self._experts(block)
        if row.shared is None:
            return routed
        return (*routed, replace(self._ffn(block, row.shared), expert="shared"))

    def _experts(self, block: nn.Module) -> tuple[FfnPlan, ...]:
        """One FFN an expert, of the module that holds them all."""
        from transformers.integrations.moe import _default_apply_gate

        for module in block.modules():
            held: Any = module
            down = getattr(held, "down_proj", None)
            if not isinstance(down, torch.Tensor) or down.ndim != 3:
                continue
            if held.has_bias:
                raise _NoPlan("its experts have biases")
            usual = getattr(type(held), "_apply_gate", None) is _default_apply_gate
            if not usual or held.is_transposed or not held.is_concatenated or not held.has_gate:
                raise _NoPlan("its experts' gates are of a kind that melens has no bound for")
            self._agree("act", _name_of(held.act_fn))
            self._agree("transposed", False)
            return tuple(self._expert(held, e, down.shape[1:]) for e in range(len(down)))
        raise _NoPlan("its FFN has a formula that melens does not know")

    def _expert(self, held: nn.Module, e: int, shape: torch.Size) -> FfnPlan:
        d_model, inner = shape
        found = {}
        for part, name, first in (
            ("gate", "gate_up_proj", 0),
            ("up", "gate_up_proj", inner),
            ("down", "down_proj", 0),
        ):
            rows, height = (d_model, d_model) if part == "down" else (inner, 2 * inner)
            stored, start = self._piece(held, name, e, first, height)
            found[part] = Matrix(stored, start, rows, inner if part == "down" else d_model)
        return FfnPlan(**found, expert=str(e))

    def _piece(
        self, held: nn.Module, name: str, e: int, first: int, height: int
    ) -> tuple[str, int]:
        """The stored tensor that holds an expert's rows from ``first`` on, and where they begin."""
        for piece in self.pieces[id(held), name]:
            if not piece.part:
                return piece.name, e * height + first
            expert, rows = piece.part
            if expert == e and isinstance(rows, slice) and rows.start <= first < rows.stop:
                return piece.name, first - rows.start
        raise _NoPlan(f"{name} of expert {e} lies under no name of its own")

    def _norm_name(self, block: nn.Module, row: Roles, path: str | None) -> str | None:
        if path is None or row.found[path].is_bare:
            return None
        found = self._name(block, path, "weight")
        if found is None:
            raise _NoPlan(f"the gain of {path} lies under no name of its own")
        return found

    def _ffn(self, block: nn.Module, form: Formula) -> FfnPlan:
        self._agree("act", act := _name_of(form.activation))
        if form.gate is not None and act == SQUARED:
            raise _NoPlan(f"melens has no bound for {SQUARED} behind a gate")
        down = block.get_submodule(form.down)
        inner, across = self._shape(down), form.split
        if across.startswith("turns") or (across and self.transposed):
            raise _NoPlan("gate and up take turns in one matrix")
        rows, columns = inner if not self.transposed else inner[::-1]
        shape = rows, columns
        gate_at, up_at = (rows, 0) if across.endswith("swapped") else (0, rows if across else 0)

        def matrix(path: str, first: int) -> Matrix:
            return Matrix(self._weight(block, path), first, *shape)

        return FfnPlan(
            up=matrix(form.up, up_at),
            gate=None if form.gate is None else matrix(form.gate, gate_at),
            down=Matrix(self._weight(block, form.down), 0, *shape[::-1]),
            up_bias=None if across else self._name(block, form.up, "bias"),
            gate_bias=None if across else self._name(block, form.gate, "bias"),
        )

    def _shape(self, module: nn.Module) -> tuple[int, int]:
        """(neurons, d_model) of a down projection; notes how its matrix is kept."""
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        as_in_out = type(module).__name__ == "Conv1D"
        self._agree("transposed", as_in_out)
        first, second = weight.shape
        return (first, second) if as_in_out else (second, first)

    def _weight(self, block: nn.Module, path: str) -> str:
        found = self._name(block, path, "weight")
        if found is None:
            raise _NoPlan(f"{path} lies in the files in pieces")
        return found

    def _name(self, block: nn.Module, path: str | None, part: str) -> str | None:
        return None if path is None else self.names.get((id(block.get_submodule(path)), part))

    def _agree_on_norm(self, found: Norm) -> None:
        if found.offset is None and not found.is_bare:
            raise _NoPlan("the gain of its norm is no stored weight")
        known = self.norm
        if known is not None and (known.kind, known.offset) != (found.kind, found.offset):
            raise _NoPlan("its norms are of two kinds")
        self.norm = found

    def _agree(self, what: str, value: str | bool) -> None:
        if getattr(self, what) not in (None, value):
            raise _NoPlan(f"another {what} than other layers have")
        setattr(self, what, value)


def _name_of(bend: Bend) -> str:
    """An activation's name among those with a bound."""
    x = torch.linspace(-8, 8, 101)
    made = bend(x)
    for name in FLOORS:
        if name in ACT2FN and torch.allclose(ACT2FN[name](x), made, atol=1e-5):
            return name
    raise _NoPlan(f"melens has no bound for its activation ({', '.join(FLOORS)} have one)")
