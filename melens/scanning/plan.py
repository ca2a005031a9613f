"""Where every layer's FFN lies in a checkpoint, by family: names and shapes, no weights read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from melens.errors import ModelError, WeightsError
from melens.metrics.ceilings import FLOORS, SQUARED
from melens.models.checkpoint import Checkpoint
from melens.models.complaints import what_to_do
from melens.protocols import JsonObject
from melens.registry import Registry


@dataclass(frozen=True)
class Ffn:
    """Tensor names inside a block; ``{e}`` counts experts, a third dimension stacks them."""

    up: str
    down: str
    gate: str | None = None
    fused: bool = False
    """Whether ``up`` holds the gate's rows first and then its own."""
    expert: str | None = None
    """What its experts are called; None = one FFN for every token."""


@dataclass(frozen=True)
class Layout:
    """A family's blocks."""

    blocks: tuple[str, ...]
    """How a block's names may begin, ``{l}`` its layer."""
    ffns: tuple[Ffn, ...]
    """Those that a block has are found by their names."""
    norm: str | None
    """The norm that the FFN reads through; None = it reads the residual as it is."""
    post: str | None = None
    """An RMSNorm on the FFN's write path."""
    layer_norm: bool = False
    transposed: bool = False
    """Whether matrices are kept as (in, out)."""
    offset: float = 0.0
    """Effective gain = offset + stored weight."""
    act: str = "silu"
    """Where the config names none."""
    hybrid: bool = False
    """Whether some of its mixers are linear attention (DeltaNet)."""


DENSE = Ffn("mlp.up_proj.weight", "mlp.down_proj.weight", "mlp.gate_proj.weight")
FC = Ffn("mlp.fc1.weight", "mlp.fc2.weight")
STACKED = Ffn("mlp.experts.gate_up_proj", "mlp.experts.down_proj", fused=True, expert="{e}")
EACH = Ffn(
    "mlp.experts.{e}.up_proj.weight",
    "mlp.experts.{e}.down_proj.weight",
    "mlp.experts.{e}.gate_proj.weight",
    expert="{e}",
)
SHARED = Ffn(
    "mlp.shared_expert.up_proj.weight",
    "mlp.shared_expert.down_proj.weight",
    "mlp.shared_expert.gate_proj.weight",
    expert="shared",
)
W123 = Ffn(
    "block_sparse_moe.experts.{e}.w3.weight",
    "block_sparse_moe.experts.{e}.w2.weight",
    "block_sparse_moe.experts.{e}.w1.weight",
    expert="{e}",
)
BLOCKS = ("model.layers.{l}.",)
AFTER_ATTENTION = "post_attention_layernorm"

HF: Registry[Layout] = Registry("model type with an FFN layout")
"""By ``model_type`` of config.json; other families are measured (`measured_plan`)."""


_HF = Layout(BLOCKS, (DENSE,), AFTER_ATTENTION)
_SANDWICH = replace(
    _HF,
    norm="pre_feedforward_layernorm",
    post="post_feedforward_layernorm",
    offset=1.0,
    act="gelu_pytorch_tanh",
)
HF.add("llama", _HF)
HF.add("qwen2", _HF)
HF.add("qwen3", _HF)
HF.add("mistral", _HF)
_PHI3 = Ffn("mlp.gate_up_proj.weight", "mlp.down_proj.weight", fused=True)
HF.add("phi3", replace(_HF, ffns=(_PHI3,)))
HF.add("gemma", replace(_HF, offset=1.0, act="gelu_pytorch_tanh"))
HF.add("gemma2", _SANDWICH)
HF.add("gemma3_text", _SANDWICH)
HF.add("olmo2", replace(_HF, norm=None, post="post_feedforward_layernorm"))
HF.add(
    "gpt2",
    Layout(
        ("transformer.h.{l}.", "h.{l}."),
        (Ffn("mlp.c_fc.weight", "mlp.c_proj.weight"),),
        "ln_2",
        layer_norm=True,
        transposed=True,
        act="gelu_new",
    ),
)
HF.add(
    "gpt_neox",
    Layout(
        ("gpt_neox.layers.{l}.", "layers.{l}."),
        (Ffn("mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"),),
        AFTER_ATTENTION,
        layer_norm=True,
        act="gelu",
    ),
)
HF.add("phi", Layout(BLOCKS, (FC,), "input_layernorm", layer_norm=True, act="gelu_new"))
HF.add(
    "opt",
    Layout(
        ("model.decoder.layers.{l}.", "decoder.layers.{l}."),
        (Ffn("fc1.weight", "fc2.weight"),),
        "final_layer_norm",
        layer_norm=True,
        act="relu",
    ),
)
HF.add("mixtral", replace(_HF, ffns=(W123, STACKED)))
HF.add("qwen3_moe", replace(_HF, ffns=(DENSE, EACH, STACKED)))
HF.add("qwen3_next", replace(_HF, ffns=(DENSE, EACH, STACKED, SHARED), offset=1.0, hybrid=True))

