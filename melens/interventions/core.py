"""The one place that registers an editing hook, so that no edit can fail in silence."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import SupportsFloat, SupportsIndex, TypeVar

import torch
from torch import Tensor

from melens.capture import check_sites, hooked
from melens.errors import EditWarning, InterventionError, NoTokenError
from melens.formatting import brief, counted
from melens.interventions.context import PassTokens, pass_of, watching
from melens.interventions.massive import FirstRule, MassiveRule, noting
from melens.interventions.target import Choice, Tokens, choice_of, meant, require_located_here
from melens.models.anatomy import check_layer
from melens.protocols import Args, Called, HookedModel, Kwargs
from melens.registry import Registry
from melens.results.locate import MELayer
from melens.shapes import TokenMask


@dataclass
class LayerSpan:
    """Least, mean and largest of what was seen so far."""

    count: int = 0
    total: float = 0.0
    least: float = float("inf")
    most: float = float("-inf")

    def take(self, values: Tensor) -> None:
        """Take in values of any shape, at least one."""
        self.count += values.numel()
        self.total += float(values.double().sum())
        self.least = min(self.least, float(values.min()))
        self.most = max(self.most, float(values.max()))

    @property
    def mean(self) -> float | None:
        """None where nothing was seen."""
        return self.total / self.count if self.count else None


@dataclass
class EditedTokens:
    """Which tokens an edit changed while it was open, and how massive they were.

    Counted once a forward pass, whatever the number of layers that the edit acts in. Coordinate
    (|x| in the massive dimension) and norm ratio (over the located texts' median norm) are read at
    the ME Layer's output, before the edit; they stay empty without a located ME Layer, and where
    the edit acts before that layer.
    """

    tokens: int = 0
    changed: bool = False
    """Whether any of them has other values than before; none has at a rate or strength of 0."""
    rows: int = 0
    """Rows of a pass with at least one edited token, summed over the passes."""
    ordinary: int = 0
    """Edited, but not massive in their pass."""
    missed: int = 0
    """Massive in a pass, but not known to be so where the edit acts (before the ME Layer)."""
    coordinate: LayerSpan = field(default_factory=LayerSpan)
    norm_ratio: LayerSpan = field(default_factory=LayerSpan)

    def take(self, chosen: TokenMask, now: PassTokens, rule: MassiveRule | None) -> None:
        """Take in one pass; ``rule`` is None where nothing can be known of the sizes yet."""
        self.tokens += int(chosen.sum())
        self.rows += int(chosen.any(dim=1).sum())
        if rule is None:
            return
        sizes = rule.sizes(now)
        chosen = chosen.to(sizes.device)
        massive = rule(now) & now.real.to(sizes.device)
        self.ordinary += int((chosen & ~massive).sum())
        if chosen.any():
            self.coordinate.take(sizes[0][chosen])
            if rule.median_norm:
                self.norm_ratio.take(sizes[1][chosen] / rule.median_norm)

    def miss(self, chosen: TokenMask | None, now: PassTokens, rule: MassiveRule) -> None:
        """Take in a pass that has come to the rule's layer after the edit acted."""
        massive = rule(now) & now.real.to(now.notes[rule].device)
        self.missed += int((massive if chosen is None else massive & ~chosen.to(massive)).sum())

    def summary(self) -> str:
        """What was edited, in words; layers count from 0 at the block output."""
        text = (
            f"{counted(self.tokens, 'token')} edited in {counted(self.rows, 'row')} of all passes"
        )
        if self.tokens and not self.changed:
            text += ", and nothing changed: every value is as it was (see rate and strength)"
        if self.coordinate.count:
            low, high = self.coordinate.least, self.coordinate.most
            text += f", massive coordinate {low:,.0f} to {high:,.0f}"
        if self.norm_ratio.count:
            low, high = self.norm_ratio.least, self.norm_ratio.most
            text += f", norm {low:.3g} to {high:.3g} x the located median"
        return f"{text}; {self.warning()}" if self.warning() else text

    def warning(self) -> str:
        """What a reader must not miss; empty where every edited token was massive."""
        parts = []
        if self.ordinary:
            parts.append(f"{self.ordinary} of {self.tokens} edited tokens were not massive")
        if self.missed:
            parts.append(
                f"{self.missed} massive tokens were not edited (before the ME Layer only first "
                "tokens are known; name the others with tokens=)"
            )
        return " and ".join(parts)


Editor = Callable[[Tensor, TokenMask, PassTokens], Tensor]
"""(x [batch, pos, ...] in float32 at least, chosen, now) -> the chosen tokens' new rows."""
ModuleEditor = Callable[[Tensor, Tensor, TokenMask], Tensor]
"""(output [batch, pos, ...], the chosen tokens' inputs, chosen) -> the chosen tokens' new rows."""
Reader = Callable[[Tensor], None]


@dataclass(frozen=True)
class Intervention:
    """One registered edit, with the settings that its contract test needs."""

    make: Callable[..., AbstractContextManager[object]]
    neutral: Mapping[str, object]
    """Settings under which it changes nothing, bit for bit."""
    strong: Mapping[str, object]
    """Settings under which it changes something."""
    about: str


Make = TypeVar("Make", bound=Callable[..., AbstractContextManager[object]])
INTERVENTIONS: Registry[Intervention] = Registry("intervention")


def intervention(
    name: str, *, neutral: Mapping[str, object], strong: Mapping[str, object]
) -> Callable[[Make], Make]:
    """Register a context manager ``(model, layer, *, tokens, ...)`` under its name."""

    def add(make: Make) -> Make:
        about = (make.__doc__ or "").strip().split("\n", 1)[0]
        INTERVENTIONS.add(name, Intervention(make, neutral, strong, about))
        return make

    return add


@dataclass
class Place:
    """Where an edit acts: a model's layer, and the tokens of every forward pass."""

    model: HookedModel
    layer: int
    choice: Choice
    rule: MassiveRule | None = None
    """Tells massive tokens, where a ME Layer was located."""
    known: int | None = None
    """The last layer whose output the edit comes after; -1 the embedding, None = not even that."""
    block: torch.nn.Module | None = field(default=None, repr=False)
    """A plain model's block that the rule reads."""
    passes: int = field(default=0)
    edited: EditedTokens = field(default_factory=EditedTokens)
    _marked: tuple[PassTokens, TokenMask, int] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, model: HookedModel, layer: int | MELayer, tokens: Tokens, *, after: bool = False
    ) -> Place:
        """Check layer and tokens before any forward pass.

        Args:    after: the edit acts on the layer's output, not inside it.
        Raises:  InterventionError: a ME Layer without a layer, or tokens that cannot be meant.
                 SiteError: a layer the model does not have. ResultError: a ME Layer of another.
        """
        if not hasattr(model, "hook_dict"):
            raise InterventionError(
                f"an edit needs a hooked model, got {type(model).__name__}; melens.load it first."
            )
        for given in (layer, tokens):
            require_located_here(model, given)
        at: object = layer
        if isinstance(layer, MELayer):
            at = layer.me_layer
            if at is None or at < 0:
                raise InterventionError(
                    f"{layer.run.model} has no block that its massive activation emerges in "
                    f"(ME Layer: {at}); name a layer."
                )
        number = as_index(at)
        if number is None:
            raise InterventionError(
                f"layer must be a number or what melens.locate returns, got {brief(layer)}."
            )
        check_layer(model, number)
        return cls.at(model, number, layer, tokens, known=number if after else number - 1)

    @classmethod
    def at(
        cls,
        model: HookedModel,
        number: int,
        layer: object,
        tokens: Tokens,
        *,
        known: int,
        blocks: Mapping[int, torch.nn.Module] | None = None,
    ) -> Place:
        """A place of a checked layer number; ``layer`` may be the located one behind it."""
        tokens = meant(layer, tokens)
        choice = choice_of(tokens, known=known)
        located = next((x for x in (tokens, layer) if isinstance(x, MELayer) and x.massive), None)
        every = isinstance(tokens, str) and tokens == "all"
        rule = MassiveRule.of(located) if located is not None and not every else None
        block = (blocks or {}).get(max(rule.layer, 0)) if rule is not None else None
        return cls(model, number, choice, rule, known, block)

    def marked(self, now: PassTokens) -> tuple[TokenMask, int]:
        """The chosen real tokens of a pass and their number, asked for once a pass."""
        if self._marked is None or self._marked[0] is not now:
            found = _checked(self.choice(now), now)
            chosen = found & now.real.to(found.device)
            self._marked = now, chosen, int(chosen.sum())
            if not now.again:
                self.passes += 1
                rule = self.rule
                self.edited.take(chosen, now, rule if rule and self._comes_after(rule) else None)
        return self._marked[1:]

    def _comes_after(self, rule: MassiveRule) -> bool:
        return self.known is not None and rule.layer <= self.known

    @contextmanager
    def noted(self, *, whole: bool = False) -> Iterator[None]:
        """Note every pass's tokens, and what the rule needs, while this is open."""
        with (
            watching(self.model, whole=whole),
            noting(self.model, self.rule, self.block, self._look_back),
        ):
            yield

    def _look_back(self, now: PassTokens) -> None:
        """First tokens were chosen before the ME Layer ran: which massive ones were left out?"""
        if isinstance(self.choice, FirstRule) and self.rule is not None and not now.again:
            own = self._marked is not None and self._marked[0] is now
            self.edited.miss(self._marked[1] if own and self._marked else None, now, self.rule)

    def hook(self, site: str) -> str:
        """Name of a hook of this layer."""
        return f"blocks.{self.layer}.{site}"


