"""What each module of a block does, measured: norms, mixers, the FFN, and what is added.

One forward pass of a plain transformers model, all modules of its blocks watched. Which outputs are
added to the residual, and how strongly, is the solution of linear equations; whether a part mixes
tokens is tried; the formula of an FFN is the one that gives what the down projection was seen to
read. No table of names takes part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from melens.capture import evaluating
from melens.errors import ModelError
from melens.models.decoder import layer_list
from melens.models.ffn_formula import Formula, formula_of
from melens.models.norms import Norm, measured_norm
from melens.placement import input_device
from melens.protocols import Args, Kwargs, TransformersModel
from melens.shapes import TokenIds

CLOSE = 1e-3
"""Of a tensor's largest entry: two tensors are the same one. float32 and wider; see `_close`."""
HALF_CLOSE = 3e-2
Seen = tuple[Tensor, Tensor]
"""What went into a module, and what came out."""


@dataclass(frozen=True)
class Roles:
    """One block's parts; paths are relative to the block, and "" is the block itself."""

    layer: int
    writes: dict[str, float]
    """Path of what is added to the residual -> the factor that it is added with."""
    norms: dict[str, str]
    """``ln1``, ``ln2`` (what mixer and FFN read through), ``ln1_post``, ``ln2_post`` -> path."""
    found: dict[str, Norm]
    """Path of each norm -> what it does."""
    mixers: dict[str, str]
    """Path of a part that mixes tokens -> the path of what it writes (a norm may follow it)."""
    ffn: str | None
    """Path of the FFN's container; "" where its layers stand in the block itself."""
    ffn_write: str | None
    ffn_reads: str | None
    """Path of the norm that the FFN reads through; None where it reads the residual itself."""
    formula: Formula | None
    """None for experts, and where no formula fits."""
    shared: Formula | None = None
    """The dense FFN that stands beside routed experts, if there is one."""
    others: dict[str, str] = field(default_factory=dict)
    """Further token-wise parts, as ``mixers``."""
    why: str | None = None
    """Why the parts could not be told, if they could not."""
    is_stream: bool = True
    """Whether one ``[batch, pos, d_model]`` tensor enters and leaves it."""


@torch.no_grad()
def roles_of(model: TransformersModel, ids: TokenIds) -> tuple[Roles, ...]:
    """Measure every block of a transformers model that is not bridged.

    Raises:  ModelError: it has no list of layers.
    """
    layers = layer_list(model)
    watches = [_BlockWatch(layer, block) for layer, block in enumerate(layers)]
    found: list[Roles] = []
    with evaluating(model), ExitStack() as stack:
        for watch in watches:
            watch.open(stack, found.append)
        model(ids.to(input_device(model)), use_cache=False)
    return tuple(found)