GGUF: Registry[Layout] = Registry("GGUF architecture with an FFN layout")
"""By ``general.architecture``. Gains kept around zero were made whole when the file was written."""

_GATED = Ffn("ffn_up.weight", "ffn_down.weight", "ffn_gate.weight")
_UNGATED = Ffn("ffn_up.weight", "ffn_down.weight")
_ALL_EXPERTS = Ffn(
    "ffn_up_exps.weight", "ffn_down_exps.weight", "ffn_gate_exps.weight", expert="{e}"
)
_ONE_EXPERT = Ffn("ffn_up.{e}.weight", "ffn_down.{e}.weight", "ffn_gate.{e}.weight", expert="{e}")
_SHARED_EXPERT = Ffn(
    "ffn_up_shexp.weight", "ffn_down_shexp.weight", "ffn_gate_shexp.weight", expert="shared"
)


_GGUF = Layout(("blk.{l}.",), (_GATED,), "ffn_norm")
_GEMMA = replace(_GGUF, act="gelu_pytorch_tanh")
_GPT = replace(_GGUF, ffns=(_UNGATED,), layer_norm=True)
_FUSED = Ffn("ffn_up.weight", "ffn_down.weight", fused=True)
GGUF.add("llama", replace(_GGUF, ffns=(_GATED, _ALL_EXPERTS, _ONE_EXPERT)))
GGUF.add("qwen2", _GGUF)
GGUF.add("qwen3", _GGUF)
GGUF.add("phi3", replace(_GGUF, ffns=(_FUSED,)))
GGUF.add("gemma", _GEMMA)
GGUF.add("gemma2", replace(_GEMMA, post="post_ffw_norm"))
GGUF.add("gemma3", replace(_GEMMA, post="post_ffw_norm"))
GGUF.add("olmo2", replace(_GGUF, norm=None, post="post_ffw_norm"))
GGUF.add("gpt2", replace(_GPT, act="gelu_new"))
GGUF.add("gptneox", replace(_GPT, act="gelu"))
GGUF.add("phi2", replace(_GPT, norm="attn_norm", act="gelu_new"))
GGUF.add("qwen3moe", replace(_GGUF, ffns=(_GATED, _ALL_EXPERTS)))
GGUF.add(
    "qwen3next",
    replace(
        _GGUF,
        ffns=(_GATED, _ALL_EXPERTS, _SHARED_EXPERT),
        norm="post_attention_norm",
        hybrid=True,
    ),
)


@dataclass(frozen=True)
class Matrix:
    """Some rows of a stored tensor."""

    name: str
    first: int
    rows: int
    columns: int


@dataclass(frozen=True)
class FfnPlan:
    """One FFN's matrices as stored. Gate and up have a row a neuron, or a column where
    ``transposed``; ``down`` the other way round.
    """  # noqa: D205

    up: Matrix
    down: Matrix
    gate: Matrix | None = None
    up_bias: str | None = None
    gate_bias: str | None = None
    expert: str | None = None


@dataclass(frozen=True)
class LayerPlan:
    """What one block writes through its FFN."""

    layer: int
    ffns: tuple[FfnPlan, ...] = ()
    norm: str | None = None
    norm_bias: str | None = None
    post: str | None = None
    factor: float = 1.0
    """What the block multiplies the FFN's write by before it is added to the residual."""
    reason: str | None = None
    """Why nothing is said of this layer; None where it is covered."""


@dataclass(frozen=True)
class CheckpointPlan:
    """A model's FFNs, and what holds for all of them."""

    layout: Layout
    d_model: int
    act: str
    route: float
    """The most that a router multiplies an expert by."""
    layers: tuple[LayerPlan, ...]
    beyond: int | None = None
    """First layer that the files hold beyond those that the config counts, if there is one."""


