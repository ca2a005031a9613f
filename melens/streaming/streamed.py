"""load_streamed(): a bridge whose blocks are read from disk while it runs, one in memory at a time.

For models that do not fit. Modules, hooks and arithmetic are those of an ordinary load; only the
weights come and go. Outside a block's own call its weights are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from melens.capture import EverythingSeen
from melens.errors import ContractError, ModelError, WeightsError
from melens.models.bridging import WAYS, Way, bridge_module, bridged, none_fits
from melens.models.checkpoint import Checkpoint, read_folder
from melens.models.complaints import has_tokenizer
from melens.models.contract import OwnAnswer, check_contract, own_answer, probe_ids
from melens.models.decoder import layer_list
from melens.models.files import check_folder
from melens.models.gguf import given_names, no_cache
from melens.models.hub import asking_the_hub
from melens.models.loading import (
    CHECKED,
    best_device,
    chosen_dtype,
    read_tokenizer,
    source_of,
    usable_device,
)
from melens.models.multimodal import language_config
from melens.models.named import NAMED, on_this_machine
from melens.models.origin import Origin, Sample, digest_of, remember, sample
from melens.models.resolve import asked
from melens.models.weight_files import read_json, weight_files
from melens.protocols import Args, HookedModel, Tokenizer
from melens.streaming.skeleton import Skeleton, Slot, build_skeleton, placeholder_of
from melens.streaming.tape import Tape

KEPT_STREAM = "_melens_stream"
SPLITS = {"split_qkv_matrix": ("q", "k", "v"), "split_gate_up_matrix": ("gate", "in")}
"""TransformerLens cuts a fused matrix once, when it wraps a part; here it is cut at every read."""


class BlockStream:
    """Fills a bridge's blocks as its forward pass reaches them, and empties them behind it."""

    def __init__(self, bridge: HookedModel, skeleton: Skeleton, checkpoint: Checkpoint) -> None:
        """Register on every block, the embedding and the unembedding.

        Raises:  ModelError: the bridge keeps weights that this could not keep up to date.
        """
        self.checkpoint, self.n_layers = checkpoint, len(skeleton.blocks)
        self.progress: Callable[[int, int], None] | None = None
        self.blocks_read = 0
        self.checking = False
        self._bridge, self._skeleton = bridge, skeleton
        self._filled: list[Slot] = []
        self._taken: list[Tensor] = []
        self._rooms: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = {}
        self._samples: dict[str, Sample] | None = {}
        stack = layer_list(skeleton.model)
        self._splits = [_splits(block) for block in bridge.blocks]
        for layer, block in enumerate(bridge.blocks):
            if stack[layer] is not block:
                raise ModelError(f"block {layer} does not run through its bridge; load it whole.")
            self._require_no_copies(layer, block)
            block.register_forward_pre_hook(self._entering(layer))
            block.register_forward_hook(self._leave, always_call=True)
        table = skeleton.embedding.module
        table.register_forward_pre_hook(self._embed)
        table.register_forward_hook(self._embedded, always_call=True)
        if (head := skeleton.model.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(self._refuse_logits)

    @property
    def passes(self) -> float:
        """How many times all blocks were read."""
        return self.blocks_read / self.n_layers

    def take_fingerprint(self) -> str:
        """What :func:`melens.models.origin.fingerprint` says of the same model in memory; after
        one pass through all blocks.
        """  # noqa: D205
        samples, self._samples = self._samples or {}, None
        shared = {
            slot.placeholder.data_ptr(): slot
            for slot in (self._skeleton.embedding, self._skeleton.unembedding)
            if slot is not None
        }
        for name, value in self._bridge.state_dict().items():
            if name in samples:
                continue
            if (slot := shared.get(value.data_ptr())) is not None:
                samples[name] = self.checkpoint.sample(slot.pieces[0].name, value.dtype)
            elif not _is_placeholder(value):
                samples[name] = sample(value)
        return digest_of(samples.items())

    def _entering(self, layer: int) -> Callable[..., None]:
        def enter(module: nn.Module, args: Args) -> None:
            self._drop()  # an interrupt may have left the last one
            self._read(self._skeleton.blocks[layer])
            for part, method, targets in self._splits[layer]:
                with torch.device("meta"):  # the linears it makes; the cut itself is of real values
                    made = getattr(part, method)(part.original_component)
                for slots, cut in zip(targets, made, strict=True):
                    for slot in slots:
                        self._filled.append(slot)
                        slot.fill(cut._parameters[slot.name].detach())
            self.blocks_read += 1
            self._note(layer)

        return enter

    def _read(self, slots: list[Slot]) -> None:
        """Into the memory that the last block had, where it fits: new memory costs more time than
        reading does.
        """  # noqa: D205
        kinds = {(tuple(slot.placeholder.shape), slot.placeholder.dtype) for slot in slots}
        self._rooms = {kind: rooms for kind, rooms in self._rooms.items() if kind in kinds}
        for slot in slots:
            rooms = self._rooms.get((tuple(slot.placeholder.shape), slot.placeholder.dtype))
            room = rooms.pop() if rooms else slot.room()
            self._filled.append(slot)
            self._taken.append(room)
            slot.fill(slot.read(self.checkpoint, room))

    def _leave(self, module: nn.Module, args: Args, output: object) -> None:
        self._drop()

    def _drop(self) -> None:
        while self._filled:
            self._filled.pop().empty()
        while self._taken:
            room = self._taken.pop()
            self._rooms.setdefault((tuple(room.shape), room.dtype), []).append(room)

    def _note(self, layer: int) -> None:
        if self._samples is not None:
            for name, value in self._bridge.state_dict().items():
                if name not in self._samples and not _is_placeholder(value):
                    self._samples[name] = sample(value)
        if self.progress is not None:
            left = self.n_layers - layer - 1
            self.progress(self.blocks_read, self.blocks_read + left)

    def _embed(self, module: nn.Module, args: Args) -> Args:
        """Only the rows of the tokens that came, renumbered from 0."""
        found, places = args[0].unique(return_inverse=True)
        slot = self._skeleton.embedding
        table = self.checkpoint.chosen(slot.pieces[0].name, found.tolist(), slot.placeholder.dtype)
        slot.fill(table.to(slot.placeholder.device))
        return (places, *args[1:])

    def _embedded(self, module: nn.Module, args: Args, output: object) -> None:
        self._skeleton.embedding.empty()

    def _refuse_logits(self, module: nn.Module, args: Args) -> None:
        if self.checking:
            raise EverythingSeen
        raise ModelError(
            "a streamed model gives no logits, its unembedding is never read; load it whole."
        )

    def _require_no_copies(self, layer: int, block: nn.Module) -> None:
        known = {id(slot.placeholder) for slot in self._skeleton.blocks[layer]}
        known |= {
            id(s.placeholder) for _, _, ts in self._splits[layer] for slots in ts for s in slots
        }
        for name, value in block.named_parameters():
            if id(value) not in known:
                kind = type(self._skeleton.model).__name__
                raise ModelError(
                    f"{kind} cannot be streamed, TransformerLens keeps a copy of {name} of its "
                    "own; load it whole."
                )


def load_streamed(
    model: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    need_tokenizer: bool = True,
    keep: Path | None = None,
) -> HookedModel:
    """A bridge as :func:`melens.models.load` makes it, but with one block in memory at a time.

    Good for what ends before the unembedding: ``stream()``, ``locate``, ``reach``. Logits are
    refused, and weights read outside their block's call are NaN. Every forward pass reads the
    blocks that it uses; loading makes one pass (the contract check).

    Args:    model: a folder of safetensors, a ``.gguf`` file (its converted copy is streamed), a
             named model, or a hub id (its files are fetched).
             device, dtype, revision: as ``load``.
             need_tokenizer: False takes a folder without one, for ready token batches.
             keep: folder for what finished blocks gave, so that the same passes, made again after
             an interruption, go on at the block where they stopped. Remove it when done.
    Raises:  what ``load`` raises; WeightsError: also at the block that is NaN or cut short.
             ModelError: a family that cannot be streamed.
    """
    folder, name = folder_of(str(model), revision)
    device = usable_device(device or best_device())
    tokenizer = _tokenizer(folder, needed=need_tokenizer)
    config = language_config(read_json(folder / "config.json"))
    checkpoint = read_folder(weight_files(folder, config), config)
    said: list[Exception] = []
    for way in WAYS:
        skeleton = build_skeleton(
            folder, checkpoint, dtype=chosen_dtype(dtype, device), device=device
        )
        _without_padding(skeleton)
        if device != "cpu":
            skeleton.model.to(device)
        place = skeleton.embedding.placeholder.dtype, device, way.__name__
        key = "-".join(map(str, (checkpoint.key(times=True), *place)))
        tape = None if keep is None else Tape(keep, key)
        try:
            bridge, known = _bridged(way, skeleton, checkpoint, tokenizer, str(model), tape)
            break
        except WeightsError:  # the files' fault: no other bridge mends it
            raise
        except (ModelError, ContractError) as error:
            said.append(error)
    else:
        raise none_fits(said)
    also = given_names(folder)
    remember(bridge, Origin(name, revision=revision, weights=known, also=also))
    CHECKED.add(bridge)
    if tape is not None:
        tape.note_weights(known)
        tape.attach(bridge, skeleton.model)
    return bridge


def _bridged(
    way: Way,
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    name: str,
    tape: Tape | None,
) -> tuple[HookedModel, str]:
    """A bridge that reads its blocks, and the fingerprint of its weights; the contract held."""
    known = tape.weights() if tape else None
    own = _own_first_block(skeleton, checkpoint) if known is None else None
    measured = way is not bridge_module
    with reading(skeleton, checkpoint) if measured else nullcontext():
        bridge = bridged(way, skeleton.model, tokenizer, name=name).eval()
    stream = BlockStream(bridge, skeleton, checkpoint)
    stream.blocks_read += own is not None  # the first block, for the model's own attention
    vars(bridge)[KEPT_STREAM] = stream
    if known is None:
        known = _check(bridge, stream, own)
    return bridge, known


@contextmanager
def reading(
    skeleton: Skeleton, checkpoint: Checkpoint, ids: Tensor | None = None
) -> Iterator[None]:
    """Every block's weights are there while it runs, before there is a bridge.

    Args:    ids: the only tokens that are run; None = those of the probe.
    """
    filled: list[Slot] = []

    def enter(layer: int) -> Callable[..., None]:
        def fill(module: nn.Module, args: Args) -> None:
            leave()
            for slot in skeleton.blocks[layer]:
                slot.fill(slot.read(checkpoint, slot.room()))
                filled.append(slot)

        return fill

    def leave() -> None:
        while filled:
            filled.pop().empty()

    blocks = layer_list(skeleton.model)
    handles = [b.register_forward_pre_hook(enter(layer)) for layer, b in enumerate(blocks)]
    if ids is None:
        _fill_probe_rows(skeleton, checkpoint)
    else:
        handles.append(_renumbered(skeleton, checkpoint, ids))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        leave()
        skeleton.embedding.empty()


def _without_padding(skeleton: Skeleton) -> None:
    """Not all rows of the embedding are there; which one pads matters to gradients alone."""
    if isinstance(table := skeleton.embedding.module, nn.Embedding):
        table.padding_idx = None


def _renumbered(skeleton: Skeleton, checkpoint: Checkpoint, ids: Tensor) -> RemovableHandle:
    """Only the rows of these tokens in the embedding, which is asked for them from 0 on."""
    _without_padding(skeleton)
    found = ids.unique()
    name, dtype = skeleton.embedding.pieces[0].name, skeleton.embedding.placeholder.dtype
    rows = checkpoint.chosen(name, found.tolist(), dtype)
    skeleton.embedding.fill(rows.to(skeleton.embedding.placeholder.device))
    return skeleton.embedding.module.register_forward_pre_hook(
        lambda _, args: (torch.searchsorted(found, args[0].contiguous()), *args[1:])
    )


def stream_of(model: object) -> BlockStream | None:
    """What reads a streamed bridge's blocks; None for any other model."""
    return vars(model).get(KEPT_STREAM)


def _own_first_block(skeleton: Skeleton, checkpoint: Checkpoint) -> OwnAnswer:
    """What the first block gives in the model's own attention, before there is a bridge."""
    try:
        _fill_probe_rows(skeleton, checkpoint)
        for slot in skeleton.blocks[0]:
            slot.fill(slot.read(checkpoint, slot.room()))
        return own_answer(skeleton.model, upto=0)
    finally:
        for slot in (skeleton.embedding, *skeleton.blocks[0]):
            slot.empty()


def _fill_probe_rows(skeleton: Skeleton, checkpoint: Checkpoint) -> None:
    table, ids = skeleton.embedding, probe_ids(skeleton.model.config)
    rows = checkpoint.chosen(
        table.pieces[0].name, list(range(int(ids.max()) + 1)), table.placeholder.dtype
    )
    table.fill(rows.to(table.placeholder.device))


def _check(bridge: HookedModel, stream: BlockStream, own: OwnAnswer | None) -> str:
    stream.checking = True
    try:
        check_contract(bridge, own)
    finally:
        stream.checking = False
    return stream.take_fingerprint()


def folder_of(name: str, revision: str | None) -> tuple[Path, str]:
    """Where the files are, and what the model is called in results; a GGUF's are its copy's.

    Raises:  ModelError: a GGUF, and no copy may be kept.
    """
    wanted = asked(name, revision=revision)
    there = wanted.kind != "named" or on_this_machine(NAMED[name]) == "ready"
    if no_cache() and (not there or wanted.kind == "gguf"):
        raise ModelError(
            f"the blocks of {name} are streamed from its converted copy; drop --no-cache "
            "(MELENS_NO_CACHE), or load it whole."
        )
    source = source_of(wanted, revision=revision, trust_remote_code=False)
    if isinstance(source, Path):  # of a hub id: offline, what the hub's cache here holds
        return (source.resolve() if wanted.is_local else source), wanted.shown
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt"]
    with asking_the_hub(name):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    check_folder(folder, trust_remote_code=False)
    return folder, name


def _tokenizer(folder: Path, *, needed: bool) -> Tokenizer | None:
    if not needed and not has_tokenizer(folder):
        return None
    return read_tokenizer(folder, {"local_files_only": True, "trust_remote_code": False})


Targets = tuple[tuple[Slot, ...], ...]


def _splits(block: nn.Module) -> list[tuple[nn.Module, str, Targets]]:
    """Parts that hold a fused matrix in pieces: the part, its method, and where each piece goes."""
    found = []
    for part in block.modules():
        for method, names in SPLITS.items():
            if callable(getattr(part, method, None)):
                targets = tuple(_targets(getattr(part, name).original_component) for name in names)
                found.append((part, method, targets))
    return found


def _targets(linear: nn.Module) -> tuple[Slot, ...]:
    made = []
    for name, value in list(linear._parameters.items()):
        if value is not None:
            empty = placeholder_of(tuple(value.shape), value.dtype, value.device)
            slot = Slot(linear, name, (), empty)
            slot.empty()
            made.append(slot)
    return tuple(made)


def _is_placeholder(value: Tensor) -> bool:
    one = value.untyped_storage().nbytes() <= value.element_size()
    return one and value.is_floating_point() and bool(value.flatten()[:1].isnan().any())
