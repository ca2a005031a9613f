"""scan(): every layer's ceilings from the weights, what they predict, and what of it is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from melens import __version__
from melens.errors import ModelError
from melens.formatting import brief
from melens.locating.thresholds import ERASED_LEFT, FIRST_SHARE, last_body_layer
from melens.metrics.magnitude import SUN_ABSOLUTE
from melens.models.checkpoint import Checkpoint
from melens.models.loading import usable_device
from melens.models.opening import open_checkpoint
from melens.models.resolve import asked
from melens.provenance import ModelFacts, RunInfo
from melens.results.scan import Allowed, Candidate, LayerCeiling, Role, TokensTried, WeightScan
from melens.scanning.choosing import SAMPLE
from melens.scanning.firsts import FAR, Spot, look
from melens.scanning.neurons import LayerScan, scan_layer
from melens.scanning.plan import CheckpointPlan, has_layout, plan_of
from melens.store import Heading, KeptRows, RowFormat

STANDS_OUT = 15.0
"""Times its layer's median neuron. SmolLM2: those on dim 507 have 17 to 853, the other layers'
highest 3 to 12; Gemma: 15 to 73 in layers 0 to 11 and 15 to 17, 5 to 12 elsewhere. Random weights
give 2 to 5."""
ALONE = 100.0
"""The same for a coordinate that stands out in one layer only. SmolLM2's two makers have 104 and
181."""
DECIDED = 1 / 3
"""|cosine| of gate and up from which a neuron's sign is taken as known: the other sign then has at
most half the ceiling, (1 - c) / (1 + c). SmolLM2: maker 0.58, erasers -0.54 and 0.71.

Behind a post-norm that does not follow: it restores the size of whatever is written, so a neuron
alone can have the whole ceiling with either sign (``Candidate.against`` is the ceiling). There the
sign of the larger activation is assumed, with which a neuron is heard most among others."""
RULE = (
    f"a neuron stands out at {STANDS_OUT:g} times its layer's median ceiling; a dimension counts "
    f"if it does in two layers, or at {ALONE:g} times in one, and before the last tenth of the "
    "layers; the one whose highest maker is highest is followed. The "
    "first neuron on it whose sign is known makes it. It is erased where its ceiling "
    "is highest, if that is in the second half and not of the makers' sign, or where a neuron of "
    f"the other sign has {ERASED_LEFT:g} of the highest maker's; the ME Layer is the first layer "
    f"after an earlier erasure with {FIRST_SHARE:g} of that. Signs are taken as known from a "
    f"|cosine| of gate and up of {DECIDED:.2f}. No layer is named where those ceilings add up to "
    f"{SUN_ABSOLUTE:g} at most, or where first tokens were run, none gets above {SUN_ABSOLUTE:g} "
    f"and the highest ceiling is below {FAR * SUN_ABSOLUTE:,.0f}"
)


@dataclass(frozen=True)
class Prediction:
    """What the ceilings predict; no layer where nothing stands out, or what does is too small."""

    me_layer: int | None
    erase_layer: int | None
    dims: tuple[int, ...]
    confidence: float
    candidates: tuple[Candidate, ...]
    allowed: Allowed | None = None

    def denied(self) -> Prediction:
        """Without a layer; what stands out stays in sight."""
        return replace(self, me_layer=None, erase_layer=None, dims=(), confidence=0.0)


def predict(scans: list[LayerScan]) -> Prediction:
    """Follow the coordinate that neurons stand out on."""
    loud = [
        found for scan in scans for found in scan.highest if found.ratio_to_median >= STANDS_OUT
    ]
    body = last_body_layer(len(scans))
    stages = [
        _Stage(_by_layer(loud, dim), _sign(loud, dim), body, len(scans))
        for dim in _dims(loud, body)
    ]
    stages = [stage for stage in stages if stage.me_layer is not None]
    if not stages:
        return Prediction(None, None, (), 0.0, tuple(loud))
    rows = [scan.row for scan in scans]
    sizes = {stage.dim: stage.allowed(loud, rows) for stage in stages}
    stages.sort(key=lambda stage: (not sizes[stage.dim].is_enough, -stage.most))
    best = stages[0]
    made = tuple(found.model_copy(update={"role": best.role(found)}) for found in loud)
    dims = tuple(stage.dim for stage in stages if sizes[stage.dim].is_enough)
    found = Prediction(
        best.me_layer, best.erase_layer, dims, best.confidence, made, sizes[best.dim]
    )
    return found if sizes[best.dim].is_enough else found.denied()


def decided(found: Candidate) -> bool:
    """Whether a neuron's sign can be told: it has no gate, or gate and up are aligned enough."""
    return found.cosine is None or abs(found.cosine) >= DECIDED