def plan_of(files: Checkpoint) -> CheckpointPlan:
    """Find every layer's FFN by name and shape; reads no weights.

    Raises:  ModelError: a family without a layout, an activation without a bound, or quantised
             weights. WeightsError: a tensor that is missing or of another shape.
    """
    layout, facts = _facts_gguf(files) if files.kind == "gguf" else _facts_hf(files)
    act = str(facts["act"])
    if act not in FLOORS:
        raise ModelError(
            f"{files.name} has the activation {act!r}, for which melens has no bound; it has one "
            f"for {', '.join(FLOORS)}."
        )
    d_model, n_layers = int(facts["d_model"]), int(facts["n_layers"])
    layers = tuple(_layer(files, layout, layer, d_model, facts) for layer in range(n_layers))
    if act == SQUARED and any(ffn.gate for layer in layers for ffn in layer.ffns):
        raise ModelError(f"{files.name} has {act} behind a gate, for which melens has no bound.")
    more = tuple(prefix.format(l=n_layers) for prefix in layout.blocks)
    beyond = n_layers if any(name.startswith(more) for name in files.tensors) else None
    return CheckpointPlan(layout, d_model, act, float(facts["route"]), layers, beyond)


def has_layout(files: Checkpoint) -> bool:
    """Whether the family's names are known without measuring."""
    if files.kind == "gguf":
        return files.config.get("general.architecture") in GGUF
    return files.config.get("model_type") in HF


def _facts_hf(files: Checkpoint) -> tuple[Layout, JsonObject]:
    config = files.config
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in HF:
        raise ModelError(
            f"melens knows no FFN layout of model type {kind!r}, so it cannot scan {files.name}; "
            f"known: {', '.join(HF)}."
        )
    if config.get("quantization_config"):
        raise ModelError(
            f"{files.name}: config.json has a quantization_config; scan the unquantised model or a "
            "GGUF of it, or remove that entry if the weights are plain numbers."
        )
    layout = HF[kind]
    facts = {
        "d_model": _first(config, "hidden_size", "n_embd"),
        "n_layers": _first(config, "num_hidden_layers", "n_layer"),
        "act": _first(
            config, "hidden_activation", "hidden_act", "activation_function", default=layout.act
        ),
        "experts": _first(config, "num_local_experts", "num_experts", default=0),
        "route": config.get("routed_scaling_factor") or 1.0,
        "reason": None
        if config.get("do_layer_norm_before", True)
        else "its norms come after the residual sum, so no norm bounds what the FFN reads",
    }
    projected = config.get("word_embed_proj_dim") not in (None, facts["d_model"])
    if projected and facts["reason"] is None:
        raise ModelError(f"{files.name} embeds in another width than its blocks; not covered.")
    return layout, _whole(files, facts)


def _facts_gguf(files: Checkpoint) -> tuple[Layout, JsonObject]:
    config = files.config
    kind = config.get("general.architecture")
    if not isinstance(kind, str) or kind not in GGUF:
        raise ModelError(
            f"melens knows no FFN layout of GGUF architecture {kind!r}, so it cannot scan "
            f"{files.name}; known: {', '.join(GGUF)}."
        )
    facts = {
        "d_model": config.get(f"{kind}.embedding_length"),
        "n_layers": config.get(f"{kind}.block_count"),
        "act": GGUF[kind].act,
        "experts": config.get(f"{kind}.expert_count") or 0,
        "route": config.get(f"{kind}.expert_weights_scale") or 1.0,
        "reason": None,
    }
    return GGUF[kind], _whole(files, facts)


def _whole(files: Checkpoint, facts: JsonObject) -> JsonObject:
    for name in ("d_model", "n_layers"):
        if not isinstance(facts[name], int) or facts[name] < 1:
            raise ModelError(f"{files.name}: its config gives no {name} ({facts[name]!r}).")
    return facts


def _first(config: JsonObject, *names: str, default: object = None) -> Any:
    """The first of several names under which a family may keep a setting."""
    return next((config[name] for name in names if config.get(name) is not None), default)