@contextmanager
def editing(
    place: Place,
    edits: Mapping[str, Editor],
    *,
    reads: Mapping[str, Reader] | None = None,
    whole: bool = False,
) -> Iterator[EditedTokens]:
    """Edit the chosen tokens at hook points; ``reads`` see their sites before, and change nothing.

    Args:    whole: the edit looks at other tokens too, so a run that holds only the end of a
             sequence would be edited otherwise; ``melens.resume`` then takes whole sequences.
    Raises:  SiteError: a hook name the model does not have.
             InterventionError: at the end, where no forward pass reached the edit or none of them
             held a chosen token.
    """
    check_sites(place.model, [*(reads or {}), *edits])
    hooks = [(site, _reading(reader)) for site, reader in (reads or {}).items()]
    hooks += [
        (site, _naming(place.layer, _writing(place, editor))) for site, editor in edits.items()
    ]
    with place.noted(whole=whole), hooked(place.model, hooks):
        yield place.edited
    _require_effect(place, ", ".join(edits))


@contextmanager
def editing_module(
    place: Place, module: torch.nn.Module, editor: ModuleEditor
) -> Iterator[EditedTokens]:
    """Edit what one of the model's own modules makes of the chosen tokens.

    It sees the module's input after every hook before it, and acts before every hook after it.

    Raises:  InterventionError: as :func:`editing`.
    """

    def write(_: torch.nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        given = args[0].detach()
        made = _writing(place, lambda x, chosen, now: editor(x, given[chosen].to(x), chosen))
        edited = made(out, module)
        return out if edited is None else edited

    with place.noted():
        handle = module.register_forward_hook(_naming(place.layer, write))
        try:
            yield place.edited
        finally:
            handle.remove()
    _require_effect(place, f"layer {place.layer}'s {type(module).__name__}")


InputEditor = Callable[[int, Tensor], Tensor]
"""(layer, the chosen tokens' rows [token, d_model], float32 at least) -> their new rows."""


@contextmanager
def editing_inputs(
    place: Place, modules: Mapping[int, torch.nn.Module], editor: InputEditor
) -> Iterator[EditedTokens]:
    """Edit the chosen tokens in what several layers' modules read, bridged or plain.

    Raises:  InterventionError: as :func:`editing`.
    """

    def before(layer: int) -> PreHook:
        write = _writing(place, lambda x, chosen, now: editor(layer, x[chosen]))

        def edit(module: torch.nn.Module, args: Args, kwargs: Kwargs) -> Called:
            name = "hidden_states"
            x = kwargs[name] if name in kwargs else args[0]
            made = write(x, module)
            if made is None:
                return None
            return (args, {**kwargs, name: made}) if name in kwargs else ((made, *args[1:]), kwargs)

        return edit

    with before_modules(place, modules, before):
        yield place.edited


PreHook = Callable[[torch.nn.Module, Args, Kwargs], Called]


@contextmanager
def before_modules(
    place: Place,
    modules: Mapping[int, torch.nn.Module],
    make: Callable[[int], PreHook],
    *,
    whole: bool = False,
) -> Iterator[EditedTokens]:
    """Change the arguments that several layers' modules are called with.

    ``make(layer)`` gives a torch pre-hook that counts in ``place`` what it touches; ``whole`` as
    for :func:`editing`.
    """
    with place.noted(whole=whole), ExitStack() as stack:
        for layer, module in modules.items():
            hook = _naming(layer, make(layer))
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield place.edited
    _require_effect(place, f"what attention reads in layers {', '.join(map(str, modules))}")


def _require_effect(place: Place, where: str) -> None:
    if not place.passes:
        raise InterventionError(f"an edit at {where} was active but no forward pass reached it.")
    if not place.edited.tokens:
        raise NoTokenError(
            f"an edit at {where} was active over {place.passes} forward pass"
            f"{'es' * (place.passes != 1)}, but none of them "
            f"held {_wanted(place)}; look at tokens= and at what the texts begin with (BOS, chat "
            "template: --bos, --chat)."
        )
    warn_of(place.edited, where)


def warn_of(edited: EditedTokens, where: str, *, stacklevel: int = 5) -> None:
    """Say aloud that ordinary tokens were edited, or massive ones were not."""
    if said := edited.warning():
        warnings.warn(f"an edit at {where}: {said}.", EditWarning, stacklevel=stacklevel)


def _wanted(place: Place) -> str:
    """What was looked for in vain."""
    if not isinstance(place.choice, MassiveRule):
        return "a token that it was to change"
    rule = place.choice
    return (
        f"a massive token (|x| over {rule.coordinate:,.0f} in dimension {rule.dim} and a norm of "
        f"{rule.norm:,.0f} at the output of layer {rule.layer}, as located)"
    )


def _naming(layer: int, hook: Callable[..., object]) -> Callable[..., object]:
    """The hook, whose errors say at which layer it fired: an edit may have many of them."""

    def call(*given: object) -> object:
        try:
            return hook(*given)
        except InterventionError as error:
            raise type(error)(f"layer {layer}: {error}") from None

    return call


def _reading(reader: Reader) -> Callable[..., None]:
    def read(x: Tensor, hook: object) -> None:
        reader(x.detach())

    return read


def _writing(place: Place, editor: Editor) -> Callable[..., Tensor | None]:
    def write(x: Tensor, hook: object) -> Tensor | None:
        now = pass_of(place.model)
        if tuple(now.positions.shape) != tuple(x.shape[:2]):
            raise InterventionError(
                f"{tuple(x.shape[:2])} tokens are held where the model was given "
                f"{tuple(now.positions.shape)}; this edit cannot tell them apart."
            )
        chosen, count = place.marked(now)
        if not count:
            return None
        chosen = chosen.to(x.device)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        made = x.clone()  # never in place on the model's own tensor
        made[chosen] = editor(wide, chosen, now).to(x.dtype)
        if not place.edited.changed:
            # detached: what this look saved for a backward pass, checkpointing would miss later
            place.edited.changed = not torch.equal(made.detach()[chosen], x.detach()[chosen])
        return made

    return write


def _checked(marked: object, now: PassTokens) -> Tensor:
    """What a rule for tokens gave, as a mask."""
    if not isinstance(marked, Tensor) or marked.shape != now.positions.shape:
        found = tuple(marked.shape) if isinstance(marked, Tensor) else type(marked).__name__
        raise InterventionError(
            f"a rule for tokens must give a mask {tuple(now.positions.shape)}, got {found}."
        )
    return marked.bool()


def blend(old: Tensor, new: Tensor, strength: float) -> Tensor:
    """``old`` at 0 and ``new`` at 1, each bit for bit."""
    if strength == 0:
        return old
    return new if strength == 1 else old + strength * (new - old)


def as_index(value: object) -> int | None:
    """A whole number of any library as an int; None for anything else."""
    if isinstance(value, (bool, str)) or not isinstance(value, SupportsIndex):
        return None
    return operator.index(value)


def check_number(name: str, value: object, *, low: float = -math.inf) -> float:
    """Refuse what is no number, or one below ``low``; infinity is one."""
    number = math.nan
    if isinstance(value, SupportsFloat) and not isinstance(value, (bool, str)):
        with suppress(TypeError, ValueError, OverflowError, RuntimeError):
            number = float(value)
    if not number >= low:
        floor = f" of at least {low:g}" if low > -math.inf else ""
        raise InterventionError(f"{name} must be a number{floor}, got {brief(value, 40)}.")
    return number


def check_indices(name: str, indices: Sequence[int], size: int, *, what: str) -> list[int]:
    """Refuse an empty list, and indices outside a width."""
    if not isinstance(indices, Iterable) or isinstance(indices, str):
        raise InterventionError(f"{name} must be a list of numbers, got {brief(indices, 40)}.")
    found = [as_index(i) for i in indices]
    if not found or any(i is None or not 0 <= i < size for i in found):
        raise InterventionError(
            f"{name} must be at least one of {what} 0 to {size - 1}, got {list(indices)[:6]}."
        )
    return [i for i in found if i is not None]