def _dims(loud: list[Candidate], body: int) -> list[int]:
    """Coordinates that count."""
    found = {dim: _by_layer(loud, dim) for dim in sorted({candidate.dim for candidate in loud})}
    return [
        dim
        for dim, layers in found.items()
        if min(layers) <= body
        and (len(layers) > 1 or max(b.ratio_to_median for b in layers.values()) >= ALONE)
    ]


def _by_layer(loud: list[Candidate], dim: int) -> dict[int, Candidate]:
    """The highest neuron on a coordinate, by layer, in order."""
    found: dict[int, Candidate] = {}
    for candidate in sorted(loud, key=lambda c: c.ceiling):
        if candidate.dim == dim:
            found[candidate.layer] = candidate
    return dict(sorted(found.items()))


class _Stage:
    """One coordinate's makers and erasers, told apart by sign and size."""

    def __init__(
        self, layers: dict[int, Candidate], sign: int | None, body: int, n_layers: int
    ) -> None:
        self.layers, self.sign = layers, sign
        self.dim = next(iter(layers.values())).dim
        before = {layer: f for layer, f in layers.items() if layer <= body and not self.erases(f)}
        self.erase_layer = self._erased_at(before, n_layers)
        end = n_layers if self.erase_layer is None else self.erase_layer
        self.makers = makers = self._after_an_erasure(
            {at: f for at, f in before.items() if at < end}, end
        )
        self.most = most = max((found.ceiling for found in makers.values()), default=0.0)
        self.me_layer = next(
            (layer for layer, f in makers.items() if f.ceiling >= FIRST_SHARE * most), None
        )
        if self.me_layer is None:
            self.confidence = 0.0
            return
        best, least = makers[self.me_layer], STANDS_OUT if len(layers) > 1 else ALONE
        clear = max(0.0, 1 - least / best.ratio_to_median)
        self.confidence = clear * best.ceiling / most

    def erases(self, found: Candidate) -> bool:
        """Whether a neuron is known to write against the makers' sign."""
        return self.sign is not None and decided(found) and found.sign != self.sign

    def role(self, found: Candidate) -> Role:
        """What a candidate does to this coordinate."""
        if found.dim != self.dim:
            return "other"
        if self.erases(found) or (found.layer == self.erase_layer and not self._makes(found)):
            return "erase"
        late = self.erase_layer is not None and found.layer > self.erase_layer
        return "other" if late and not self._makes(found) else "emerge"

    def allowed(self, loud: list[Candidate], rows: list[LayerCeiling]) -> Allowed:
        """The size that this coordinate's writers allow, one and all together."""
        assert self.me_layer is not None
        writers = [f for f in loud if f.layer in self.makers and self.role(f) == "emerge"]
        together = 0.0
        for layer in self.makers:
            row = rows[layer]
            whole = row.whole if row.whole_dim == self.dim else None
            together += max(sum(f.ceiling for f in writers if f.layer == layer), whole or 0.0)
        here = self.makers[self.me_layer]
        most = max(self.makers.values(), key=lambda found: found.ceiling)
        return Allowed(
            layer=self.me_layer,
            dim=self.dim,
            neuron=here.neuron,
            expert=here.expert,
            size=here.ceiling,
            highest=most.ceiling,
            highest_layer=most.layer,
            last_layer=max(self.makers),
            neurons=len(writers),
            together=together,
            needed=SUN_ABSOLUTE,
        )

    def _makes(self, found: Candidate) -> bool:
        return self.sign is not None and decided(found) and found.sign == self.sign

    def _erased_at(self, makers: dict[int, Candidate], n_layers: int) -> int | None:
        if not makers:
            return None
        top = max(self.layers.values(), key=lambda found: found.ceiling)
        if top.layer >= n_layers / 2 and top.layer > min(makers) and not self._makes(top):
            return top.layer
        most = max(makers.values(), key=lambda found: found.ceiling)
        later = [
            found
            for layer, found in self.layers.items()
            if layer > most.layer
            and self.erases(found)
            and found.ceiling >= ERASED_LEFT * most.ceiling
        ]
        return max(later, key=lambda found: found.ceiling).layer if later else None

    def _after_an_erasure(self, makers: dict[int, Candidate], end: int) -> dict[int, Candidate]:
        """Makers behind the last eraser that could undo half of what any before it could make."""
        for layer in sorted(self.layers, reverse=True):
            found = self.layers[layer]
            earlier = [f.ceiling for at, f in makers.items() if at < layer]
            rest = {at: f for at, f in makers.items() if at > layer}
            if (
                layer < end
                and self.erases(found)
                and earlier
                and rest
                and found.ceiling >= ERASED_LEFT * max(earlier)
            ):
                return rest
        return makers