@dataclass
class _BlockWatch:
    """One block while it runs; measured as soon as it has, and then forgotten."""

    layer: int
    block: nn.Module
    seen: dict[str, Seen] = field(default_factory=dict)
    often: set[str] = field(default_factory=set)
    """Modules that ran more than once: what they do is not one thing (a shared dropout)."""
    shape: tuple[int, ...] | None = None
    """Rows and positions; None while nothing is noted."""

    def open(self, stack: ExitStack, done: Callable[[Roles], object]) -> None:
        """Watch every module of the block."""
        for path, module in self.block.named_modules():
            if path:
                hook = module.register_forward_hook(self._keep(path), with_kwargs=True)
                stack.callback(hook.remove)

        def begin(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
            given = _tensor((args, kwargs))
            self.shape = None if given is None else tuple(given.shape[:2])

        def end(module: nn.Module, args: Args, kwargs: Kwargs, out: object) -> None:
            self.shape = None  # parts are run again, and that is not to be noted
            given, made = _tensor((args, kwargs)), _tensor(out)
            if given is None or made is None or given.shape != made.shape or given.ndim != 3:
                done(replace(_untold(self.layer, "its residual is no stream"), is_stream=False))
            else:
                given = given.to(made.device)  # the first block of a device moves what it is given
                once = {p: pair for p, pair in self.seen.items() if p not in self.often}
                done(_measured(self.layer, self.block, given, made, once))
            self.seen.clear()

        stack.callback(self.block.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(self.block.register_forward_hook(end, with_kwargs=True).remove)

    def _keep(self, path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Args, kwargs: Kwargs, out: object) -> None:
            given, made = _tensor((args, kwargs)), _tensor(out)
            if self.shape is not None and given is not None and made is not None:
                self.often |= {path} & self.seen.keys()
                self.seen[path] = self._by_row(given), self._by_row(made)

        return keep

    def _by_row(self, x: Tensor) -> Tensor:
        """Some blocks flatten rows and positions into one axis (OPT)."""
        assert self.shape is not None
        rows, positions = self.shape
        flat = x.ndim == 2 and len(x) == rows * positions
        found = x.reshape(rows, positions, -1) if flat else x
        return found.detach().clone()  # some blocks add to a part's output in place (Falcon)


def _untold(
    layer: int, why: str, reads: Sequence[str] = (), norms: dict[str, Norm] | None = None
) -> Roles:
    """A block of which no more is known than the one norm that reads its residual."""
    found = {path: (norms or {})[path] for path in reads}
    before = {"ln1": path for path in reads}  # noqa: B035 (one at most)
    return Roles(layer, {}, before, found, {}, None, None, None, None, why=why)


def _measured(layer: int, block: nn.Module, x: Tensor, y: Tensor, seen: dict[str, Seen]) -> Roles:
    if not torch.isfinite(y).all():
        return _untold(layer, "what it leaves is not finite")
    writes = _writes(x, y, seen)
    norms = {path: norm for path in seen if (norm := _norm(block, path, seen[path])) is not None}
    if writes is None:
        why = "what it adds to the residual is the output of none of its modules"
        reads = [path for path in norms if _same(seen[path][0], x)]
        return _untold(layer, why, reads if len(reads) == 1 else [], norms)
    mixers: dict[str, str] = {}
    ffns: dict[str, str] = {}
    for write in writes:
        part = _source(write, norms, seen)
        (ffns if _is_tokenwise(block, part, seen) else mixers)[part] = write
    formulas = {part: formula_of(block, part, seen, _same) for part in ffns}
    main = max(ffns, key=lambda p: _weight(block, p, formulas[p], p in norms), default=None)
    places = _places(x, writes, norms, mixers, ffns.get(main or ""), seen)
    reads = None if main is None else _reads(main, formulas[main], norms, seen)
    if reads is not None and places.get("ln1") == reads and "ln2" in places:
        places["ln1"], places["ln2"] = places["ln2"], reads  # parallel parts, a norm each
    return Roles(
        layer=layer,
        writes=writes,
        norms=places,
        found=norms,
        mixers=mixers,
        ffn=None if main is None else _container(main, seen, x),
        ffn_write=None if main is None else ffns[main],
        ffn_reads=reads,
        formula=None if main is None else formulas[main],
        shared=None if main is None or formulas[main] else _shared(block, main, seen),
        others={part: write for part, write in ffns.items() if part != main},
    )


def _shared(block: nn.Module, part: str, seen: dict[str, Seen]) -> Formula | None:
    inside = [path for path in seen if path.startswith(f"{part}.")]
    found = (formula_of(block, path, seen, _same) for path in inside if _is_whole(block, path))
    return next((form for form in found if form is not None), None)


def _is_whole(block: nn.Module, path: str) -> bool:
    return any(True for _ in block.get_submodule(path).children())


def _reads(
    part: str, formula: Formula | None, norms: dict[str, Norm], seen: dict[str, Seen]
) -> str | None:
    given = seen[part if formula is None else formula.up][0]
    return next((path for path in norms if _same(seen[path][1], given)), None)


def _weight(block: nn.Module, part: str, formula: Formula | None, is_sum: bool) -> float:
    """Parameters of a token-wise part: of several the FFN is the one that has most, or that a norm
    makes of several parts' sum.
    """  # noqa: D205
    if is_sum:
        return math.inf
    home = part if formula is None or formula.down != part else part.rpartition(".")[0]
    return sum(p.numel() for p in block.get_submodule(home).parameters())


def _writes(x: Tensor, y: Tensor, seen: dict[str, Seen]) -> dict[str, float] | None:
    """Y = x + sum of factor * output: the least squares over outputs, those nearest the block
    first.
    """  # noqa: D205
    wide = [path for path, (_, out) in seen.items() if out.shape == y.shape and out is not y]
    wide = [path for path in wide if not _same(seen[path][1], y)]
    for depth in range(max((path.count(".") for path in wide), default=-1) + 1):
        chosen: list[str] = []
        for path in sorted((p for p in wide if p.count(".") <= depth), key=lambda p: p.count(".")):
            if not any(_same(seen[path][1], seen[other][1]) for other in chosen):
                chosen.append(path)
        found = _solve(x, y, {path: seen[path][1] for path in chosen})
        if found is not None:
            return found
    return None


def _solve(x: Tensor, y: Tensor, outputs: dict[str, Tensor]) -> dict[str, float] | None:
    """Every token counts by its own largest entry: a massive one would hide all others."""
    size = torch.maximum(_sizes(x), _sizes(y))
    finite = {path: out for path, out in outputs.items() if bool(out.isfinite().all())}
    outputs = {path: out for path, out in finite.items() if bool(out.any())}
    if not outputs:
        return None
    goal = _even(y.double() - x.double(), size)
    columns = torch.stack([_even(out.double(), size) for out in outputs.values()], dim=1)
    scale = columns.norm(dim=0)
    factors = torch.linalg.lstsq(columns / scale, goal[:, None]).solution[:, 0] / scale
    if not (goal - columns @ factors).abs().max() <= _limit(y):
        return None
    found = {
        path: 1.0 if abs(factor - 1) < 1e-2 else factor
        for n, (path, factor) in enumerate(zip(outputs, factors.tolist(), strict=True))
        if abs(factor) * columns[:, n].abs().max() > _limit(y)
    }
    return found or None


def _sizes(x: Tensor) -> Tensor:
    """Each token's largest entry."""
    return x.detach().abs().amax(-1, keepdim=True).double().cpu().clamp_min(1e-30)


def _even(x: Tensor, size: Tensor) -> Tensor:
    """Flat, in units of each token's size; on the CPU, where least squares may lack full rank."""
    return (x.cpu() / size).flatten()


def _norm(block: nn.Module, path: str, seen: Seen) -> Norm | None:
    given, made = seen
    module = block.get_submodule(path)
    if given.shape != made.shape or sum(1 for _ in module.parameters()) > 2:
        return None
    try:
        found = measured_norm(module, given.shape[-1], where=path)
    except torch.OutOfMemoryError:
        raise
    except (ModelError, RuntimeError, TypeError, ValueError, AttributeError):
        return None
    return None if isinstance(module, nn.Identity) else found


def _source(write: str, norms: dict[str, Norm], seen: dict[str, Seen]) -> str:
    """What a norm on the write path reads; what is written itself where there is none."""
    if write not in norms:
        return write
    given = seen[write][0]
    made = [p for p, (_, out) in seen.items() if p != write and _same(out, given)]
    return min(made, key=lambda path: path.count("."), default=write)


def _is_tokenwise(block: nn.Module, path: str, seen: dict[str, Seen]) -> bool:
    """Whether a part makes of one token alone what it makes of it in company."""
    given, made = seen[path]
    try:
        alone = _tensor(block.get_submodule(path).forward(given[:, -1:]))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
        return False
    return alone is not None and alone.shape == made[:, -1:].shape and _same(alone, made[:, -1:])


def _container(path: str, seen: dict[str, Seen], x: Tensor) -> str:
    """Where the FFN's layers stand: a down projection of the block's own has no container."""
    return path if seen[path][0].shape[-1] == x.shape[-1] else path.rpartition(".")[0]


def _places(
    x: Tensor,
    writes: dict[str, float],
    norms: dict[str, Norm],
    mixers: dict[str, str],
    ffn_write: str | None,
    seen: dict[str, Seen],
) -> dict[str, str]:
    """Norms by TransformerLens' names. A norm that both parts read through is ``ln1``."""
    added = [seen[path][1] * writes[path] for path in mixers.values()]
    middle = torch.stack([x, *added]).sum(0) if added else x
    found: dict[str, str] = {}
    for path in (p for p in seen if p in norms):
        given = seen[path][0]
        if path in mixers.values():
            found["ln1_post"] = path
        elif path == ffn_write:
            found["ln2_post"] = path
        elif given.shape == x.shape and _same(given, x):
            found["ln2" if "ln1" in found or not mixers else "ln1"] = path
        elif given.shape == x.shape and _same(given, middle):
            found["ln2"] = path
    return found


def _tensor(value: object) -> Tensor | None:
    """The first tensor of floats, as a module's arguments or outputs hold it."""
    return next(_floats(value), None)


def _floats(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        names = [name for name in ("hidden_states", "x", "input") if name in value]
        for name in names:
            yield from _floats(value[name])
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _floats(item)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, token by token."""
    if a is b:
        return True
    if a.shape != b.shape:
        return False
    scale = torch.maximum(a.abs(), b.abs()).amax(-1, keepdim=True)
    return bool(((a - b).abs() <= _limit(a) * scale).all())


def _limit(x: Tensor) -> float:
    return CLOSE if x.dtype.itemsize > 2 else HALF_CLOSE
