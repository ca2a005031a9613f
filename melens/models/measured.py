"""A bridge for families that TransformerLens has no adapter for, or none that fits: by measurement.

What each module does was measured (``roles``); here TransformerLens' own components are put around
those modules, so that hooks have the names that they have everywhere.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    NormalizationBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.joint_gate_up_mlp import (
    JointGateUpMLPBridge,
)
from transformer_lens.model_bridge.generalized_components.mlp import MLPBridge
from transformer_lens.model_bridge.sources import build_bridge_config_from_hf
from transformer_lens.model_bridge.sources.transformers_driver import TransformersDriver

from melens.errors import ModelError
from melens.models.anatomy import OTHERS
from melens.models.decoder import layer_list
from melens.models.ffn_formula import Bend, Formula, split
from melens.models.norms import Norm as Measured
from melens.models.norms import measured_norm
from melens.models.observed import CALLED, NAME, SEATS, register
from melens.models.roles import Roles, roles_of
from melens.placement import input_device
from melens.protocols import Args, Kwargs, TransformersModel
from melens.shapes import TokenIds

RESIDUAL = {"hook_resid_pre": "hook_in", "hook_resid_post": "hook_out"}
SHOWN = ("rot_q", "rot_k", "v", "attn_scores", "pattern", "z")


class AnyPart(GeneralizedComponent):
    """Any module, with hooks on what goes in and on what it adds to the residual."""

    def __init__(self, name: str, config: TransformerBridgeConfig, *, scale: float = 1.0) -> None:
        super().__init__(name, config)
        self._scale = scale

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the module itself; a factor that the block multiplies by is part of the hook."""
        return _run_hooked(self, self._scale, args, kwargs)


def _run_hooked(part: GeneralizedComponent, scale: float, args: Args, kwargs: Kwargs) -> object:
    if args and isinstance(args[0], Tensor):
        args = (part.hook_in(args[0]), *args[1:])
    elif "hidden_states" in kwargs:
        kwargs["hidden_states"] = part.hook_in(kwargs["hidden_states"])
    assert part.original_component is not None
    out = part.original_component(*args, **kwargs)
    first = out[0] if isinstance(out, tuple) else out
    made = part._hook_scaled_output(first, part.hook_out, scale)
    made = made.clone()  # Falcon adds to it in place, and hooks have seen it
    return (made, *out[1:]) if isinstance(out, tuple) else made


class ObservedAttention(AnyPart):
    """Attention whose steps are shown by ``observed_attention``."""

    def __init__(
        self, name: str, config: TransformerBridgeConfig, *, scale: float, sunk: frozenset[int]
    ) -> None:
        super().__init__(name, config, scale=scale)
        self._sunk = sunk
        for site in SHOWN:
            setattr(self, f"hook_{site}", HookPoint())

    def set_original_component(self, original_component: nn.Module) -> None:
        """Take a seat at every module inside that may compute attention."""
        super().set_original_component(original_component)
        for module in original_component.modules():
            SEATS[module] = weakref.ref(self)
        self._learned_sink = any(id(m) in self._sunk for m in original_component.modules())

    def show(self, site: str, x: Tensor) -> Tensor:
        """One step of the computation, through its hook point."""
        return getattr(self, f"hook_{site}")(x)