def _sign(loud: list[Candidate], dim: int) -> int | None:
    """Sign of the first neuron on a coordinate whose sign can be told; None = no telling.

    The first is a maker: before it there is nothing to erase.
    """
    known = [found for found in loud if found.dim == dim and decided(found)]
    return min(known, key=lambda found: (found.layer, -found.ceiling)).sign if known else None


SCHEMA = "melens/scan-layers/1"


def kept_layers(path: Path | None, key: str) -> KeptRows[int, LayerScan]:
    """Finished layers by number; on disk if there is a path.

    A file of other weights, or one that is damaged, is begun again: a scan is cheap, and the
    user's --out may hold an older model's.

    Raises:  OutputError: the file cannot be written. ResultError: it cannot be read.
    """
    form = RowFormat(
        name=lambda found: found.row.layer,
        write=LayerScan.model_dump_json,
        read=LayerScan.model_validate_json,
        refusal=None,
    )
    return KeptRows(path, form, Heading(SCHEMA, key))


LEAVES_OUT = (
    "what attention writes",
    "constant biases of the FFN's output",
    "neurons that write together",
)
BY_ITSELF = "after a norm, a neuron's ceiling is of that neuron alone"
HYBRID = "what linear-attention (DeltaNet) blocks write"


def scan(
    model: str | Path,
    *,
    device: str | None = None,
    revision: str | None = None,
    keep: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    reach: bool | None = None,
) -> WeightScan:
    """Predict the ME Layer of a checkpoint from its weights; needs no tokenizer.

    Reads the norm gains and FFN matrices, a piece at a time, in whatever dtype they are stored.
    Where something stands out and the files are here, a few first tokens are then run up to that
    layer, a block in memory at a time: what no token reaches is not predicted.

    Args:    model: a named model, a folder of safetensors, a ``.gguf`` file, or a hub id; of an id
             that is not in the hub's cache only the tensors needed are fetched, by range.
             device: where pieces are computed on; None = CUDA if there is one, else CPU.
             revision: branch, tag or commit of a hub id.
             keep: file that finished layers are kept in, so that an interrupted scan goes on; it
             stays when the scan is done.
             progress: called with (layers done, layers).
             reach: None = first tokens are run where the files are safetensors on this machine, of
             8 GB at most; False = nothing is run; True = they must be run.
    Returns: ceilings by layer, candidates, and the predicted layers and dimensions.
    Raises:  ModelNotFoundError, ModelError: no such model, or a family without a layout; with
             ``reach=True`` also one that cannot be run a block at a time.
             WeightsError: missing, truncated, misshapen or not finite; names file and tensor.
             FetchError: the hub is out of reach, or offline was asked for.
    """
    if not isinstance(reach, (bool, type(None))):
        raise ModelError(f"reach must be True, False or None, got {brief(reach)}.")
    device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    files = open_checkpoint(model, revision=revision)
    try:
        plan, layers = _ceilings(files, model, device, keep, progress)
        said, seen, unseen = predict(layers), None, None
        if said.allowed is not None and said.me_layer is not None and reach is not False:
            spot = Spot(said.allowed, said.dims)
            seen, unseen = look(files, model, spot, device=device, wanted=reach)
        elif reach:
            unseen = "nothing that stands out is large enough, so there is no layer to run to"
        if seen is not None:
            said = judged(said, seen)
        return _result(files, plan, layers, said, device).model_copy(
            update={"seen": seen, "unseen": unseen}
        )
    finally:
        files.close()


