"""Tiny random transformers with planted massive activations, as ground truth for a locator.

Layers are 0-based and mean the output of a decoder block, before any final norm. A planted token
is recognised by its id, so neither batch order nor padding changes what it does. Only for BOS as
first real token the amounts are exact; behind other tokens they vary, and a stage of "re-emergent"
is then not erased in full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2")
KINDS = ("single", "multi-step", "gradual", "re-emergent", "final-growth", "several-tokens", "none")
ERASABLE = ("single", "multi-step", "gradual", "re-emergent")

HIDDEN, VOCAB, HEADS, KV_HEADS, INNER = 64, 128, 4, 2, 128
PAD_ID, BOS_ID, EOS_ID, SECOND_ID = 0, 1, 2, 5
SECOND_SCALE = 0.5  # size of the second token's activation relative to the BOS one
MARK, ORDINARY = 6.0, -1.5  # marker coordinate of planted and of ordinary tokens
MARK_READ, GATE, UP = 4.0, 5.0, 0.5  # how strongly a planted neuron reads the marker
WRITE = 0.3  # size of the random writes; keeps the residual median near 1
QUIET = 0.25  # ordinary spread on planted dims, so that their neurons stay shut
LEFTOVER = 12.0  # most that an erasure leaves of a coordinate
SHARE = 0.1  # share of the final coordinate at which an activation counts as present


@dataclass(frozen=True)
class Truth:
    """What was planted; `layers` is empty and the optional fields are None where nothing was.

    Attributes:
        kind: One of `KINDS`.
        me_layer: Layer where what stays first appears (None for none and final-growth).
        main_layer: Layer of the step which adds most.
        layers: All planted layers in order, erasing ones included.
        erased_at: Layer which erases the first stage (re-emergent only).
        dim: Residual coordinate which stays massive.
        token_ids: Ids planted massive, BOS first; the whole vocabulary if every token is.
        late_erasure: Layer which erases what stays (only with an eraser planted).
    """

    kind: str
    me_layer: int | None = None
    main_layer: int | None = None
    layers: tuple[int, ...] = ()
    erased_at: int | None = None
    dim: int | None = None
    token_ids: tuple[int, ...] = ()
    late_erasure: int | None = None


@dataclass(frozen=True)
class Planted:
    """A model in eval mode with its truth."""

    family: str
    seed: int
    model: PreTrainedModel
    truth: Truth


@dataclass(frozen=True)
class _Step:
    """One planted FFN write: `amount` added to coordinate `dim` of the BOS token."""

    layer: int
    dim: int
    amount: float
    marker: float = MARK_READ


@dataclass(frozen=True)
class _Slots:
    """Reserved coordinates and FFN neurons; index 0 serves BOS, index 1 the second token."""

    dims: tuple[int, int]
    markers: tuple[int, int]
    dump: int
    neurons: tuple[int, int]


def plant(family: str, kind: str, seed: int, *, eraser: bool = False) -> Planted:
    """Builds a random model of `family` with an emergence of `kind` planted.

    Args:
        family: One of `FAMILIES`.
        kind: One of `KINDS`.
        seed: Any non-negative integer; everything follows from the arguments.
        eraser: Whether a late layer takes the activation away (one of `ERASABLE`).
    """
    number = (seed * len(KINDS) + KINDS.index(kind)) * len(FAMILIES) + FAMILIES.index(family)
    rng = torch.Generator().manual_seed(number)
    n_layers = _pick(rng, 8, 10)
    order = torch.randperm(HIDDEN, generator=rng).tolist()
    neurons = torch.randperm(INNER, generator=rng).tolist()
    slots = _Slots((order[0], order[1]), (order[2], order[3]), order[4], (neurons[0], neurons[1]))
    steps, truth = _SCHEDULES[kind](n_layers, slots.dims, seed, rng)
    if eraser:
        steps, truth = _erased(n_layers, steps, truth, number)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(_config(family, n_layers)).float().eval()
    groups = _groups(truth)
    with torch.no_grad():
        _randomise(family, model, rng)
        _edit_embedding(model, slots, groups)
        if kind == "none" and seed % 2:
            _add_shared_outlier(model, slots.dims[0], rng)
        _quieten(model, slots)
        done: dict[int, float] = {}
        for step in steps:
            _plant_step(model, step, slots, len(groups), done)
            done[step.dim] = done.get(step.dim, 0.0) + step.amount
    return Planted(family, seed, model, truth)


def batch(planted: Planted, n: int = 4, length: int = 48, seed: int = 0) -> torch.LongTensor:
    """Draws token ids whose rows start with BOS and hold no other special id.

    Args:
        planted: Decides whether the second planted id occurs (1-2 times a row) or not at all.
        n: Number of rows.
        length: Row length, at least 3.
        seed: Seed of the ids.
    """
    rng = torch.Generator().manual_seed(seed)
    words = torch.tensor([i for i in range(EOS_ID + 1, VOCAB) if i != SECOND_ID])
    ids = words[torch.randint(len(words), (n, length), generator=rng)]
    ids[:, 0] = BOS_ID
    if planted.truth.kind == "several-tokens":
        for row in ids:
            places = 1 + torch.randperm(length - 1, generator=rng)[: _pick(rng, 1, 2)]
            row[places] = SECOND_ID
    return ids


def _pick(rng: torch.Generator, low: int, high: int) -> int:
    """Draws an integer from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def _uniform(rng: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def _signed(rng: torch.Generator, low: float, high: float) -> float:
    """Draws a magnitude from [low, high] with a random sign."""
    return _uniform(rng, low, high) * (2 * _pick(rng, 0, 1) - 1)


# --- Schedules: which layer writes how much, and the truth that follows.

Schedule = tuple[list[_Step], Truth]


def _truth(kind: str, steps: Sequence[_Step]) -> Truth:
    """Derives the truth of writes that all add to one dim."""
    total = sum(step.amount for step in steps)
    so_far, me_layer = 0.0, None
    for step in steps:
        so_far += step.amount
        if me_layer is None and so_far / total >= SHARE:
            me_layer = step.layer
    main = max(steps, key=lambda step: abs(step.amount))
    layers = tuple(step.layer for step in steps)
    return Truth(kind, me_layer, main.layer, layers, None, main.dim, (BOS_ID,))


def _single(
    n: int, dims: tuple[int, int], seed: int, rng: torch.Generator, low: float = 4000.0
) -> Schedule:
    layer = 0 if seed % 5 == 4 else _pick(rng, 1, n - 4)
    steps = [_Step(layer, dims[0], _signed(rng, low, 20000))]
    return steps, _truth("single", steps)


def _several(n: int, dims: tuple[int, int], seed: int, rng: torch.Generator) -> Schedule:
    # The floor is doubled because the second token gets half the amount.
    steps, truth = _single(n, dims, seed, rng, low=8000.0)
    return steps, replace(truth, kind="several-tokens", token_ids=(BOS_ID, SECOND_ID))


def _multi_step(n: int, dims: tuple[int, int], seed: int, rng: torch.Generator) -> Schedule:
    first = _pick(rng, 0, n - 5)
    second = _pick(rng, first + 2, n - 2)
    share = (0.45, 0.6, 0.4, 0.55)[seed % 4]
    total = _signed(rng, 8000, 20000)
    steps = [_Step(first, dims[0], share * total), _Step(second, dims[0], (1 - share) * total)]
    return steps, _truth("multi-step", steps)


def _gradual(n: int, dims: tuple[int, int], seed: int, rng: torch.Generator) -> Schedule:
    count = _pick(rng, 6, min(8, n - 2))
    start = _pick(rng, 0, n - 1 - count)
    weights = [_uniform(rng, 0.97, 1.03) for _ in range(count)]
    weights[_pick(rng, 1, count - 1)] = 1.3  # the largest step has to be beyond doubt
    if seed % 3 == 2:
        weights[0] = 0.15  # too small a share to count: me_layer is the second step
    unit = _signed(rng, 15000, 20000) / sum(weights)
    steps = [_Step(start + i, dims[0], unit * weight) for i, weight in enumerate(weights)]
    return steps, _truth("gradual", steps)


def _re_emergent(n: int, dims: tuple[int, int], seed: int, rng: torch.Generator) -> Schedule:
    first = _pick(rng, 0, 2)
    erase = _pick(rng, first + 1, first + 2)
    second = _pick(rng, erase + 1, n - 2)
    stays, early = dims[0], dims[seed % 2]
    final = _signed(rng, 5000, 20000)
    stage = final * _uniform(rng, 0.2, 0.5)
    # The rest is bounded in size, not in share, so that the token's norm is ordinary again.
    rest = _uniform(rng, 0, LEFTOVER) * (1 if stage > 0 else -1)
    steps = [_Step(first, early, stage), _Step(erase, early, rest - stage)]
    steps.append(_Step(second, stays, final))
    layers = (first, erase, second)
    return steps, Truth("re-emergent", second, second, layers, erase, stays, (BOS_ID,))


def _final_growth(n: int, dims: tuple[int, int], seed: int, rng: torch.Generator) -> Schedule:
    others = [i for i in range(VOCAB) if i != BOS_ID]
    ids = (BOS_ID, *others) if seed % 2 else (BOS_ID,)
    steps = [_Step(n - 1, dims[0], _signed(rng, 5000, 12000))]
    return steps, Truth("final-growth", None, n - 1, (n - 1,), None, dims[0], ids)


def _erased(n: int, steps: list[_Step], truth: Truth, number: int) -> Schedule:
    """Adds a late eraser; how it reads decides how far its ceiling lies above what it writes."""
    rng = torch.Generator().manual_seed(number + 1_000_000_007)
    assert truth.kind in ERASABLE
    assert truth.dim is not None
    total = sum(step.amount for step in steps if step.dim == truth.dim)
    layer = _pick(rng, max(steps[-1].layer + 1, n // 2), n - 1)
    rest = _uniform(rng, 0, LEFTOVER) * (1 if total > 0 else -1)
    # Reading the coordinate alone, its ceiling is what it writes: the least that it can be.
    step = _Step(layer, truth.dim, rest - total, marker=_uniform(rng, 0, MARK_READ))
    return [*steps, step], replace(truth, late_erasure=layer)


_SCHEDULES: dict[str, Callable[[int, tuple[int, int], int, torch.Generator], Schedule]] = {
    "single": _single,
    "multi-step": _multi_step,
    "gradual": _gradual,
    "re-emergent": _re_emergent,
    "final-growth": _final_growth,
    "several-tokens": _several,
    "none": lambda *_: ([], Truth("none")),
}


# --- Models: one view on four layouts, with every weight as (out, in).


def _config(family: str, n_layers: int) -> PretrainedConfig:
    shape = {"vocab_size": VOCAB, "max_position_embeddings": 256, "num_hidden_layers": n_layers}
    shape |= {"hidden_size": HIDDEN, "num_attention_heads": HEADS}
    if family == "gpt2":
        shape |= {"n_inner": INNER}
    else:
        shape |= {"intermediate_size": INNER, "num_key_value_heads": KV_HEADS}
        shape |= {"head_dim": HIDDEN // HEADS}
    if family == "gemma2":
        shape |= {"query_pre_attn_scalar": HIDDEN // HEADS}
    special = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    return AutoConfig.for_model(family, **special, **shape)


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def _attention_out(block: nn.Module) -> Tensor:
    return block.attn.c_proj.weight.T if hasattr(block, "attn") else block.self_attn.o_proj.weight


def _ffn_out(block: nn.Module) -> Tensor:
    mlp = block.mlp
    return mlp.c_proj.weight.T if hasattr(mlp, "c_proj") else mlp.down_proj.weight


def _ffn_in(block: nn.Module) -> list[tuple[Tensor, float]]:
    """Gives the FFN's input weights with the strength at which a planted neuron reads."""
    mlp = block.mlp
    if hasattr(mlp, "c_fc"):
        return [(mlp.c_fc.weight.T, GATE)]
    return [(mlp.gate_proj.weight, GATE), (mlp.up_proj.weight, UP)]


def _randomise(family: str, model: PreTrainedModel, rng: torch.Generator) -> None:
    """Redraws every parameter from `rng`, the embedding at size 1 in the residual stream."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=rng)
        if name.endswith("bias"):
            weight.zero_()
        elif weight.ndim == 1:
            base = 0.0 if family == "gemma2" else 1.0
            if family == "gemma2" and ".post_" in name:
                base = WRITE - 1.0  # these norms, not the projections, set the size of a write
            weight.copy_(base + 0.05 * noise)
        elif "wpe" in name:
            # Small, so that even an erasure is not upset by padding without position ids.
            weight.copy_(0.001 * noise)
        elif "embed_tokens" in name or "wte" in name:
            weight.copy_(noise / _embedding_scale(model))
        else:
            fan_in = weight.shape[0 if family == "gpt2" else 1]
            writes = name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight"))
            weight.copy_(noise * (WRITE if writes else 1.0) / fan_in**0.5)


def _embedding_scale(model: PreTrainedModel) -> float:
    return HIDDEN**0.5 if model.config.model_type == "gemma2" else 1.0


def _groups(truth: Truth) -> list[list[int]]:
    """Splits the planted ids by marker: ids of one group get the same amount."""
    if truth.kind == "several-tokens":
        return [[BOS_ID], [SECOND_ID]]
    return [list(truth.token_ids)] if truth.token_ids else []


def _edit_embedding(model: PreTrainedModel, slots: _Slots, groups: list[list[int]]) -> None:
    """Marks the planted ids; the others get the opposite sign, which shuts the neurons."""
    weight, scale = model.get_input_embeddings().weight, _embedding_scale(model)
    weight[:, list(slots.dims)] *= QUIET
    weight[:, list(slots.markers)] = ORDINARY / scale
    for marker, ids in zip(slots.markers, groups, strict=False):
        weight[ids, marker] = MARK / scale


def _add_shared_outlier(model: PreTrainedModel, dim: int, rng: torch.Generator) -> None:
    """Gives all tokens one coordinate of about 20 times the median, which is not massive."""
    noise = torch.randn(VOCAB, generator=rng)
    value = _signed(rng, 15, 17) * (1 + 0.05 * noise)
    model.get_input_embeddings().weight[:, dim] = value / _embedding_scale(model)


def _quieten(model: PreTrainedModel, slots: _Slots) -> None:
    """Keeps random writes off the markers and small on the planted dims."""
    for block in _blocks(model):
        for weight in (_attention_out(block), _ffn_out(block)):
            weight[list(slots.markers)] = 0.0
            weight[list(slots.dims)] *= QUIET


def _plant_step(
    model: PreTrainedModel, step: _Step, slots: _Slots, n_groups: int, done: dict[int, float]
) -> None:
    """Reserves one neuron per group for `step` and scales its write to `step.amount`."""
    block = _blocks(model)[step.layer]
    out = _ffn_out(block)
    norm = getattr(block, "post_feedforward_layernorm", None)
    out[step.dim] = 0.0
    for index in range(n_groups):
        _reserve_neuron(block, step, slots, index, done)
    writes = _planted_writes(model, block.mlp if norm is None else norm, step.dim)
    if norm is not None:
        norm.weight[step.dim] = (1.0 + norm.weight[step.dim]) * step.amount / writes[0] - 1.0
        return
    for index in range(n_groups):
        wanted = step.amount * SECOND_SCALE**index
        out[step.dim, slots.neurons[index]] *= wanted / writes[index]


def _reserve_neuron(
    block: nn.Module, step: _Step, slots: _Slots, index: int, done: dict[int, float]
) -> None:
    """Lets one neuron fire for the tokens of group `index` only, and write to the step's dim."""
    neuron, scale = slots.neurons[index], SECOND_SCALE**index
    read = torch.zeros(HIDDEN)
    read[slots.markers[index]] = step.marker
    # A massive coordinate squeezes the marker to nothing in the normed input, so that a later
    # neuron has to read the coordinate itself. What an erasure leaves is too unsure to read.
    for dim, value in done.items():
        if abs(value) > LEFTOVER:
            read[dim] = 1.0 if value > 0 else -1.0
    for weight, strength in _ffn_in(block):
        weight[neuron] = strength * read
    out = _ffn_out(block)
    out[:, neuron] = 0.0
    out[step.dim, neuron] = scale if step.amount > 0 else -scale
    if hasattr(block, "post_feedforward_layernorm"):
        # This norm undoes any scaling, so a smaller write is one in a less pure direction: the
        # rest of it goes to a coordinate whose gain is zero.
        block.post_feedforward_layernorm.weight[slots.dump] = -1.0
        out[slots.dump, neuron] = (1.0 - scale**2) ** 0.5


def _planted_writes(model: PreTrainedModel, site: nn.Module, dim: int) -> list[float]:
    """Measures what `site` adds to `dim` of BOS and of the second token right after it."""
    seen: list[Tensor] = []
    with site.register_forward_hook(lambda _m, _i, output: seen.append(output[0, :, dim])):
        model(input_ids=torch.tensor([[BOS_ID, SECOND_ID]]), use_cache=False)
    return seen[0].tolist()


NEWLINE_ID, NEWLINE_AT = 9, 3


def plant_newline(seed: int = 0) -> Planted:
    """A GPT-2 in which one token, the newline, is massive at one position and ordinary elsewhere.

    BOS is massive wherever it is first. The marker that the planted neurons read is the sum of
    token and position: 6 for BOS and for a newline at NEWLINE_AT, at most -1.5 for all else.
    """
    planted = plant("gpt2", "single", seed)
    table = planted.model.transformer.wte.weight
    with torch.no_grad():
        marker = int((table[BOS_ID] == MARK).nonzero()[0])
        table[:, marker] = 1.5 * ORDINARY - MARK
        table[BOS_ID, marker], table[NEWLINE_ID, marker] = MARK, ORDINARY
        planted.model.transformer.wpe.weight[NEWLINE_AT, marker] = MARK - ORDINARY
    return planted


def newline_batch(n: int = 6, length: int = 24, seed: int = 0) -> torch.LongTensor:
    """Rows of BOS and words; newlines at NEWLINE_AT in every second row, elsewhere in all rows."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(NEWLINE_ID + 1, VOCAB, (n, length), generator=rng)
    ids[:, 0] = BOS_ID
    ids[::2, NEWLINE_AT] = NEWLINE_ID
    ids[:, 8::5] = NEWLINE_ID
    return ids
