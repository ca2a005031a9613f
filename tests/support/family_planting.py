"""A massive activation planted in one FFN neuron of any decoder, found by shape and measured.

Nothing here knows a family by name. FFN weights are those with a dimension of the FFN's width; the
reading direction is fitted to what the FFN receives; which layout, expert or norm gain carries the
value is found by trying and measuring. A trial that does not verify is undone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

BOS, ROWS, LENGTH = 1, 24, 24  # the token that turns massive, and the ids to measure with
MARK, ORDINARY = 1.5, -0.75  # own component of the token's embedding, and everyone else's
READ = 30.0  # how strongly the neuron reads; the token reads at 1
ASIDE = (0.3, 0.0)  # where other tokens are wanted on the other side of zero
REFITS = 50
QUIET = 50.0  # other tokens stay below size / QUIET
STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # down weights tried before a post-norm
NOT_FFN = ("attn", "attention", "conv", "mamba", "indexer", "norm", "router", "altup", "laurel")
WRITES = ("down", "output_linear", "w2")


class NoPlantError(ValueError):
    """No neuron of the block can carry the activation."""


@dataclass(frozen=True)
class Planted:
    """One planted neuron.

    Attributes:
        layer: The block, 0-based.
        dimension: Residual channel that turns massive.
        neuron: Index among the FFN's neurons.
        expert: Index among the routed experts; None for a dense or a shared FFN.
        weight: Name of the down weight.
        value: Residual channel at the token, at the block's output.
        others: Largest magnitude of any channel of any other token there.
        gain: Name of the norm gain that had to grow; None without a norm after the FFN.
    """

    layer: int
    dimension: int
    neuron: int
    expert: int | None
    weight: str
    value: float
    others: float
    gain: str | None = None


@dataclass
class Ffn:
    """Views of one FFN's weights: `down` is (..., hidden, inner), readers (..., rows, hidden)."""

    name: str
    down: Tensor
    entry: str  # name of the module whose input the readers see
    readers: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)

    @property
    def experts(self) -> int | None:
        """Number of routed experts; None for a dense FFN."""
        return self.down.shape[0] if self.down.ndim == 3 else None


@torch.no_grad()
def plant(
    model: PreTrainedModel, layer: int, dimension: int, *, size: float = 3000.0, inner: int = 48
) -> Planted:
    """Make token 1, standing first, massive in one channel at the output of a block.

    Plant in rising order of layers: a later block reads what an earlier one wrote.

    Args:    model: a model of :func:`families.tiny`, changed in place.
             inner: width of the FFN.
    Raises:  NoPlantError: the block has no such FFN, or no trial held.
    """
    bench = Bench(model, blocks_of(model)[layer], layer, dimension, size)
    found = list(ffns(bench.block, bench.hidden, inner))
    if not found:
        raise NoPlantError(f"block {layer} has no FFN weights of width {inner}")
    mark_token(model, bench)
    bench.see_stream()
    for ffn in found:
        for expert in range(ffn.experts) if ffn.experts else (None,):
            if not bench.reaches(ffn, expert):
                continue
            if (planted := _try_neuron(bench, ffn, expert, found)) is not None:
                return planted
    raise NoPlantError(f"no neuron of block {layer} held; best {bench.best}")


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks: the outermost list with the most parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


def mark_token(model: PreTrainedModel, bench: Bench) -> None:
    """Give token 1's embedding a component of its own, and all others the opposite."""
    weight = model.get_input_embeddings().weight
    grown = float(bench.entering_blocks().std() / weight.std())  # some families scale embeddings
    signs = torch.ones(weight.shape[1])
    signs[torch.randperm(len(signs), generator=torch.Generator().manual_seed(7))[::2]] = -1.0
    amount = torch.full((len(weight), 1), ORDINARY / max(grown, 1.0))
    amount[BOS] = MARK / max(grown, 1.0)
    weight += (amount - weight @ signs[:, None] / len(signs)) * signs


