"""What an edit of the attention input must know of a model, bridged or plain transformers."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from melens.errors import FoldedWeightsError, InterventionError, ModelError, SiteError
from melens.models.anatomy import anatomy, holds_attention, norm_gain
from melens.models.norms import measured_norm
from melens.placement import require_undivided
from melens.protocols import AnyModel, HookedModel, TransformersModel, is_hooked

if TYPE_CHECKING:
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

    from melens.models.roles import Roles

_ROLES: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Roles, ...]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Decoder:
    """A decoder LM: the module whose call shows the tokens, and each layer's attention."""

    model: HookedModel
    """The bridge, or the transformers model: what passes are noted under."""
    name: str
    n_layers: int
    d_model: int
    attentions: dict[int, torch.nn.Module]
    """Layer, from 0, to its attention module; a layer without attention is left out."""
    norms: dict[int, torch.nn.Module]
    """Layer to the norm before attention of a plain model; empty for a bridge."""
    blocks: dict[int, torch.nn.Module]
    """Layer to the whole block of a plain model; empty for a bridge, which has hooks."""
    ffns: dict[int, torch.nn.Module] = field(default_factory=dict)
    """Layer to the FFN of a plain model; empty for a bridge."""
    ffn_norms: dict[int, torch.nn.Module] = field(default_factory=dict)
    """Layer to the norm that the FFN of a plain model reads through; empty for a bridge."""
    unread: tuple[int, ...] = ()
    """Layers that have attention which TransformerLens knows no way to."""
    closed: dict[int, torch.nn.Module] = field(default_factory=dict)
    """Those of them whose attention module is known all the same: its input can be edited."""

    @property
    def inputs(self) -> dict[int, torch.nn.Module]:
        """Layer to its attention module, wherever the input of attention can be edited."""
        return dict(sorted({**self.attentions, **self.closed}.items()))

    def check_layer(self, layer: int) -> None:
        """Refuse a layer the model does not have.

        Raises:  SiteError: with the range that fits.
        """
        if not 0 <= layer < self.n_layers:
            raise SiteError(
                f"layer {layer} is outside 0..{self.n_layers - 1} of {self.name}. "
                "Layers count from 0."
            )

    def gain(self, layer: int) -> Float[Tensor, " d_model"]:
        """What the norm before a layer's attention multiplies by, float32.

        Raises:  SiteError: no norm before attention (OLMo-2). FoldedWeightsError: the gain was
                 folded away, or there is none. ModelError: it is no norm.
        """
        if is_hooked(self.model):
            return norm_gain(self.model, layer, "ln1")
        where = f"layer {layer}'s norm before attention"
        if layer not in self.norms:
            raise SiteError(
                f"the gain of {where} cannot be read in {type(self.model).__name__}: there is "
                "none; use select='activation' (--mask-select activation)."
            )
        found = measured_norm(self.norms[layer], self.d_model, where=where)
        if found.is_bare:
            raise FoldedWeightsError(f"{where} has no gain.")
        return found.gain