def judged(said: Prediction, seen: TokensTried) -> Prediction:
    """The prediction, unless no first token gets there and its ceiling is not far above.

    Massive tokens that are never first ones (delimiters alone) are not tried. A ceiling that is
    far above what is needed leaves room for them, one that is near it does not.
    """
    size = said.allowed
    if seen.reached or size is None or size.highest >= FAR * size.needed:
        return said
    return said.denied()


def _ceilings(
    files: Checkpoint,
    model: str | Path,
    device: str,
    keep: Path | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[CheckpointPlan, list[LayerScan]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # a piece is too small to be shared: threads wait longer than they work
    try:
        plan = _plan(files, model)
        key = "" if keep is None else f"{__version__} {files.key(times=True)} {device}"
        kept = kept_layers(keep, key)
        for layer in plan.layers:
            if layer.layer not in kept.found:
                kept.add([scan_layer(files, plan, layer, device)])
            if progress is not None:
                progress(layer.layer + 1, len(plan.layers))
        return plan, [kept.found[layer.layer] for layer in plan.layers]
    finally:
        torch.set_num_threads(threads)


def _result(
    files: Checkpoint,
    plan: CheckpointPlan,
    scans: list[LayerScan],
    said: Prediction,
    device: str,
) -> WeightScan:
    profile = tuple(found.row for found in scans)
    kinds = {files.stored(f.down.name).kind for layer in plan.layers for f in layer.ffns}
    left = LEAVES_OUT
    if plan.layout.post is not None:
        left = (*left, BY_ITSELF)
    if plan.layout.hybrid:
        left = (*left, HYBRID)
    if plan.beyond is not None:
        left = (*left, f"layers from {plan.beyond} on, which the config does not count")
    return WeightScan(
        n_layers=len(scans),
        d_model=plan.d_model,
        me_layer=said.me_layer,
        erase_layer=said.erase_layer,
        dims=said.dims,
        confidence=said.confidence,
        rule=RULE,
        candidates=said.candidates,
        profile=profile,
        covered=all(row.covered for row in profile),
        leaves_out=left,
        allowed=said.allowed,
        run=RunInfo.collect(
            ModelFacts(files.name, files.revision, None, " ".join(sorted(kinds)) or "-", device),
            seed=0,
            settings={
                "files": files.key(),
                "format": files.kind,
                "layers": len(scans),
                "first_tokens_sampled": SAMPLE,
            },
        ),
    )


def _plan(files: Checkpoint, model: str | Path) -> CheckpointPlan:
    """By the family's layout, or by measurement where melens has none and the files are here."""
    if has_layout(files):
        return plan_of(files)
    wanted = asked(model)
    if files.kind == "gguf" or not wanted.is_local or not wanted.path.is_dir():
        return plan_of(files)  # which says that it knows no layout
    from melens.scanning.measured_plan import measured_plan

    return measured_plan(files, wanted.path)
