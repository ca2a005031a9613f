"""stream(): one forward pass, reducers fed by hooks, constant memory, early stop, firing count."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from melens.batches import Batch, Prompts
from melens.errors import BusyError, CaptureError, PromptError, SiteError
from melens.framing import require_known
from melens.placement import input_device
from melens.protocols import AnyModel, Args, HookedModel, Kwargs, transformers_of

T = TypeVar("T")


@runtime_checkable
class Reducer(Protocol):
    """Takes one site's activations batch by batch and keeps only what it needs of them."""

    def update(self, x: Tensor, batch: Batch) -> None:
        """Take in ``x`` (read only; never keep it) of the rows of ``batch``."""
        ...

    def result(self) -> object:
        """What has been gathered; CaptureError before the first batch."""
        ...


class ChannelMax:
    """Largest |x| per channel over real tokens. Memory: d_model floats, any corpus size."""

    def __init__(self) -> None:
        self._max: Tensor | None = None

    def update(self, x: Tensor, batch: Batch) -> None:
        """Take in ``[batch, pos, d_model]`` activations."""
        rows = x.detach()[batch.mask].float().abs()
        new = rows.amax(dim=0)
        self._max = new if self._max is None else torch.maximum(self._max, new)

    def result(self) -> Float[Tensor, " d_model"]:
        """The maxima, on the CPU."""
        if self._max is None:
            raise CaptureError("ChannelMax saw no batch; pass it to stream() first.")
        return self._max.cpu()


@dataclass
class _Use:
    """Who has hooks on a model, how often over, and how many of them stay open for everybody."""

    owner: threading.Thread
    depth: int = 0
    kept: int = 0

    def refuse_others(self) -> None:
        if self.depth <= self.kept or self.owner is threading.current_thread():
            return
        if not self.owner.is_alive():  # what it left open is there for all, as a kept edit is
            self.kept = self.depth
            return
        raise BusyError(
            f"an edit or a capture of thread {self.owner.name} is open on this model, and its "
            "hooks would act on this thread's passes too; use the model from one thread at a time, "
            "or give each thread a model of its own."
        )


_USES: weakref.WeakKeyDictionary[object, _Use] = weakref.WeakKeyDictionary()
_USES_LOCK = threading.Lock()


def _key(model: AnyModel) -> AnyModel:
    return transformers_of(model)


@contextmanager
def one_thread(model: AnyModel) -> Iterator[None]:
    """The model belongs to this thread while this is open; hooks act on whoever runs it.

    Nests within one thread. Every edit, capture and resumed run opens it.

    Raises:  BusyError: another thread has it.
    """
    here = threading.current_thread()
    with _USES_LOCK:
        use = _USES.setdefault(_key(model), _Use(here))
        use.refuse_others()
        use.owner = here
        use.depth += 1
    try:
        yield
    finally:
        with _USES_LOCK:
            use.depth -= 1
            use.kept = min(use.kept, use.depth)
            if not use.depth:
                _USES.pop(_key(model), None)


def enter_kept(model: AnyModel, context: AbstractContextManager[T]) -> tuple[T, int]:
    """Enter a context that stays open, without the model being this thread's from then on.

    Returns: what the context gives, and what :func:`exit_kept` needs.
    Raises:  BusyError: another thread has the model.
    """
    with one_thread(model):
        use = _USES[_key(model)]
        before = use.depth
        found = context.__enter__()
        with _USES_LOCK:
            count = use.depth - before
            use.kept += count
    return found, count


def exit_kept(
    model: AnyModel, context: AbstractContextManager[object], count: int, error: Exception
) -> None:
    """Leave such a context with an error that it lets pass.

    Raises:  BusyError: another thread has the model at this moment.
    """
    with one_thread(model):
        with _USES_LOCK:
            _USES[_key(model)].kept -= count
        context.__exit__(type(error), error, None)


class EachPass:
    """Makes every forward pass of a model one thread's own, from its start to its end."""

    def __init__(self, model: AnyModel) -> None:
        self._running: tuple[threading.Thread, AbstractContextManager[None]] | None = None
        outer = _key(model)
        self._handles = [
            outer.register_forward_pre_hook(self._begin, prepend=True),
            outer.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, module: torch.nn.Module, *_: object) -> None:
        self._end()  # an interrupt leaves its pass behind
        mine = one_thread(module)
        mine.__enter__()
        self._running = threading.current_thread(), mine

    def _end(self, *_: object) -> None:
        running = self._running
        if running is not None and running[0] is threading.current_thread():
            self._running = None
            running[1].__exit__(None, None, None)

    def close(self) -> None:
        """No longer."""
        for handle in self._handles:
            handle.remove()


def require_this_thread(model: AnyModel) -> None:
    """Refuse a forward pass of a thread that the open edits or captures are not of.

    Blocks that a backward pass computes again (gradient checkpointing) run in a thread of
    autograd's, for the thread that asked for it.

    Raises:  BusyError: the model belongs to another thread.
    """
    if _in_backward() != -1:
        return
    use = _USES.get(_key(model))
    if use is not None:
        use.refuse_others()


_in_backward: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)
"""-1 outside a backward pass."""


Hooks = Iterable[tuple[str, Callable[..., object]]]


@contextmanager
def hooked(model: HookedModel, hooks: Hooks) -> Iterator[None]:
    """TransformerLens hooks (name, function) of this thread; another's pass through them is
    refused.

    Raises:  BusyError: here, or in a pass of another thread that reaches a hook.
    """  # noqa: D205

    def guarded(function: Callable[..., object]) -> Callable[..., object]:
        def call(x: Tensor, hook: object) -> object:
            require_this_thread(model)
            return function(x, hook)

        return call

    made = [(site, guarded(function)) for site, function in hooks]
    entered = model.hooks(fwd_hooks=made) if made else nullcontext()  # hooks() lists all
    with one_thread(model), entered:
        yield