def layer_list(model: TransformersModel) -> torch.nn.ModuleList:
    """The list that a transformers model's forward pass walks through.

    Raises:  ModelError: none is as long as the config's number of layers.
    """
    count = getattr(model.config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(
        f"{type(model).__name__} has no list of {count} layers; it cannot be streamed."
    )


def decoder_of(model: AnyModel) -> Decoder:
    """Of a TransformerBridge, a transformers causal LM, or a PEFT model around one.

    A plain model is looked at, never changed: no submodule is replaced.

    Raises:  InterventionError: something else. ModelError: its parts cannot be told, or it is
             tensor-parallel.
    """
    if (base := getattr(model, "get_base_model", None)) is not None:
        model = base()
    if is_hooked(model) and hasattr(model, "original_model"):
        parts = anatomy(model)
        name = getattr(model.cfg, "model_name", "this model")
        return Decoder(
            model,
            name,
            model.cfg.n_layers,
            model.cfg.d_model,
            {at: model.blocks[at].get_submodule("attn") for at in parts.attention_layers},
            {},
            {},
            unread=(unread := tuple(block.layer for block in parts.blocks if block.unread)),
            closed={
                n: model.blocks[n].get_submodule("attn")
                for n in unread
                if "attn" in model.blocks[n]._modules
            },
        )
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise InterventionError(
            "this edit needs a TransformerBridge or a transformers causal LM, got "
            f"{type(model).__name__}; melens.load it first."
        )
    require_undivided(model)
    return _plain(model)


PARTS = (".attn", ".ln1", "", ".mlp", ".ln2")
"""What TransformerLens calls a block's parts; "" is the block itself."""


def _plain(model: Any) -> Decoder:
    """By TransformerLens' map of the architecture, or by measurement where it has none."""
    adapter = _adapter(model)
    if adapter is None:
        return _measured(model)
    n_layers = adapter.cfg.n_layers
    found: dict[str, dict[int, torch.nn.Module]] = {name: {} for name in PARTS}
    for layer in range(n_layers):
        for name, kept in found.items():
            module = _part(adapter, model, f"blocks.{layer}{name}")
            if module is not None:
                kept[layer] = module
    attentions, norms, blocks, ffns, ffn_norms = found.values()
    if not attentions and any(holds_attention(block) for block in blocks.values()):
        return _measured(model)
    unread = (n for n in blocks if n not in attentions and holds_attention(blocks[n]))
    name, size = type(model).__name__, adapter.cfg.d_model
    return Decoder(
        model, name, n_layers, size, attentions, norms, blocks, ffns, ffn_norms, tuple(unread)
    )


def _measured(model: Any) -> Decoder:
    """What each module does was seen in a short run (`roles`); once for every model."""
    from melens.models.contract import failing, probe_ids
    from melens.models.roles import roles_of
    from melens.models.view import view_of

    name = type(model).__name__
    if model not in _ROLES:
        with failing(f"the parts of {name} cannot be measured"):
            # a view has none of the hooks that may be open on the model
            plain = cast("TransformersModel", view_of(model))
            _ROLES[model] = roles_of(plain, probe_ids(model.config))
    blocks = dict(enumerate(layer_list(model)))
    found: list[dict[int, torch.nn.Module]] = [{}, {}, {}, {}]
    for row in _ROLES[model]:
        mixer = next((p for p in row.mixers if holds_attention(blocks[row.layer], p)), None)
        if row.why:
            mixer = _attention_in(blocks[row.layer])
        paths = (mixer, row.norms.get("ln1"), row.ffn or None, row.ffn_reads)
        for kept, path in zip(found, paths, strict=True):
            if path is not None:
                kept[row.layer] = blocks[row.layer].get_submodule(path)
    attentions, norms, ffns, ffn_norms = found
    size = model.get_input_embeddings().weight.shape[-1]
    unread = tuple(n for n in blocks if n not in attentions and holds_attention(blocks[n]))
    return Decoder(
        model, name, len(blocks), size, attentions, norms, blocks, ffns, ffn_norms, unread
    )


def _attention_in(block: torch.nn.Module) -> str | None:
    """The one module that calls itself attention, in a block whose parts could not be told."""
    found = [path for path, part in block.named_modules() if "Attention" in type(part).__name__]
    tops = [p for p in found if not any(p.startswith(f"{other}.") for other in found)]
    return tops[0] if len(tops) == 1 else None


def _part(
    adapter: ArchitectureAdapter, model: TransformersModel, name: str
) -> torch.nn.Module | None:
    try:
        found = adapter.get_component(model, name)
    except (ValueError, AttributeError, KeyError):  # a hybrid's layer, or a family without it
        return None
    return found if isinstance(found, torch.nn.Module) else None


def _adapter(model: TransformersModel) -> ArchitectureAdapter | None:
    """TransformerLens's map of where this architecture keeps its parts; None where it has none."""
    from transformer_lens.factories import architecture_adapter_factory as factories
    from transformer_lens.model_bridge.sources import build_bridge_config_from_hf

    architecture = type(model).__name__
    config = copy.deepcopy(model.config)
    config.architectures = [architecture]
    try:
        cfg = build_bridge_config_from_hf(config, architecture, architecture, torch.float32)
        return factories.ArchitectureAdapterFactory.select_architecture_adapter(cfg)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


class Keeping:
    """A cache that notes the keys and values it is shown, and hands them back as they are."""

    def __init__(self) -> None:
        self.pair: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        """``[batch, head, pos, d]`` keys and values of the whole sequences."""
        self.pair = (keys.detach(), values.detach())
        return keys, values

    def get_seq_length(self, *rest: object) -> int:
        """Nothing came before."""
        return 0


class RecordedPrefix:
    """A cache that puts recorded keys and values before new ones, and changes nothing."""

    def __init__(self, pair: tuple[Tensor, Tensor], start: int, copies: int) -> None:
        self.pair = tuple(
            repeat(x[:, :, :start], "row head pos d -> (copy row) head pos d", copy=copies)
            for x in pair
        )
        self.start = start

    def update(self, keys: Tensor, values: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        """The whole sequences' keys and values."""
        before_k, before_v = self.pair
        return torch.cat([before_k, keys], dim=-2), torch.cat([before_v, values], dim=-2)

    def get_seq_length(self, *rest: object) -> int:
        """Positions before the new ones."""
        return self.start