def ffns(block: nn.Module, hidden: int, inner: int) -> Iterator[Ffn]:
    """Every FFN of a block, routed experts first."""
    found: dict[str, Ffn] = {}
    for name, weight in _weights(block):
        view = _as_written(block, name, weight, hidden, inner)
        if view is not None:
            owner = name.removesuffix(".weight").rpartition(".")[0]
            found[owner] = Ffn(name, view, owner)
    for owner, ffn in found.items():
        _add_readers(block, owner, ffn, hidden, inner)
    usable = [ffn for ffn in found.values() if ffn.readers]
    yield from sorted(usable, key=lambda ffn: ffn.experts is None)


def _weights(block: nn.Module) -> list[tuple[str, Tensor]]:
    """Matrices outside attention, norms and routers."""
    named = [(n, p) for n, p in block.named_parameters() if p.ndim in (2, 3)]
    named = [(n, p.data) for n, p in named if not any(part in n.lower() for part in NOT_FFN)]
    return [(n, _unstacked(block, n, p)) for n, p in named]


def _unstacked(block: nn.Module, name: str, weight: Tensor) -> Tensor:
    """DBRX keeps its experts one below another in a matrix; others as they are."""
    owner = block.get_submodule(name.rpartition(".")[0])
    count = getattr(owner, "moe_num_experts", None)
    if weight.ndim == 2 and isinstance(count, int) and not name.endswith(".weight"):
        return weight.view(count, -1, weight.shape[1])
    return weight


def _is_reversed(block: nn.Module, name: str) -> bool:
    return isinstance(block.get_submodule(name.rpartition(".")[0]), Conv1D)


def _as_written(
    block: nn.Module, name: str, weight: Tensor, hidden: int, inner: int
) -> Tensor | None:
    """A down weight as (..., hidden, inner), or None for another matrix."""
    if weight.ndim == 2:
        matrix = weight.T if _is_reversed(block, name) else weight
        return matrix if matrix.shape == (hidden, inner) else None
    if not any(part in name for part in WRITES) or sorted(weight.shape[1:]) != sorted(
        (hidden, inner)
    ):
        return None
    return weight if weight.shape[2] == inner else weight.transpose(1, 2)


def _add_readers(block: nn.Module, owner: str, ffn: Ffn, hidden: int, inner: int) -> None:
    """The weights beside `ffn.down` that read the stream, with their biases."""
    for name, weight in _weights(block):
        inside = name.startswith(owner + ".") if owner else name.count(".") == 1
        if not inside or weight.ndim != ffn.down.ndim or name == ffn.name:
            continue
        if any(part in name.removeprefix(owner) for part in WRITES):
            continue
        if weight.ndim == 3:
            view = weight if weight.shape[2] == hidden else weight.transpose(1, 2)
        else:
            view = weight.T if _is_reversed(block, name) else weight
        if view.shape[-1] == hidden and view.shape[-2] in (inner, 2 * inner):
            ffn.readers.append(view)
            _note_entry(block, name, ffn)


def _note_entry(block: nn.Module, name: str, ffn: Ffn) -> None:
    """Remember a reader's bias, and the module whose input the reader sees."""
    everything = dict(block.named_parameters())
    bias = everything.get(name.removesuffix("weight") + "bias", everything.get(name + "_bias"))
    if bias is not None:
        ffn.biases.append(bias.data)
    if name.endswith(".weight"):
        ffn.entry = name.removesuffix(".weight")