def _layer(
    files: Checkpoint, layout: Layout, layer: int, d_model: int, facts: JsonObject
) -> LayerPlan:
    if facts["reason"]:
        return LayerPlan(layer, reason=facts["reason"])
    prefixes = [begin.format(l=layer) for begin in layout.blocks]
    prefix = next((p for p in prefixes if any(_has(files, p, ffn) for ffn in layout.ffns)), None)
    if prefix is None:
        missing = prefixes[0] + layout.ffns[0].down.format(e=0)
        raise WeightsError(f"{files.where} lists no tensor {missing}; {what_to_do(files.tensors)}")
    found: list[FfnPlan] = []
    for ffn in layout.ffns:
        if _has(files, prefix, ffn):
            found += _ffns(files, layout, prefix, ffn, (d_model, int(facts["experts"])))
    norm = None if layout.norm is None else f"{prefix}{layout.norm}"
    post = None if layout.post is None else f"{prefix}{layout.post}.weight"
    for name in filter(None, (norm and f"{norm}.weight", post)):
        files.stored(name)
    bias = f"{norm}.bias"
    return LayerPlan(
        layer,
        tuple(found),
        norm and f"{norm}.weight",
        bias if bias in files.tensors else None,
        post,
    )


def _has(files: Checkpoint, prefix: str, ffn: Ffn) -> bool:
    """Whether any of an FFN's tensors is there; then all must be."""
    names = (prefix + name.format(e=0) for name in (ffn.up, ffn.down, ffn.gate) if name)
    return any(name in files.tensors for name in names)


def _ffns(
    files: Checkpoint, layout: Layout, prefix: str, ffn: Ffn, sizes: tuple[int, int]
) -> Iterator[FfnPlan]:
    """One FFN, or one an expert.

    Raises:  ModelError: experts that the config does not count.
    """
    d_model, experts = sizes
    many = ffn.expert == "{e}"
    if many and experts < 1:
        raise ModelError(f"{files.name} has experts, but its config does not say how many.")
    stacked = experts if many and "{e}" not in ffn.down else 0
    for e in range(experts if many else 1):
        up, down = (prefix + name.format(e=e) for name in (ffn.up, ffn.down))
        gate = None if ffn.gate is None else prefix + ffn.gate.format(e=e)
        names = _Names(up, down, gate, stacked, e)
        made = _one(files, names, d_model, fused=ffn.fused, transposed=layout.transposed)
        yield replace(made, expert=None if ffn.expert is None else ffn.expert.format(e=e))


class _Names(NamedTuple):
    """One FFN's tensors, and which of the experts stacked in them it is."""

    up: str
    down: str
    gate: str | None
    stacked: int
    """Experts in each tensor; 0 = a tensor each."""
    expert: int


def _one(
    files: Checkpoint, names: _Names, d_model: int, *, fused: bool, transposed: bool
) -> FfnPlan:
    """Matrices of one FFN, their shapes checked."""
    up, down = names.up, names.down
    shape = files.stored(up).shape
    if len(shape) < 2:
        raise WeightsError(f"{up} has shape {shape}; a matrix was expected.")
    inner = shape[-1 if transposed else -2] // (1 + fused)
    shape = (d_model, inner) if transposed else (inner, d_model)
    wide, back = (shape[0] * (1 + fused), shape[1]), shape[::-1]
    for name, expected in ((up, wide), (names.gate, shape), (down, back)):
        if name is not None:
            _check_shape(files, name, (names.stacked, *expected) if names.stacked else expected)
    at = names.expert if names.stacked else 0
    gate = Matrix(up, at * wide[0], *shape) if fused else None
    if names.gate is not None:
        gate = Matrix(names.gate, at * shape[0], *shape)
    return FfnPlan(
        up=Matrix(up, at * wide[0] + fused * inner, *shape),
        gate=gate,
        down=Matrix(down, at * back[0], *back),
        up_bias=_bias(files, up),
        gate_bias=_bias(files, names.gate),
    )


def _check_shape(files: Checkpoint, name: str, expected: tuple[int, ...]) -> None:
    stored = files.stored(name)
    if stored.shape != expected:
        raise WeightsError(
            f"{name} in {stored.blob.name} has shape {stored.shape}, expected {expected}."
        )


def _bias(files: Checkpoint, name: str | None) -> str | None:
    """The bias beside a matrix, where the file has one."""
    bias = (name or "").removesuffix(".weight") + ".bias"
    return bias if name and bias in files.tensors else None
