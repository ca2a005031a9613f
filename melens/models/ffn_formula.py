"""The formula of an FFN, found by trying: which layer is gate, which is up, and what bends them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

Bend = Callable[[Tensor], Tensor]
SPLITS = ("", "halves", "halves swapped", "turns", "turns swapped")
"""How one layer holds gate and up: not at all, one behind the other, or neuron by neuron."""


@dataclass(frozen=True)
class Formula:
    """product = activation(gate) * up, or activation(up); paths are relative to the block."""

    gate: str | None
    up: str
    """The same path as ``gate`` where one layer makes both."""
    down: str
    split: str
    """One of SPLITS."""
    activation: Bend


def split(x: Tensor, how: str, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Gate and up out of what one layer makes (or out of its weights, along the outputs)."""
    if how.startswith("halves"):
        first, second = x.chunk(2, dim)
    else:
        turns = x.unflatten(dim, (-1, 2))  # views: what is trained in place is seen
        at = dim if dim < 0 else dim - x.ndim
        first, second = turns.select(at, 0), turns.select(at, 1)
    return (second, first) if how.endswith("swapped") else (first, second)


def formula_of(
    block: nn.Module,
    part: str,
    seen: dict[str, tuple[Tensor, Tensor]],
    same: Callable[[Tensor, Tensor], bool],
) -> Formula | None:
    """Of a token-wise part: a container, or a down projection that stands in the block itself.
    None where none fits (experts, or something new).
    """  # noqa: D205
    alone = _is_layer(block, part)
    home = part.rpartition(".")[0] if alone else part
    inside = [path for path in seen if _inside(path, home, direct=alone) and _is_layer(block, path)]
    for down in [part] if alone else inside:
        product, made = seen[down]
        if not same(made, seen[part][1]):
            continue
        widths = (product.shape[-1], 2 * product.shape[-1])
        ups = [p for p in inside if p != down and seen[p][1].shape[-1] in widths]
        for gate, up, how, bend in _candidates(block, home, ups, product, seen):
            if same(_product(gate, up, how, bend, seen), product):
                return Formula(gate, up, down, how, bend)
    return None


def _product(
    gate: str | None, up: str, how: str, bend: Bend, seen: dict[str, tuple[Tensor, Tensor]]
) -> Tensor:
    if gate is None:
        return bend(seen[up][1])
    if how:
        first, second = split(seen[up][1], how)
        return bend(first) * second
    return bend(seen[gate][1]) * seen[up][1]


def _candidates(
    block: nn.Module,
    ffn: str,
    ups: list[str],
    product: Tensor,
    seen: dict[str, tuple[Tensor, Tensor]],
) -> Iterator[tuple[str | None, str, str, Bend]]:
    width = product.shape[-1]
    narrow = [path for path in ups if seen[path][1].shape == product.shape]
    double = [path for path in ups if seen[path][1].shape[-1] == 2 * width]
    for bend in bends(block.get_submodule(ffn), block):
        for up in narrow:
            yield None, up, "", bend
            for gate in narrow:
                if gate != up:
                    yield gate, up, "", bend
        for both in double:
            for how in SPLITS[1:]:
                yield both, both, how, bend


def bends(*homes: nn.Module) -> Iterator[Bend]:
    """Activations that containers keep as their own, then all that transformers knows."""
    from transformers.activations import ACT2FN

    for home in homes:
        for name, child in [*home.named_children(), *vars(home).items()]:
            known = any(mark in name for mark in ("act", "elu"))
            if known and callable(child) and not isinstance(child, type):
                yield cast("Bend", child)
    for name in ACT2FN:
        made = ACT2FN[name]
        if not any(True for _ in made.parameters()):
            yield made


def _inside(path: str, home: str, *, direct: bool) -> bool:
    """Whether a module stands in a container; ``direct``: in no module between."""
    start = f"{home}." if home else ""
    return path.startswith(start) and not (direct and "." in path[len(start) :])


def _is_layer(block: nn.Module, path: str) -> bool:
    """Whether a module multiplies by one matrix."""
    module = block.get_submodule(path)
    return any(p.ndim == 2 for p in module.parameters(recurse=False))