class Bench:
    """Runs the model and measures at one block; undoes changes of weights."""

    def __init__(
        self, model: PreTrainedModel, block: nn.Module, layer: int, dimension: int, size: float
    ) -> None:
        self.model, self.block, self.layer = model, block, layer
        self.dimension, self.size = dimension, size
        self.hidden = model.config.get_text_config().hidden_size
        self.vocab = model.get_input_embeddings().weight.shape[0]
        self.ids = self.drawn(11)
        self.best: tuple[float, float] | None = None

    def drawn(self, seed: int) -> Tensor:
        """Random ids that start with the token."""
        noise = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, self.vocab, (ROWS, LENGTH), generator=noise)
        ids[:, 0] = BOS
        return ids

    def holds_elsewhere(self) -> bool:
        """Whether the plant holds on ids that nothing was fitted to."""
        kept, self.ids = self.ids, self.drawn(12)
        seen, self.ids = self.verified(), kept
        return seen is not None

    def see_stream(self) -> None:
        """Refuse a block whose output is not one vector a token."""
        stream = self.stream()
        if stream.shape != (*self.ids.shape, self.hidden):
            raise NoPlantError(f"the block gives {tuple(stream.shape)}, not one vector a token")

    def stream(self) -> Tensor:
        """Residual stream at the block's output."""
        caught: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            caught.append(output if isinstance(output, Tensor) else output[0])

        self._run(self.block.register_forward_hook(keep))
        return caught[0]

    def entering_blocks(self) -> Tensor:
        """What the first block reads."""
        return self._inputs(blocks_of(self.model)[0])[0]

    def entering(self, entry: str, expert: int | None) -> Tensor:
        """What enters an FFN, one row a token; the module above, where one sees a part only."""
        caught = self._inputs(self.block.get_submodule(entry))
        if len(caught) != 1 or caught[0].numel() % (self.ids.numel() * self.hidden):
            if not entry:
                raise NoPlantError("the FFN was not called once a pass")
            return self.entering(entry.rpartition(".")[0], expert)
        rows = caught[0].reshape(-1, self.ids.numel(), self.hidden)
        return rows[expert or 0] if len(rows) > 1 else rows[0]

    def _inputs(self, module: nn.Module) -> list[Tensor]:
        """First input of every call of a module in one pass."""
        caught: list[Tensor] = []

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict) -> None:
            caught.append(inputs[0] if inputs else named["hidden_states"])

        self._run(module.register_forward_pre_hook(keep, with_kwargs=True))
        return caught

    def _run(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        with handle:
            self.model(self.ids, use_cache=False)

    def reaches(self, ffn: Ffn, expert: int | None) -> bool:
        """Whether the token goes through this FFN or expert at all."""
        down = ffn.down if expert is None else ffn.down[expert]
        kept, before = down.clone(), self.stream()[:, 0]
        down *= 2.0
        after = self.stream()[:, 0]
        down.copy_(kept)
        return not torch.equal(before, after)

    def carried(self, column: Tensor) -> bool:
        """Whether the neuron's down weights make nine tenths of the value."""
        kept = column.clone()
        column.zero_()
        small = bool((self.stream()[:, 0, self.dimension].abs() < self.size / 10).all())
        column.copy_(kept)
        return small

    def value(self) -> float:
        """The channel at the first token."""
        return float(self.stream()[:, 0, self.dimension].median())

    def verified(self) -> tuple[float, float] | None:
        """The token's value and the largest of others, where both are as wanted."""
        stream = self.stream()
        value, others = stream[:, 0, self.dimension], stream[:, 1:].abs().max()
        held = bool((value > self.size / 2).all() and (value < self.size * 2).all())
        seen = float(value.median()), float(others)
        if self.best is None or abs(seen[0] - self.size) < abs(self.best[0] - self.size):
            self.best = seen
        return seen if held and others < self.size / QUIET else None


def _try_neuron(bench: Bench, ffn: Ffn, expert: int | None, all_ffns: list[Ffn]) -> Planted | None:
    """Plant in neuron 5 of an FFN or an expert; undo what does not hold."""
    neuron, kept = 5, {name: p.clone() for name, p in bench.block.named_parameters()}
    for aside in ASIDE:
        for interleaved in (False, True):
            _read(bench, ffn, expert, neuron, aside, interleaved)
            gain = None
            seen = _write(bench, ffn, expert, neuron)
            if seen is None:
                gain, seen = _write_through_norm(bench, ffn, expert, neuron, all_ffns)
            down = ffn.down if expert is None else ffn.down[expert]
            if seen and bench.carried(down[:, neuron]) and bench.holds_elsewhere():
                return Planted(bench.layer, bench.dimension, neuron, expert, ffn.name, *seen, gain)
            for name, p in bench.block.named_parameters():
                p.copy_(kept[name])
            if all(r.shape[-2] < 2 * ffn.down.shape[-1] for r in ffn.readers):
                break
    return None


def _read(
    bench: Bench, ffn: Ffn, expert: int | None, neuron: int, aside: float, interleaved: bool
) -> None:
    """Point the neuron's readers at the token."""
    inputs = bench.entering(ffn.entry, expert)
    first = torch.arange(0, len(inputs), bench.ids.shape[1])
    direction = fitted(inputs, first, aside) * READ
    inner = ffn.down.shape[-1]
    for rows in [*ffn.readers, *(bias[..., None] for bias in ffn.biases)]:
        own = rows if expert is None else rows[expert]
        at = [neuron]
        if own.shape[0] == 2 * inner:
            at = [2 * neuron, 2 * neuron + 1] if interleaved else [neuron, neuron + inner]
        own[at] = direction if own.shape[1] == len(direction) else 0.0


def fitted(inputs: Tensor, first: Tensor, aside: float) -> Tensor:
    """The direction that reads 1 on the first tokens and at most `-aside` on the others.

    Ridge regression, repeated: a token that reads low enough already is asked for no more.
    """
    x = inputs.double()
    weight = torch.full((len(x),), 1.0 / len(x), dtype=torch.float64)
    weight[first] = 1.0 / len(first)
    square = x.T @ (weight[:, None] * x)
    square += 1e-5 * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    target = torch.full_like(weight, -aside)
    for _ in range(REFITS):
        target[first] = 1.0
        direction = torch.linalg.solve(square, x.T @ (weight * target))
        target = (x @ direction).clamp(max=-aside)
    return (direction / (x[first] @ direction).mean()).to(inputs.dtype)


def _write(bench: Bench, ffn: Ffn, expert: int | None, neuron: int) -> tuple[float, float] | None:
    """Set the neuron's column so that the channel gets the wanted size."""
    down = ffn.down if expert is None else ffn.down[expert]
    down[:, neuron] = 0.0
    before = bench.value()
    for _ in range(2):
        weight = float(down[bench.dimension, neuron]) or 1.0
        down[bench.dimension, neuron] = weight
        gained = bench.value() - before
        if abs(gained) < 1e-3:
            return None
        down[bench.dimension, neuron] = weight * (bench.size - before) / gained
        if (seen := bench.verified()) is not None:
            return seen
    return None


def _write_through_norm(
    bench: Bench, ffn: Ffn, expert: int | None, neuron: int, all_ffns: list[Ffn]
) -> tuple[str | None, tuple[float, float] | None]:
    """Let the neuron alone write the channel, and raise the gain of the norm after the FFN."""
    for other in all_ffns:
        other.down[..., bench.dimension, :] = 0.0
    down = ffn.down if expert is None else ffn.down[expert]
    gains = [(n, p.data) for n, p in bench.block.named_parameters() if p.shape == (bench.hidden,)]
    gains = [(n, p) for n, p in reversed(gains) if "norm" in n.lower() or "ln" in n.lower()]
    for strength in STRENGTHS:
        down[bench.dimension, neuron] = strength / READ
        for name, gain in gains:
            if (seen := _raise_gain(bench, gain)) is not None:
                return name, seen
    return None, None


def _raise_gain(bench: Bench, gain: Tensor) -> tuple[float, float] | None:
    """Set one channel's gain to what gives the wanted size; undo it where that fails."""
    kept, before = gain.clone(), bench.value()
    gain[bench.dimension] += 1.0
    gained = bench.value() - before
    if abs(gained) > 0.5:
        gain[bench.dimension] = kept[bench.dimension] + (bench.size - before) / gained
        if (seen := bench.verified()) is not None:
            return seen
    gain.copy_(kept)
    return None