@contextmanager
def work_counted(model: HookedModel) -> Iterator[Callable[[], float]]:
    """Counts tokens through blocks meanwhile: gives them as tokens through the whole model."""
    tokens = 0

    def count(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        nonlocal tokens
        resid = args[0] if args else kwargs["hidden_states"]
        tokens += resid.shape[0] * resid.shape[1]

    handles = [block.register_forward_pre_hook(count, with_kwargs=True) for block in model.blocks]
    try:
        yield lambda: tokens / len(handles)
    finally:
        for handle in handles:
            handle.remove()


class EverythingSeen(Exception):
    """Raised inside the last hook that was needed, to skip the rest of the forward pass."""


@torch.no_grad()
def stream(
    model: HookedModel,
    batches: Iterable[Batch] | Batch | Prompts | Any,
    taps: Mapping[str, Reducer],
    *,
    stop_early: bool = True,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Run ``model`` once over ``batches`` and feed each reducer from its site.

    Nothing is stored but what the reducers keep. Hooks are removed however this ends, an
    interrupt included. Edits entered before the call are seen.

    Args:    model: a TransformerBridge or a HookedTransformer; never moved, put in eval mode for
             the call and back.
             batches: token batches, prompts (packed four rows a batch), or token ids.
             taps: hook name -> reducer, e.g. ``{"blocks.3.hook_resid_post": ChannelMax()}``.
             stop_early: leave a forward pass once every site has fired (skips the unembedding
             and any layer after the last tap).
             progress: called with the number of rows done after every batch.
    Returns: the number of batches.
    Raises:  SiteError: a hook name the model does not have. BusyError: another thread has an edit
             or a capture open on the model.
             CaptureError: a site that did not fire exactly once a batch; no batch at all.
    """
    if not hasattr(model, "hook_dict"):
        raise CaptureError(
            f"stream() needs a hooked model, got {type(model).__name__}; melens.load it."
        )
    if isinstance(batches, Prompts):
        batches = batches.pack(model.tokenizer, max_length=getattr(model.cfg, "n_ctx", None))
    elif (read := Batch.read(batches, pad_id=pad_id_of(model))) is not None:
        batches = read
    given: Iterable[Batch] = [batches] if isinstance(batches, Batch) else batches
    check_sites(model, taps)
    fired: Counter[str] = Counter()
    seen: set[str] = set()
    current: list[Batch] = []

    def tap(site: str, reducer: Reducer) -> Callable[..., None]:
        def read(x: Tensor, hook: object) -> None:
            fired[site] += 1
            reducer.update(x, current[0].to(x.device))
            seen.add(site)
            if stop_early and len(seen) == len(taps):
                raise EverythingSeen

        return read

    count = 0
    hooks = [(site, tap(site, reducer)) for site, reducer in taps.items()]
    with hooked(model, hooks), evaluating(model):
        for count, batch in enumerate(given, start=1):
            seen.clear()
            batch = fit_ids(model, batch)
            current[:] = [batch]
            forward(model, batch)
            _require_firing(fired, taps, count)
            if progress is not None:
                progress(len(batch))
    if not count:
        raise CaptureError("stream() got no batch; give it at least one.")
    return count


def check_sites(model: HookedModel, sites: Iterable[str]) -> None:
    """Refuse hook names that the model does not have.

    Raises:  SiteError: naming the sites, before any forward pass.
    """
    known = model.hook_dict
    if missing := [site for site in sites if site not in known]:
        raise SiteError(
            f"this model has no hook {', '.join(missing[:3])}; layers count from 0 to "
            f"{model.cfg.n_layers - 1}. See model.hook_dict for the names."
        )


def pad_id_of(model: HookedModel) -> int | None:
    """What the model's tokenizer pads with; None without a tokenizer or a padding token."""
    return getattr(getattr(model, "tokenizer", None), "pad_token_id", None)


def fit_ids(model: HookedModel, batch: Batch) -> Batch:
    """The batch with padding that the embedding has a row for.

    A padding token that was added to a tokenizer alone has an id after the model's last one.

    Raises:  PromptError: no batch, or a token outside the vocabulary, with the range that fits.
    """
    if not isinstance(batch, Batch):
        raise PromptError(f"a {type(batch).__name__} is no token batch; make one with Batch.of.")
    size, real = model.cfg.d_vocab, batch.ids[batch.mask]
    require_known([[int(real.min()), int(real.max())]], size)
    outside = (batch.ids < 0) | (batch.ids >= size)
    if not outside.any():
        return batch
    return replace(batch, ids=batch.ids.masked_fill(outside, 0))


def forward(model: HookedModel, batch: Batch) -> None:
    """One forward pass without logits; ends where the last needed hook says so."""
    here = batch.to(input_device(model))
    options: dict[str, object] = {"attention_mask": here.mask.long()} if here.padded else {}
    if hasattr(model, "original_model"):
        options["use_cache"] = False  # keys and values of all layers would outlive their use
    try:
        model(here.ids, return_type=None, **options)
    except EverythingSeen:
        return


@contextmanager
def evaluating(model: AnyModel) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode back outside."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _require_firing(fired: Counter[str], sites: Iterable[str], count: int) -> None:
    if silent := [site for site in sites if fired[site] != count]:
        counts = [fired[site] for site in silent]
        raise CaptureError(
            f"{', '.join(silent[:3])} fired {counts[:3]} times over {count} batches; expected "
            f"{count}. The hook exists but this model's forward pass does not use it once."
        )