class ByRow(GeneralizedComponent):
    """Shows ``[batch, pos, d]`` also where a block flattens rows and positions (OPT)."""

    _rows: tuple[int, int] = (0, 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run on the rows, and give back the shape that was given."""
        rows, positions = self._rows
        if x.ndim != 2 or len(x) != rows * positions:
            return super().forward(x, *args, **kwargs)
        return super().forward(x.view(rows, positions, -1), *args, **kwargs).flatten(0, 1)


class LinearPart(ByRow, LinearBridge):
    """A linear layer of a block."""


class MeasuredNorm(ByRow, NormalizationBridge):
    """A norm of a block."""


class PartsByLayer:
    """Every layer's parts, made once; the template of all blocks is copied with this in it."""

    def __init__(self, rows: list[tuple[dict[str, GeneralizedComponent], dict[str, str], str]]):
        self.rows = rows

    def __deepcopy__(self, memo: object) -> PartsByLayer:
        return self


class MeasuredBlock(BlockBridge):
    """A block with the hooks that its measured parts give."""

    def __init__(self, name: str, config: TransformerBridgeConfig, layers: PartsByLayer) -> None:
        super().__init__(name, config)
        self.hook_aliases = dict(RESIDUAL)
        self._layers, self._untold = layers, ""

    def set_original_component(self, original_component: nn.Module) -> None:
        """Take this layer's parts: a hybrid's layers differ."""
        super().set_original_component(original_component)
        layer = int(str(self.name).rpartition(".")[2])
        self.submodules, aliases, self._untold = self._layers.rows[layer]
        self.hook_aliases = {**RESIDUAL, **aliases}

    def _hook_input_hidden_states(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        args, kwargs = super()._hook_input_hidden_states(args, kwargs)
        resid = args[0] if args else kwargs["hidden_states"]
        for part in self.modules():
            if isinstance(part, ByRow):
                object.__setattr__(part, "_rows", tuple(resid.shape[:2]))
        return args, kwargs


class DenseFFN(MLPBridge):
    """An FFN whose own forward pass runs, with hooks around its layers."""

    def __init__(
        self,
        name: str | None,
        config: TransformerBridgeConfig,
        layers: dict[str, GeneralizedComponent],
        *,
        scale: float,
        formula: Formula,
    ) -> None:
        super().__init__(name, config, layers)
        self._scale = scale
        object.__setattr__(self, "_bend", formula.activation)  # no module of its own
        self.hook_aliases = {"hook_post": "out.hook_in"}
        names = ("hook_pre", "hook_pre_linear") if formula.gate is not None else (None, "hook_pre")
        for name, part in zip(names, ("gate", "in"), strict=True):
            self.hook_aliases |= {name: f"{part}.hook_out"} if name else {}

    def forward(self, *args: object, **kwargs: object) -> object:
        """As `AnyPart`; the layers inside fire their own hooks."""
        return _run_hooked(self, self._scale, args, kwargs)


def measured_bridge(
    hf: TransformersModel, ids: TokenIds, *, name: str, observe: bool
) -> TransformerBridge:
    """Put a bridge around a transformers model, which it changes in place; unchecked.

    A block whose parts could not be told has hooks on its residual and its attention alone.

    Args:    observe: compute attention where it can be read; else it stays the model's own.
    Raises:  ModelError: no list of layers, or a part that does not fit TransformerLens' names.
    """
    roles = roles_of(hf, ids)
    if not all(row.is_stream for row in roles):
        raise ModelError("its residual is not one stream, as all of melens takes it to be")
    kind = type(hf).__name__
    cfg = build_bridge_config_from_hf(hf.config, kind, name, next(hf.parameters()).dtype)
    adapter = MeasuredAdapter(cfg, hf, roles, _observed(hf, ids) if observe else {})
    cfg.device = str(input_device(hf))
    return TransformerBridge(hf, adapter, None, driver=TransformersDriver(hf, adapter, None))


def _observed(hf: TransformersModel, ids: TokenIds) -> dict[nn.Module, bool]:
    """Modules whose attention can be observed, and whether a learned sink takes part; the model
    is left in that implementation.
    """  # noqa: D205
    register()
    before = hf.config._attn_implementation or "eager"
    called: dict[nn.Module, list[bool]] = {}
    token = CALLED.set(called)
    try:
        hf.set_attn_implementation(NAME)
        with torch.no_grad():
            hf(ids, use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError):
        called.clear()
    finally:
        CALLED.reset(token)
    once = {module: sunk[0] for module, sunk in called.items() if len(sunk) == 1}
    if not once:  # DiffLlama's attention is the difference of two: it has no one pattern
        hf.set_attn_implementation(before)
    return once


class MeasuredAdapter(ArchitectureAdapter):
    """TransformerLens' map of a model, written from what was measured."""

    def __init__(
        self,
        cfg: TransformerBridgeConfig,
        hf: TransformersModel,
        roles: tuple[Roles, ...],
        observed: dict[nn.Module, bool],
    ) -> None:
        super().__init__(cfg)
        cfg.final_rms = cfg.uses_rms_norm = True
        self.roles, self.observed = roles, observed
        self.sunk = frozenset(id(module) for module, sunk in observed.items() if sunk)
        self.layers = layer_list(hf)
        paths = {module: path for path, module in hf.named_modules()}
        parts: dict[str, GeneralizedComponent] = {
            "embed": EmbeddingBridge(name=paths[hf.get_input_embeddings()]),
            "blocks": self._blocks(paths[self.layers]),
        }
        if (final := _final_norm(hf)) is not None:
            measured = measured_norm(hf.get_submodule(final), cfg.d_model, where=final)
            parts["ln_final"] = self._norm(final, measured)
        parts["unembed"] = UnembeddingBridge(name=paths[hf.get_output_embeddings()])
        self.component_mapping = parts

    def _blocks(self, path: str) -> MeasuredBlock:
        rows = []
        for row, block in zip(self.roles, self.layers, strict=True):
            parts = self._parts(row, block)
            rows.append((parts, _aliases(parts), row.why or ""))
        return MeasuredBlock(path, self.cfg, PartsByLayer(rows))

    def _parts(self, row: Roles, block: nn.Module) -> dict[str, GeneralizedComponent]:
        made: dict[str, GeneralizedComponent] = {}
        for name, path in row.norms.items():
            made[name] = self._norm(path, row.found[path])
        if row.why:
            seen = [path for path, module in block.named_modules() if module in self.observed]
            return made | ({"attn": self._attention(seen[0])} if len(seen) == 1 else {})
        for part, write in row.mixers.items():
            module = block.get_submodule(part)
            free = [n for n in (self._mixer_name(module), *NAMES) if n not in made]
            if not free or len(row.others) > len(OTHERS):
                raise ModelError(f"block {row.layer} has more parts than there are names for")
            name = free[0]
            scale = _scale(row, part, write)
            if name == "attn" and self._is_seen(module):
                made[name] = self._attention(part, scale=scale)
            else:
                made[name] = AnyPart(part, self.cfg, scale=scale)
        if row.ffn is not None:
            made["mlp"] = self._ffn(row, block)
        for name, (part, write) in zip(OTHERS, row.others.items(), strict=False):
            scale = _scale(row, part, write) if part == write else row.writes[write]
            made[name] = AnyPart(write, self.cfg, scale=scale)
        return made

    def _attention(self, path: str, *, scale: float = 1.0) -> ObservedAttention:
        return ObservedAttention(path, self.cfg, scale=scale, sunk=self.sunk)

    def _is_seen(self, module: nn.Module) -> bool:
        return any(part in self.observed for part in module.modules())

    def _mixer_name(self, module: nn.Module) -> str:
        """As TransformerLens names them; only the name goes by the module's class."""
        kind = type(module).__name__.lower()
        if self._is_seen(module) or ("attention" in kind and "linear" not in kind):
            return "attn"
        return next((n for n, marks in KINDS.items() if any(m in kind for m in marks)), "mixer")

    def _norm(self, path: str, found: Measured) -> MeasuredNorm:
        return MeasuredNorm(
            path,
            self.cfg,
            use_native_layernorm_autograd=True,
            uses_rms_norm=found.kind == "rms",
            uses_weight_offset=found.offset == 1.0,
        )

    def _ffn(self, row: Roles, block: nn.Module) -> GeneralizedComponent:
        assert row.ffn is not None
        assert row.ffn_write is not None
        scale = _scale(row, row.ffn, row.ffn_write)
        form, name = row.formula, row.ffn or None
        if form is None or (form.split and (name is None or scale != 1.0)):
            return AnyPart(row.ffn or row.ffn_write, self.cfg, scale=scale)
        inner = {"in": form.up, "gate": form.gate, "out": form.down}
        start = len(row.ffn) + 1 if row.ffn else 0
        layers: dict[str, GeneralizedComponent] = {
            part: LinearPart(path[start:]) for part, path in inner.items() if path
        }
        if form.split and name is not None:
            return FusedFFN(name, self.cfg, form, form.up[start:], layers["out"])
        return DenseFFN(name, self.cfg, layers, scale=scale, formula=form)


NAMES = ("linear_attn", "mamba", "mixer")
KINDS = {"linear_attn": ("delta", "linear", "lightning", "kda"), "mamba": ("mamba", "ssm")}


class FusedFFN(JointGateUpMLPBridge):
    """Gate and up out of one layer, in the measured order."""

    _bend: Bend

    def __init__(
        self,
        name: str,
        config: TransformerBridgeConfig,
        formula: Formula,
        fused: str,
        out: GeneralizedComponent,
    ) -> None:
        def halves(module: nn.Module) -> tuple[nn.Module, nn.Module]:
            layer = module.get_submodule(fused)
            weight, bias = layer.weight, layer.bias
            assert isinstance(weight, Tensor)
            weights = split(weight, formula.split, 0)
            biases = split(bias, formula.split, 0) if isinstance(bias, Tensor) else (None, None)
            return _linear(weights[0], biases[0]), _linear(weights[1], biases[1])

        super().__init__(name, config, {"out": out}, split_gate_up_matrix=halves, fused_attr=fused)
        object.__setattr__(self, "_bend", formula.activation)  # no module of its own

    def _resolve_activation_fn(self) -> Bend:
        return self._bend


def _aliases(parts: dict[str, GeneralizedComponent]) -> dict[str, str]:
    """TransformerLens' names of a block's sites, as far as this block has them."""
    found = {}
    for alias, part in (("hook_attn_out", "attn"), ("hook_mlp_out", "mlp")):
        after = {"attn": "ln1_post", "mlp": "ln2_post"}[part]
        if part in parts:
            found[alias] = f"{after if after in parts else part}.hook_out"
    if "ln1_post" in parts:
        found["hook_attn_out"] = "ln1_post.hook_out"
    if "ln2" in parts:
        found["hook_resid_mid"] = "ln2.hook_in"
    return found


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def _scale(row: Roles, part: str, write: str) -> float:
    factor = row.writes[write]
    if part != write and factor != 1.0:
        raise ModelError(f"block {row.layer} scales what a norm writes by {factor:.3g}")
    return factor


def _final_norm(hf: TransformersModel) -> str | None:
    """The last norm of the residual's width outside the blocks, in the order of the modules."""
    width = hf.config.get_text_config().hidden_size
    inside = {id(m) for block in layer_list(hf) for m in block.modules()}
    found = None
    for path, module in hf.named_modules():
        if id(module) in inside or any(True for _ in module.children()):
            continue
        sizes = [tuple(p.shape) for p in module.parameters()]
        if not sizes or any(size != (width,) for size in sizes):
            continue
        found = path
    return found
